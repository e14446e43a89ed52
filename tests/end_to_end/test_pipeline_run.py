"""Constitutional AI as a person runs it: one command, tiny models, every stage the real one; then the same again."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from commands import RLHF_RAY, clean_environment, write_rows

pytestmark = pytest.mark.real

STAGES = ["critique", "sft", "judge", "reward", "ppo", "evaluate"]
CONSTITUTION = {
    "name": "short",
    "principles": [
        {"id": f"p{n}", "critique": f"bad{n}", "revision": f"new{n}", "comparison": f"which{n}"} for n in range(3)
    ],
    "templates": {"comparison": "{conversation} {principle} (A) {a} (B) {b}", "turn": "{role} {content}"},
}


def tree() -> dict[str, Any]:
    engine = {"max_tokens": 256, "max_new_tokens": 40}
    training = {"training": {"sequences_per_step": 8, "held_out_share": 0.2, "tokens_per_micro_batch": 1024}}
    guided = {"data": {"path": "prompts.jsonl", "max_tokens": 32}, "constitution": "constitution.json"}
    return {
        "name": "line",
        "defaults": {"telemetry": {"wandb": "off"}},
        "stages": {
            "critique": {**guided, "generator": {"model": "start", **engine}, "rounds": 2},
            "sft": {
                "model": "start",
                **training,
                "data": {
                    "sources": {"ours": {"path": "${critique.rows}"}, "more": {"path": "more.jsonl"}},
                    "max_tokens": 256,
                },
            },
            "judge": {
                **guided,
                "generator": {"model": "${sft.model}", **engine},
                "judge": {"model": "start", **engine},
            },
            "reward": {"model": "${sft.model}", **training, "data": {"path": "${judge.rows}", "max_tokens": 256}},
            "ppo": {
                "policy": "${sft.model}",
                "reward": {"model": "${reward.model}"},
                "data": {"path": "prompts.jsonl", "max_tokens": 32},
                "rollout": {"prompts_per_update": 8, "max_new_tokens": 16},
                "ppo": {"updates": 2},
                "learner": {"tokens_per_micro_batch": 256},
                "roles": {"cpus": 0.25, "deadline_s": 300},
            },
            "evaluate": {
                "policy": {"model": "${ppo.policy}", **engine},
                "items": None,
                "answers": {"own": {"path": "prompts.jsonl", "rewards": {"learned": {"model": "${reward.model}"}}}},
            },
        },
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    tiny.write_judge(folder / "start")
    write_rows(folder / "prompts.jsonl", [{"prompt": "abcdefgh"[row % 8] * (1 + row // 8)} for row in range(24)])
    write_rows(folder / "more.jsonl", [{"prompt": "why", "completion": "because"}] * 8)
    (folder / "constitution.json").write_text(json.dumps(CONSTITUTION))
    (folder / "line.yaml").write_text(yaml.safe_dump(tree(), sort_keys=False))
    return folder


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(RLHF_RAY), "pipeline", "line.yaml", *arguments],
        cwd=folder,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def states(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: stage["state"] for name, stage in json.loads(done.stdout).items()}


@pytest.fixture(scope="module")
def first(folder: Path) -> subprocess.CompletedProcess[str]:
    return run(folder)


def test_every_stage_runs_on_what_the_ones_before_it_left(
    folder: Path, first: subprocess.CompletedProcess[str]
) -> None:
    assert states(first) == dict.fromkeys(STAGES, "done")
    results = folder / "runs/line"
    summaries = {stage: json.loads((results / stage / "summary.json").read_text()) for stage in STAGES}
    assert summaries["sft"]["rows"] + summaries["sft"]["rows_held_out"] == summaries["critique"]["revisions"] + 8
    assert summaries["reward"]["rows"] + summaries["reward"]["rows_held_out"] == summaries["judge"]["preferences"]
    assert summaries["critique"]["constitution_sha"] == summaries["judge"]["constitution_sha"]
    assert summaries["ppo"]["updates"] == 2
    assert summaries["evaluate"]["policy"] == summaries["ppo"]["policy"]
    assert summaries["evaluate"]["answers"]["own"]["responses"] == 24
    assert "✓ evaluate  done" in first.stderr


def test_the_same_command_again_keeps_everything_and_a_changed_key_runs_its_stage_alone(
    folder: Path, first: subprocess.CompletedProcess[str]
) -> None:
    assert states(run(folder)) == dict.fromkeys(STAGES, "kept")
    changed = run(folder, "stages.evaluate.answers.own.rewards={}")
    assert states(changed) == dict.fromkeys(STAGES, "kept") | {"evaluate": "done"}


def test_a_typing_mistake_in_the_last_stage_shows_before_the_first_one_runs(folder: Path) -> None:
    done = run(folder, "name=other", "stages.evaluate.polcy.model=x")
    assert done.returncode == 2
    assert "stage 'evaluate': unknown key 'polcy'; did you mean 'policy'" in done.stderr
    assert not (folder / "runs/other").exists()
