"""PPO as Ray jobs, on a real cluster of one head node: what a person types, and what they find afterwards."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import tiny
import yaml
from head_node import BIN, head_node

from rlhf_ray.demo.world import World

SECRET = "never-on-the-dashboard-0123456789"
WITHIN_S = 120


class Cluster(NamedTuple):
    address: str
    environment: dict[str, str]
    """A person's shell: the cluster's token, the virtual environment's commands, and a W&B key."""
    project: Path
    """The directory that is uploaded. Models and data lie elsewhere, as on storage that all nodes share."""
    shared: Path

    def command(self, *line: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(part) for part in line],
            cwd=self.project,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=WITHIN_S,
            check=False,
        )

    def job(self, name: str) -> dict[str, Any]:
        """What the dashboard tells about a job."""
        return self._ask(f"api/jobs/{name}")

    def log(self, name: str) -> str:
        return self._ask(f"api/jobs/{name}/logs")["logs"]

    def is_over(self, name: str) -> bool:
        return self.job(name)["status"] in ("FAILED", "SUCCEEDED", "STOPPED")

    def wait_for_no_actors(self) -> None:
        """Killed actors are gone a moment after the job is over, its supervisor among them."""
        wait_until(lambda: not self.actors(), 30)

    def actors(self) -> list[str]:
        """Classes of the actors that live or are about to."""
        actors = self._ask("api/v0/actors")["data"]["result"]["result"]
        return [actor["class_name"] for actor in actors if actor["state"] != "DEAD"]

    def _ask(self, path: str) -> dict[str, Any]:
        token = Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        answer = httpx.get(f"{self.address}/{path}", headers={"Authorization": f"Bearer {token}"}, timeout=30)
        return answer.raise_for_status().json()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    shared = tmp_path_factory.mktemp("shared")
    # Token authentication is on wherever a local Ray has left a token: said outright, head and clients agree.
    (shared / "token").write_text("a" * 64)
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "WANDB_"))}
    mine |= {
        "PATH": f"{BIN}:{mine['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(shared / "token"),
    }
    project = tmp_path_factory.mktemp("project")
    _write_project(project, shared)
    with head_node(cpus=2, environment=mine) as address:
        yield Cluster(address, mine | {"WANDB_API_KEY": SECRET}, project, shared)


def _write_project(project: Path, shared: Path) -> None:
    """The demo's prompts, tiny models, and one configuration: configs/ppo/tiny.yaml."""
    rows = World(0).prompts(32)
    (shared / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "name": "tiny",
        "output_dir": str(shared / "runs"),
        "policy": tiny.write_policy(shared / "policy"),
        "reward": {"model": tiny.write_reward_model(shared / "reward")},
        "data": {"path": str(shared / "prompts.jsonl"), "max_tokens": 96},
        "rollout": {"prompts_per_update": 8, "max_new_tokens": 8},
        "ppo": {"updates": 2, "epochs": 1},
        "roles": {"cpus": 0.5, "deadline_s": 100},
        "telemetry": {"wandb": "off"},
    }
    (project / "configs/ppo").mkdir(parents=True)
    (project / "configs/ppo/tiny.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.real
def test_a_submitted_run_is_followed_to_its_end_and_leaves_its_results(cluster: Cluster) -> None:
    ran = cluster.command("rlhf-ray", "submit", "configs/ppo/tiny.yaml", "name=whole", "--address", cluster.address)
    assert ran.returncode == 0, ran.stdout + ran.stderr

    job = ran.stdout.split()[1].rstrip(":")
    assert ran.stdout.splitlines()[-1] == f"job {job}: SUCCEEDED"
    assert "PPO 2/2" in ran.stdout  # the driver's own log, followed
    told = cluster.job(job)
    assert told["status"] == "SUCCEEDED"
    assert told["entrypoint"] == "rlhf-ray ppo configs/ppo/tiny.yaml name=whole"
    assert SECRET not in json.dumps(told)

    folder = cluster.shared / "runs/whole"
    assert [row["update"] for row in rows(folder / "metrics.jsonl")] == [0, 1]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["updates"] == 2
    assert (Path(summary["policy"]) / "model.safetensors").is_file()
    assert summary["policy"] == str(folder / "checkpoints/update_000002/policy")
    cluster.wait_for_no_actors()


@pytest.mark.real
def test_a_job_of_rays_own_command_is_stopped_half_way_and_saves_what_it_has(cluster: Cluster) -> None:
    job, folder = "half-way", cluster.shared / "runs/half-way"
    longer = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}})
    line = ["ray", "job", "submit", "--address", cluster.address, "--working-dir", ".", "--no-wait"]
    line += ["--submission-id", job, "--runtime-env-json", longer, "--"]
    # With W&B's process beside it, which the stop signal reaches as well.
    line += ["rlhf-ray", "ppo", "configs/ppo/tiny.yaml", f"name={job}", "ppo.updates=100000", "telemetry.wandb=auto"]
    submitted = cluster.command(*line)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    wait_until(lambda: rows(folder / "metrics.jsonl") or cluster.is_over(job))
    assert {"JobSupervisor", "RolloutEngine", "Reference", "Rewards", "Learner"} <= set(cluster.actors())

    stopped = cluster.command("ray", "job", "stop", "--address", cluster.address, job)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    log = cluster.log(job)
    assert cluster.job(job)["status"] == "STOPPED", log
    saved = folder / "checkpoints/stopped/policy"
    assert f"error: stopped by SIGTERM; the policy as it was is saved in '{saved}'" in log
    assert "Traceback" not in log
    assert (saved / "model.safetensors").is_file()
    assert 0 < len(rows(folder / "metrics.jsonl")) < 100000
    assert not (folder / "summary.json").exists()
    cluster.wait_for_no_actors()


@pytest.mark.real
def test_a_job_that_cannot_begin_fails_with_one_message(cluster: Cluster) -> None:
    line = ["rlhf-ray", "submit", "configs/ppo/tiny.yaml", "name=bad", "policy=/no/model", "--address", cluster.address]
    ran = cluster.command(*line)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    messages = [text for text in ran.stdout.splitlines() if text.startswith("error:")]
    assert len(messages) == 1
    assert "/no/model" in messages[0]
    assert "Traceback" not in ran.stdout
    assert "FAILED" in ran.stdout.splitlines()[-1]


@pytest.mark.real
def test_results_that_would_be_deleted_with_the_jobs_directory_are_refused_inside_the_job(cluster: Cluster) -> None:
    line = ["ray", "job", "submit", "--address", cluster.address, "--working-dir", ".", "--"]
    ran = cluster.command(*line, "rlhf-ray", "ppo", "configs/ppo/tiny.yaml", "output_dir=runs")
    assert ran.returncode != 0
    assert "output_dir 'runs' is relative" in ran.stdout + ran.stderr


@pytest.mark.real
def test_each_stage_of_a_pipeline_is_a_job_and_finished_ones_are_not_submitted_again(cluster: Cluster) -> None:
    messages = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "because"}]
    (cluster.shared / "talk.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 16)
    stage = {"model": str(cluster.shared / "policy"), "data": {"path": str(cluster.shared / "talk.jsonl")}}
    tree = {
        "name": "line",
        "output_dir": str(cluster.shared / "runs"),
        "defaults": {"telemetry": {"wandb": "off"}, "deadline_s": 100},
        "stages": {"sft": stage, "again": {"stage": "sft", **stage, "model": "${sft.model}"}},
    }
    (cluster.project / "line.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    line = ["rlhf-ray", "pipeline", "line.yaml", "--address", cluster.address, "--until"]

    ran = cluster.command(*line, "sft")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stderr.count("SUCCEEDED") == 1
    ran = cluster.command(*line, "again")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stderr.count("SUCCEEDED") == 1, "the first is finished, the second is a job"
    folder = cluster.shared / "runs/line"
    models = [json.loads((folder / name / "summary.json").read_text())["model"] for name in ("sft", "again")]
    assert models[0] != models[1]
    assert "/line/sft-" in models[0]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_until(is_so: Callable[[], Any], within_s: float = WITHIN_S) -> None:
    deadline = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)
