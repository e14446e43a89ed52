"""What a person gets wrong: one message that names the thing, the place and the remedy, and an exit code.

That a port is taken cannot happen to PPO: the learner's ranks meet at a port that is bound as it is chosen, and so do
its engines. `test_ppo.py` runs with the usual ports taken.
"""

import json
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny
from commands import Project, message, only_message, rows, write_rows

from rlhf_ray.errors import RewardError
from rlhf_ray.records import Finish, Ragged, Trajectories, no_columns

pytestmark = pytest.mark.real

Ran = subprocess.CompletedProcess[str]

REWARDS = """
import json
import math


def raises(prompts, responses):
    raise KeyError("no such judge")


def not_a_number(prompts, responses):
    return [0.5] + [math.nan] * (len(responses) - 1)


def one_too_few(prompts, responses):
    return [0.5] * (len(responses) - 1)


number = 3
"""


@pytest.fixture(scope="module")
def bad(project: Project) -> Project:
    """The directory with everything in it that a run must refuse."""
    folder = project.folder
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "broken.py").write_text("import json\njson.loads('{')\n")
    (folder / "empty_folder").mkdir()
    tiny.write_reward_model(folder / "two_outputs", outputs=2)

    small = Path(shutil.copytree(project.policy, folder / "small_vocabulary")) / "config.json"
    small.write_text(json.dumps(json.loads(small.read_text()) | {"vocab_size": 10}))

    shutil.copytree(project.reward, folder / "other_tokenizer")
    other = tiny.tokenizer()
    other.add_tokens(["zz"])
    other.save_pretrained(folder / "other_tokenizer")

    write_rows(folder / "none.jsonl", [])
    write_rows(folder / "no_prompts.jsonl", [{"text": "a"}, {"prompt": 3}, {"prompt": ""}])
    write_rows(folder / "long.jsonl", [{"prompt": "a"}, {"prompt": "b" * 100}])
    return project


class Case(NamedTuple):
    overrides: str
    """Separated by spaces."""
    said: tuple[str, ...]
    """All of it is in the message."""
    code: int = 2


# Refused before Ray starts.
EARLY = {
    "unknown key": Case("rollout.prompts_per_updates=3", ("rollout.prompts_per_updates", "prompts_per_update'?")),
    "negative batch": Case("rollout.prompts_per_update=-8", ("rollout.prompts_per_update", "greater than 0", "-8")),
    "no such model": Case("policy=/no/model", ("policy", "'/no/model' does not exist", "expected")),
    "not a model": Case("policy=empty_folder", ("policy", "'empty_folder' has no config.json")),
    "a file as a model": Case("policy=prompts.jsonl", ("policy", "'prompts.jsonl' is a file", "expected")),
    "tokenizer larger than the model": Case(
        "policy=small_vocabulary", ("policy", "'small_vocabulary' has 43 tokens", "vocab_size is 10", "Put")
    ),
    "reward model of another tokenizer": Case(
        "reward.model=other_tokenizer", ("'policy' (43 tokens)", "'other_tokenizer' (44 tokens)", "from the same base")
    ),
    "reward model with two outputs": Case(
        "reward.model=two_outputs", ("reward.model", "'two_outputs' has 2 outputs", "expected exactly one")
    ),
    "policy as reward model": Case(
        "reward.model=policy", ("reward.model", "'policy' is LlamaForCausalLM", "rlhf-ray reward")
    ),
    "prompt longer than the context": Case(
        "data.max_tokens=250 learner.tokens_per_micro_batch=512",
        ("'policy' has a context of 256", "data.max_tokens 250 + rollout.max_new_tokens 16 = 266", "lower"),
    ),
    "too many long prompts": Case(
        "data.path=long.jsonl", ("1 of 2 rows", "long.jsonl:2: too long", "data.max_bad_share", "quarantine.jsonl")
    ),
    "empty data set": Case("data.path=none.jsonl", ("none.jsonl", "empty data set", "check data.path")),
    "all rows bad": Case(
        "data.path=no_prompts.jsonl",
        ("no_prompts.jsonl", "none of 3 can be used", "no_prompts.jsonl:1: missing column", "quarantine.jsonl"),
    ),
    "no such data": Case("data.path=absent.jsonl", ("data.path 'absent.jsonl'", "no such file", "looked for /")),
    "no such reward module": Case(
        "reward.model=null reward.function=nowhere:f",
        ("reward.function 'nowhere:f'", "cannot import 'nowhere'", "current directory"),
        code=1,
    ),
    "reward module that breaks": Case(
        "reward.model=null reward.function=broken:f", ("reward.function 'broken:f'", "raised JSONDecodeError"), code=1
    ),
    "no such reward function": Case(
        "reward.model=null reward.function=rewards:absent", ("module 'rewards' has no 'absent'",), code=1
    ),
    "reward that is no function": Case(
        "reward.model=null reward.function=rewards:number", ("'number' is not callable",), code=1
    ),
    "nobody at the address": Case(
        "--address 127.0.0.1:1", ("nobody answers at Ray address '127.0.0.1:1'", "ray start --head"), code=1
    ),
}
# Refused by what the cluster has.
SCARCE = {
    "no GPUs": Case(
        "device=gpu roles.rollout.gpus=1 roles.reference.gpus=1 roles.reward.gpus=1 roles.learner.gpus=1 "
        "roles.learner.ranks=1000",
        ("1003 GPUs are asked for", "rollout 1, ", "learner 1000", "the cluster has", "Ask for less in `roles`"),
        code=1,
    ),
    "not enough CPUs": Case("roles.cpus=1000", ("4000 CPUs are asked for", "Ask for less in `roles`"), code=1),
}
CASES = EARLY | SCARCE


@pytest.fixture(scope="module")
def refused(bad: Project, request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """The command for every case that is to be tested, two at a time."""
    wanted = {item.callspec.params["case"] for item in request.session.items if item.originalname == REFUSAL}
    with ThreadPoolExecutor(2) as pool:
        yield {
            case: pool.submit(bad.run, f"name={case.replace(' ', '-')}", *CASES[case].overrides.split())
            for case in CASES
            if case in wanted
        }


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_with_one_message(case: str, refused: dict[str, Any]) -> None:
    ran = refused[case].result()
    said = message(ran)
    assert ran.returncode == CASES[case].code, said
    assert [part for part in CASES[case].said if part not in said] == [], said


REFUSAL = test_it_is_refused_with_one_message.__name__


def test_a_run_that_was_refused_does_not_hold_its_name(bad: Project) -> None:
    """Whoever mends the configuration runs it again under the same name."""
    first = bad.run("name=again", "policy=/no/model")
    second = bad.run("name=again", "policy=/still/no/model")
    assert "/no/model" in message(first) and "/still/no/model" in message(second)


# What only shows when answers are scored


def test_a_reward_function_that_raises_ends_the_run_at_the_first_update(bad: Project) -> None:
    options = ("name=raises", "reward.model=null", "reward.function=rewards:raises")
    ran = bad.run(*options, within_s=180)
    assert ran.returncode == 1
    assert message(ran) == "error: reward.function rewards:raises raised KeyError: 'no such judge'"
    assert bad.metrics("raises") == []
    assert not (bad.results("raises") / "summary.json").exists()


def test_a_score_that_cannot_be_had_reaches_the_driver_as_what_it_is(ray_session: None, bad: Project) -> None:
    import ray

    from rlhf_ray.actors.reward import RewardFunction, RewardServer
    from rlhf_ray.runtime.deadlines import fetch

    here = {"env_vars": {"PYTHONPATH": str(bad.folder)}}
    function = ray.remote(num_cpus=0, runtime_env=here)(RewardFunction)
    server = ray.remote(num_cpus=0)(RewardServer)
    actors = {
        r"reward.function rewards:not_a_number: score 1 of 3 is nan; scores must be finite": function.remote(
            "rewards:not_a_number", 5.0, bad.policy, False
        ),
        r"reward.function rewards:one_too_few: expected 3 scores, one for each answer, got 2": function.remote(
            "rewards:one_too_few", 5.0, bad.policy, False
        ),
        r"reward.url http://127.0.0.1:9: no scores in 1 s and \d+ tries; the last: ConnectError": server.remote(
            "http://127.0.0.1:9", 1.0, bad.policy, False
        ),
        r"reward.function 'rewards:absent': module 'rewards' has no 'absent'": function.remote(
            "rewards:absent", 5.0, bad.policy, False
        ),
    }
    for said, actor in actors.items():
        with pytest.raises(RewardError, match=said):
            fetch(actor.scores.remote(three_answers()), 60, "reward", "scoring")
        ray.kill(actor)


def three_answers() -> Trajectories:
    answers = Ragged.of([[7, 8], [9], [10, 1]], np.int32)
    return Trajectories(
        prompts=Ragged.of([[6], [7], [8]], np.int32),
        prompt_of=np.arange(3, dtype=np.int32),
        responses=answers,
        sampler_logprobs=np.zeros(len(answers.values), np.float32),
        sample_ids=np.arange(3),
        finish=np.full(3, Finish.EOS, np.uint8),
        weight_version=np.zeros(3, np.int32),
        top_ids=no_columns(len(answers.values)),
    )


# A disk that fills up


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Room for two checkpoints of the tiny policy and its learner."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4000k", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"mounting a tmpfs takes root: {mounted.stderr.decode()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def test_a_full_disk_ends_the_run_and_keeps_what_there_is(bad: Project, small_disk: Path) -> None:
    ran = bad.run("name=full", f"output_dir={small_disk}", within_s=180)
    assert ran.returncode == 1
    said = only_message(ran.stdout, ran.stderr)
    assert f"checkpoint '{small_disk}/full/checkpoints/update_000003' needs 1.5 MiB" in said
    assert "the disk has 0." in said and "Free some, or choose another output_dir" in said
    assert [line["update"] for line in rows(small_disk / "full/metrics.jsonl")] == [0, 1, 2]
    assert sorted(place.name for place in (small_disk / "full/checkpoints").iterdir()) == [
        "update_000001",
        "update_000002",
    ]
    assert (small_disk / "full/checkpoints/update_000002/policy/model.safetensors").stat().st_size > 200_000
    assert not (small_disk / "full/summary.json").exists()
