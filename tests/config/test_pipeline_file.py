from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_ray.config.pipeline import load_pipeline, merged, references
from rlhf_ray.errors import ConfigError

SFT = {"model": "m/start", "data": {"path": "d.jsonl"}}
REWARD = {"model": "${sft.model}", "data": {"path": "p.jsonl"}}


def written(folder: Path, stages: dict[str, Any], **keys: Any) -> Path:
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump({"name": "line", "stages": stages, **keys}, sort_keys=False))
    return path


def test_stages_come_after_those_they_refer_to(tmp_path: Path) -> None:
    _, nodes = load_pipeline(written(tmp_path, {"reward": REWARD, "sft": SFT}))
    assert [(node.name, node.after) for node in nodes] == [("sft", ()), ("reward", ("sft",))]


def test_a_stage_may_have_another_name_than_its_command(tmp_path: Path) -> None:
    _, nodes = load_pipeline(written(tmp_path, {"sft": SFT, "second": {"stage": "reward", **REWARD}}))
    assert nodes[1].command == "reward"


def test_references_become_what_the_stage_left(tmp_path: Path) -> None:
    stages = {
        "sft": SFT,
        "reward": {**REWARD, "centre": "${sft.numbers.centre}", "data": {"path": "${sft.model}/x.jsonl"}},
    }
    with pytest.raises(ConfigError, match="centre"):  # text where a number is due shows before anything runs
        load_pipeline(written(tmp_path, stages))
    del stages["reward"]["centre"]
    _, nodes = load_pipeline(written(tmp_path, stages))
    config = nodes[1].resolved({"sft": {"model": "/a/b"}}, "here", name="reward")
    assert (config.model, config.data.path) == ("/a/b", "/a/b/x.jsonl")  # type: ignore[attr-defined]


def test_a_result_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    _, nodes = load_pipeline(written(tmp_path, {"sft": SFT, "reward": REWARD}))
    with pytest.raises(
        ConfigError, match=r"stage 'reward' refers to \$\{sft.model\}.*no 'model'; it has policy, steps"
    ):
        nodes[1].resolved({"sft": {"policy": "x", "steps": 3}}, "here", name="reward")


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"reward": REWARD}, "stage 'reward' refers to 'sft', which is none of reward"),
        ({"sft": {**SFT, "model": "${reward.model}"}, "reward": REWARD}, "in a circle: sft, reward"),
        ({"fine": SFT}, "stage 'fine': there is no command 'fine'"),
        ({"sft": {**SFT, "modle": "x"}}, r"stage 'sft': unknown key 'modle'; did you mean 'model'"),
        ({"sft": {**SFT, "name": "x"}}, "'name' is the pipeline's to set"),
        ({}, "stages"),
    ],
)
def test_faults_show_before_anything_runs(tmp_path: Path, stages: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_pipeline(written(tmp_path, stages))


def test_a_stage_may_start_from_a_file_and_the_pipeline_has_defaults(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({"name": "old", "seed": 9, **SFT, "training": {"epochs": 7}}))
    stages = {"sft": {"config": "base.yaml", "training": {"sequences_per_step": 8}}}
    path = written(tmp_path, stages, seed=3, defaults={"telemetry": {"wandb": "off"}})
    _, nodes = load_pipeline(path, ["stages.sft.model=other/start", "seed=4"])
    config: Any = nodes[0].resolved({}, "here", name="sft")
    assert (config.name, config.seed, config.model) == ("sft", 4, "other/start")
    assert (config.training.epochs, config.training.sequences_per_step) == (7, 8)
    assert config.telemetry.wandb == "off"


def test_sections_are_laid_over_each_other_key_by_key() -> None:
    assert merged({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"c": 4}, "d": {"e": 5}}) == {
        "a": {"b": 1, "c": 4},
        "d": {"e": 5},
    }


def test_references_are_found_wherever_they_stand() -> None:
    tree = {"a": "${one.x}", "b": [{"c": "in/${two.y.z}/of/${one.w}"}], "d": 3, "e": "$five ${not a reference}"}
    assert list(references(tree)) == [("one", "x"), ("two", "y.z"), ("one", "w")]


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "configs/pipelines").glob("*.yaml")), ids=str)
def test_the_pipelines_that_come_along_are_valid(path: Path) -> None:
    config, nodes = load_pipeline(path)
    assert config.name == path.stem
    assert nodes[-1].command == "evaluate"


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", ""])
def test_a_stage_name_that_could_leave_the_run_folder_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "pipeline.yaml"
    path.write_text(f'name: p\nstages:\n  "{name}": {{}}\n')
    with pytest.raises(ConfigError, match="should match pattern"):
        load_pipeline(path)
