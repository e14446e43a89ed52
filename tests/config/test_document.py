from rlhf_ray.config.base import choices, leaves
from rlhf_ray.config.document import PAGE, STAGES, document
from rlhf_ray.config.ppo import PPOConfig


def test_the_page_is_what_the_models_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == document(), "run: python -m rlhf_ray.config.document"


def test_every_key_of_every_stage_is_on_the_page_once() -> None:
    page = document()
    for stage in STAGES:
        section = page.split(f"## `rlhf-ray {stage.__name__.removesuffix('Config').lower()}`\n")[1].split("\n## ")[0]
        table = section.strip().split("\n\n")[0]
        keys = [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")]
        assert keys == list(leaves(stage))


def test_every_choice_is_explained_with_its_keys_and_defaults() -> None:
    page = document().split("## `rlhf-ray ppo`\n")[1]
    assert "| `reinforce_pp` | REINFORCE++ (Hu 2025): rewards to go, whitened over the whole batch. |" in page
    assert "| `dapo` | `clip_ratio` | number or pair of numbers | `[0.2, 0.28]` |" in page
    assert "| all | `dual_clip` | number > 1 or null | `null` |" in page
    for options in choices(PPOConfig).values():
        for option in options:
            assert " ".join((option.__doc__ or "").split()) in page


def test_a_sections_own_default_is_shown_and_not_its_fields() -> None:
    sft = document().split("## `rlhf-ray reward`")[0]
    assert "| `training.optimizer.learning_rate` | number > 0 | `1e-05` |" in sft


def test_types_bounds_and_defaults_read_as_yaml_does() -> None:
    page = document()
    assert "| `checkpoint.every` | integer > 0 or null | `null` |" in page
    assert "| `ppo`, `reinforce_pp` | `gamma` | number ≥ 0, ≤ 1 | `1.0` |" in page
    assert "| `ppo` | `whiten_rewards` | true or false | `false` |" in page
    assert "| `ppo.kl.controller` | one of `fixed`, `adaptive`, `budget` | `fixed` |" in page
    assert "| `judge` | one of `local`, `endpoint` | required |" in page
    assert "| `learner.lora` | section or null | `null` |" in page
    assert "| `data.path` | text | required |" in page
