from rlhf_ray.config.base import leaves
from rlhf_ray.config.document import PAGE, STAGES, document


def test_the_page_is_what_the_models_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == document(), "run: python -m rlhf_ray.config.document"


def test_every_key_of_every_stage_is_on_the_page_once() -> None:
    page = document()
    for stage in STAGES:
        section = page.split(f"## `rlhf-ray {stage.__name__.removesuffix('Config').lower()}`\n")[1].split("\n## ")[0]
        keys = [line.split("`")[1] for line in section.splitlines() if line.startswith("| `")]
        assert keys == list(leaves(stage))


def test_a_sections_own_default_is_shown_and_not_its_fields() -> None:
    sft = document().split("## `rlhf-ray reward`")[0]
    assert "| `training.optimizer.learning_rate` | number > 0 | `1e-05` |" in sft


def test_types_bounds_and_defaults_read_as_yaml_does() -> None:
    page = document()
    assert "| `checkpoint.every` | integer > 0 or none | `none` |" in page
    assert "| `ppo.gamma` | number ≥ 0, ≤ 1 | `1.0` |" in page
    assert "| `ppo.whiten_rewards` | true or false | `false` |" in page
    assert "| `data.path` | text | required |" in page
