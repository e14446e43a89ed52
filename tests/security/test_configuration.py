"""A configuration names things; it runs no code, and the names in it lead to no other folder."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rlhf_ray.config.evaluation import EvaluateConfig
from rlhf_ray.config.load import load, validated
from rlhf_ray.config.pipeline import PipelineConfig, load_pipeline
from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.config.supervised import RewardConfig, SFTConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.feedback import constitution
from rlhf_ray.telemetry.run_folder import RunFolder

OUTSIDE = ["", ".", "..", "../x", "a/b", "/x", "a\\b", "~x", ".hidden", "-x", "a\n", "a\0b", "a b", "é"]
"""No name of a run, a stage or a part of anything."""

SFT = {"model": "m", "data": {"path": "d"}}
PPO = {"name": "n", "policy": "p", "data": {"path": "d"}}
TAGS = [
    "!!python/object/apply:os.system ['touch {marker}']",
    "!!python/object/new:os.system ['touch {marker}']",
    "!!python/name:os.system",
    "!!python/module:os",
]


@pytest.mark.parametrize("tag", TAGS)
def test_a_tag_that_would_make_an_object_is_refused_wherever_yaml_is_read(tag: str, tmp_path: Path) -> None:
    marker = tmp_path / "code-ran"
    value = tag.format(marker=marker)
    file = tmp_path / "run.yaml"
    file.write_text(f"name: {value}\nmodel: m\ndata: {{path: d}}\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: is not YAML: could not determine a constructor for the tag"):
        load(SFTConfig, file)
    with pytest.raises(ConfigError, match="is not YAML"):
        load_pipeline(file)
    with pytest.raises(ConfigError, match="could not determine a constructor"):
        constitution.load(file)
    file.write_text("name: n\nmodel: m\ndata: {path: d}\n")
    with pytest.raises(ConfigError, match=r"override 'name=.*': the value is not YAML"):
        load(SFTConfig, file, [f"name={value}"])
    assert not marker.exists()


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_could_lead_elsewhere_are_refused(name: str) -> None:
    ways = [
        (SFTConfig, {**SFT, "name": name}),
        (PipelineConfig, {"name": name, "stages": {"sft": SFT}}),
        (PPOConfig, {**PPO, "reward": {"parts": {name: {"model": "r"}}}}),
        (RewardConfig, {"name": "n", "model": "m", "data": {"sources": {name: {"path": "d"}}}}),
        (EvaluateConfig, {"name": "n", "policy": {"model": "p"}, "answers": {name: {"path": "d"}}}),
        (
            EvaluateConfig,
            {"name": "n", "policy": {"model": "p"}, "answers": {"a": {"path": "d", "rewards": {name: {"model": "r"}}}}},
        ),
    ]
    for kind, tree in ways:
        with pytest.raises(ConfigError, match="pattern"):
            validated(kind, tree, "run.yaml")
    with pytest.raises(ValidationError, match="pattern"):
        PipelineConfig.model_validate({"name": "n", "stages": {name: SFT}})


@given(st.text(max_size=8))
def test_whatever_a_run_is_called_its_folder_is_a_child_of_output_dir(name: str) -> None:
    try:
        config = validated(SFTConfig, {**SFT, "name": name}, "run.yaml")
    except ConfigError:
        return
    folder = (Path("/runs") / config.name).resolve()
    assert folder.parent == Path("/runs") and folder.name == name


def test_output_dir_may_lie_anywhere_and_nothing_is_written_beside_the_runs_folder(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    tree = {**SFT, "name": "n", "output_dir": str(tmp_path / "here" / ".." / "there")}
    folder = RunFolder(validated(SFTConfig, tree, "run.yaml"))
    folder.write_summary({"../../x": 1.0})
    folder.close()
    assert json.loads((tmp_path / "there/n/summary.json").read_text()) == {"../../x": 1.0}
    assert {path.relative_to(tmp_path).parts[:2] for path in tmp_path.rglob("*") if path.is_file()} == {("there", "n")}
