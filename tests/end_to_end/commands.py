"""The command line as a person has it: a directory with models, prompts and `run.yaml`, and what a command leaves."""

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import tiny
import yaml

RLHF_RAY = Path(sys.executable).with_name("rlhf-ray")
UPDATES, PROMPTS, SAMPLES = 3, 8, 2
TIMES = ("time", "tokens/per_s", "weights/publish_s")
"""Metrics that differ from run to run, besides those that begin with `time/` or `busy/`."""


class Project:
    """A person's directory. Commands run in it, and nothing of whoever runs the tests reaches them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.policy = tiny.write_policy(folder / "policy")
        self.reward = tiny.write_reward_model(folder / "reward")
        rows = [{"prompt": "abcdefgh"[row % 8] * (1 + row % 5)} for row in range(40)]
        write_rows(folder / "prompts.jsonl", [*rows, {"prompt": "z" * 100}])
        (folder / "run.yaml").write_text(yaml.safe_dump(self.tree()))

    def tree(self) -> dict[str, Any]:
        """Paths are relative, as people write them. Of 41 prompts one is longer than `max_tokens`."""
        return {
            "name": "run",
            "policy": "policy",
            "reward": {"model": "reward"},
            "data": {"path": "prompts.jsonl", "max_tokens": 32, "max_bad_share": 0.05},
            "rollout": {"prompts_per_update": PROMPTS, "samples_per_prompt": SAMPLES, "max_new_tokens": 16},
            "ppo": {"updates": UPDATES, "epochs": 2, "minibatches": 2},
            # A constant rate: how many updates were planned makes no difference to the first of them.
            "learner": {
                "tokens_per_micro_batch": 256,
                "optimizer": {"learning_rate": 1e-3, "schedule": "constant", "warmup_share": 0.0},
            },
            "roles": {"cpus": 0.25, "deadline_s": 120},
            "checkpoint": {"every": 1},
            "telemetry": {"wandb": "off"},
        }

    def run(self, *overrides: str, within_s: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
        """`rlhf-ray ppo run.yaml ...` to its end, which must come in time."""
        return subprocess.run(
            self._line(overrides),
            cwd=self.folder,
            env=clean_environment() | environment,
            capture_output=True,
            text=True,
            timeout=within_s,
            check=False,
        )

    def start(self, *overrides: str) -> "Running":
        return Running(self._line(overrides), self.folder)

    def results(self, name: str) -> Path:
        return self.folder / "runs" / name

    def metrics(self, name: str) -> list[dict[str, Any]]:
        return rows(self.results(name) / "metrics.jsonl")

    def _line(self, overrides: tuple[str, ...]) -> list[str]:
        return [str(RLHF_RAY), "ppo", "run.yaml", *overrides]


class Running:
    """A command under way, in a process group of its own as a shell gives it one."""

    def __init__(self, line: list[str], folder: Path) -> None:
        self.mark = uuid.uuid4().hex
        self.out, self.err = folder / f"{self.mark}.out", folder / f"{self.mark}.err"
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                line,
                cwd=folder,
                env=clean_environment() | {"STARTED_BY_TEST": self.mark},
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def wait_until(self, condition: Callable[[], Any], within_s: float = 240) -> Any:
        """What `condition` gives, once it is true. Fails when the command ends before."""
        deadline = time.monotonic() + within_s
        while not (found := condition()):
            assert self.process.poll() is None, f"ended too early:\n{self.err.read_text()}"
            assert time.monotonic() < deadline, f"waited in vain:\n{self.err.read_text()}"
            time.sleep(0.1)
        return found

    def processes(self) -> list[psutil.Process]:
        """Every process that descends from the command, wherever it has gone: environments are inherited."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("STARTED_BY_TEST") == self.mark:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def actor(self, kind: str) -> psutil.Process | None:
        return next((one for one in self.processes() if _title(one).startswith(f"ray::{kind}")), None)

    def end(self, within_s: float = 60) -> int:
        """Exit code."""
        return self.process.wait(timeout=within_s)

    def leftovers(self, within_s: float = 10) -> list[str]:
        """What still runs a little after the end."""
        deadline = time.monotonic() + within_s
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return [_title(process) for process in left]

    def kill(self) -> None:
        """However a test ended, its processes end with it."""
        for process in self.processes():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait(timeout=30)


def clean_environment() -> dict[str, str]:
    """Without what the tests or their caller told Ray, W&B and Python."""
    ours = ("RAY_", "WANDB_", "PYTHONDONTWRITEBYTECODE", "PYTEST_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return kept | {"NETRC": "/nonexistent", "HF_HUB_OFFLINE": "1"}


def message(ran: subprocess.CompletedProcess[str]) -> str:
    """The one message of a run that was refused: on stderr, on stdout nothing, and no traceback."""
    return only_message(ran.stdout, ran.stderr)


def only_message(out: str, err: str) -> str:
    assert out == ""
    assert "Traceback" not in err
    told = [line for line in err.splitlines() if not is_progress(line)]
    assert told and told[0].startswith("error: "), err
    assert not any(line.startswith("error: ") for line in told[1:]), err
    return "\n".join(told)


def is_progress(line: str) -> bool:
    """`14:03:12  PPO 3/40  reward 1.25 ...`"""
    return line[2:3] == ":" and "  PPO " in line


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def write_rows(file: Path, content: list[Any]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in content))


def deterministic(line: dict[str, Any]) -> dict[str, Any]:
    """Metrics that the same seed must repeat to the bit."""
    timed = ("time/", "busy/")
    return {name: value for name, value in line.items() if name not in TIMES and not name.startswith(timed)}


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()) or process.name()
    except psutil.NoSuchProcess:
        return ""
