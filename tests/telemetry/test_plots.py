import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.telemetry.plots import plot_reliability, plot_run


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    rows: list[dict[str, Any]] = [
        {"update": i, "time": 0.0, "objective/scores": i / 2, "objective/kl": None if i == 2 else i / 10}
        for i in range(5)
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"update": 5, "time": 0.0}]))
    return path


@pytest.fixture
def panels(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The axes of the figure that is saved."""
    from matplotlib.figure import Figure

    seen: list[Any] = []
    save = Figure.savefig

    def saved(figure: Figure, *args: Any, **options: Any) -> None:
        seen.extend(figure.axes)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", saved)
    return seen


def test_three_panels_show_proxy_gold_and_kl_against_updates(metrics: Path, tmp_path: Path, panels: list[Any]) -> None:
    png = tmp_path / "plots" / "run.png"
    plot_run(metrics, png, [(4, 2.0, 0.5), (0, 1.0, 0.25)])
    proxy, gold, kl = panels
    assert proxy.lines[0].get_xydata().tolist() == [[i, i / 2] for i in range(5)]
    assert gold.lines[0].get_xydata().tolist() == [[0, 1], [4, 2]]
    band = gold.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (0.75, 2.5)
    assert kl.lines[0].get_xydata().tolist() == [[0, 0], [1, 0.1], [3, 0.3], [4, 0.4]]  # update 2 was not finite
    assert proxy.get_xlim() == kl.get_xlim()
    assert png.read_bytes().startswith(b"\x89PNG")


def test_gold_may_be_unmeasured(metrics: Path, tmp_path: Path, panels: list[Any]) -> None:
    plot_run(metrics, tmp_path / "run.png", None)
    assert [text.get_text() for text in panels[1].texts] == ["not measured"]


def test_reliability_is_a_line_a_source_with_its_counts_below(tmp_path: Path, panels: list[Any]) -> None:
    table = {"count": [30, 12], "predicted": [0.53, 0.97], "share": [0.5, 0.75]}
    plot_reliability({"all": table, "people": {"count": [7], "predicted": [0.9], "share": [1.0]}}, tmp_path / "r.png")
    right, counts = panels
    assert [line.get_xydata().tolist() for line in right.lines] == [
        [[0.5, 0.5], [1, 1]],  # what calibrated predictions would be
        [[0.53, 0.5], [0.97, 0.75]],
        [[0.9, 1.0]],
    ]
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["all (42 pairs)", "people (7 pairs)"]
    assert [text.get_text() for text in counts.texts] == ["30", "12", "7"]
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
