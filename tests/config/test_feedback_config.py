from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_ray.config.feedback import CritiqueConfig, JudgeConfig
from rlhf_ray.config.load import load
from rlhf_ray.config.plan import GIB, plan, render
from rlhf_ray.errors import ConfigError

EXAMPLE = Path(__file__).parents[2] / "configs/judge/llama-8b-1x8.yaml"
ENDPOINT = {"name": "endpoint", "model": "m", "base_url": "https://host/v1"}


def judge_of(**sections: Any) -> JudgeConfig:
    return JudgeConfig.model_validate({"name": "x", "data": {"path": "d"}, "judge": {"model": "m"}} | sections)


# Which engines there are


def test_equal_sections_share_engines_and_any_other_key_parts_them() -> None:
    assert list(judge_of(generator={"model": "m"}).engines) == ["generator"]
    assert list(judge_of(generator={"model": "m", "max_new_tokens": 9}).engines) == ["generator", "judge"]
    assert list(judge_of(generator={"model": "n"}).engines) == ["generator", "judge"]
    assert list(judge_of().engines) == ["judge"]


def test_an_endpoint_needs_no_engines() -> None:
    assert judge_of(judge=ENDPOINT).engines == {}
    assert list(judge_of(judge=ENDPOINT, generator={"model": "m"}).engines) == ["generator"]


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"device": "gpu", "judge": {"model": "m", "gpus": 1}, "generator": {"model": "m"}}, "generator.gpus is 0"),
        ({"judge": {"model": "m", "gpus": 1}}, "judge.gpus is 1"),
    ],
)
def test_engines_that_do_not_fit_the_device_are_named(sections: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=rf"device is \w+, but {key}"):
        judge_of(**sections)


# Labels


def test_the_clamp_depends_on_whether_the_judge_reasons() -> None:
    assert judge_of().most == 1
    assert judge_of(chain_of_thought=True).most == 0.6
    assert judge_of(chain_of_thought=True, clamp=0.9).most == 0.9


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("clamp=0.4", "'clamp': Input should be greater than 0.5"),
        ("{clamp: 0.9, labels: hard}", "clamp belongs to labels soft, but labels is hard"),
        ("responses_per_prompt=17", "less than or equal to 16"),
        ("principles_per_pair=65", "less than or equal to 64"),
        ("judge.name=lokal", "there is no 'lokal'.*did you mean 'local'"),
        ("judge.base_url=host", "unknown key 'judge.base_url'.*endpoint has it: give the name as well"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, override: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    tree = {"name": "x", "data": {"path": "d"}, "judge": {"model": "m"}}
    more = yaml.safe_load(override) if override.startswith("{") else {}
    path.write_text(yaml.safe_dump(tree | more))
    with pytest.raises(ConfigError, match=message):
        load(JudgeConfig, path, [] if more else [override])


# Plan


def test_generator_and_judge_are_planned_with_their_weights_and_caches() -> None:
    found = plan(load(JudgeConfig, EXAMPLE))
    assert [(each.role, each.count, each.gpus) for each in found.actors] == [("generator", 4, 1), ("judge", 1, 4)]
    assert [(part.role, part.weights, part.kv_cache) for part in found.memory] == [
        ("generator", 2 * 8 * 10**9, 40 * GIB),
        ("judge", 2 * 70 * 10**9, 100 * GIB),
    ]
    by_gpu = {bundles.roles: bundles.bytes_per_device for bundles in found.bundles}
    assert by_gpu["judge",] == (2 * 70 * 10**9 + 100 * GIB) / 4
    assert {node for bundles in found.bundles for node in bundles.nodes} == {1}


def test_values_that_steer_are_planned_beside_their_policy_and_whole_on_each_gpu(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 4, "vocab_size": 10}')
    generator = {"model": str(tmp_path), "gpus": 2, "decode_beta": 4}
    config = {"name": "x", "device": "gpu", "data": {"path": "d"}, "generator": generator}
    parts = plan(CritiqueConfig.model_validate(config)).memory
    # An inner layer is 4 * 8 + 8, V's outer 8 + 1, each Q's 8 * 10 + 10; two bytes on each of two GPUs.
    assert [(part.part, part.weights) for part in parts[1:]] == [("values", 2 * 2 * (3 * 40 + 9 + 2 * 90))]
    parts = plan(CritiqueConfig.model_validate({**config, "generator": {**generator, "decode_beta": None}})).memory
    assert len(parts) == 1


def test_a_plan_without_training_has_no_batch() -> None:
    text = render(
        plan(CritiqueConfig.model_validate({"name": "x", "data": {"path": "d"}, "generator": {"model": "m"}}))
    )
    assert "Batch" not in text
    assert "  generator  1       1          0" in text


def test_a_judge_that_is_served_elsewhere_takes_nothing_here() -> None:
    found = plan(judge_of(judge=ENDPOINT))
    assert found.cpus == found.gpus == 0
    assert "Nothing: the model is served elsewhere." in render(found)
