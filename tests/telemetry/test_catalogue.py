from pathlib import Path

import pytest

from rlhf_ray.telemetry import catalogue

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_the_metrics_page_is_what_the_catalogue_generates() -> None:
    assert PAGE.read_text() == catalogue.markdown(), "stale: run python -m rlhf_ray.telemetry.catalogue"


def test_no_name_stands_in_two_sections() -> None:
    assert len(catalogue.CATALOGUE) == sum(len(section) for section in catalogue.SECTIONS.values())


def test_every_metric_says_its_unit_meaning_and_reduction() -> None:
    for metric in catalogue.CATALOGUE.values():
        assert all([metric.name, metric.unit, metric.meaning, metric.reduction]), metric


def test_a_bar_in_a_meaning_does_not_end_the_cell() -> None:
    [row] = [line for line in catalogue.markdown().splitlines() if "`val/ratio_max_first`" in line]
    assert row.replace("\\|", "").count("|") == 5


def test_catalogued_names_pass() -> None:
    catalogue.check({"objective/kl": 0.0, "time/update": 1.0})


def test_an_unknown_name_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ValueError, match=r"'objective/score' is not in .* did you mean 'objective/scores'\?"):
        catalogue.check({"objective/kl": 0.0, "objective/score": 1.0})


def test_a_name_of_a_family_passes_with_whatever_the_configuration_calls_it() -> None:
    catalogue.check(["reward/people/ece_held_out", "reward/ai-2/accuracy_held_out"])
    for name in ("reward/a/b/ece_held_out", "reward//ece_held_out", "reward/people/ece", "reward/people/ece_held_out2"):
        with pytest.raises(ValueError, match="is not in"):
            catalogue.check([name])
