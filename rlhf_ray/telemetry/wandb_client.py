"""The driver's end of W&B: decides the mode, starts the W&B process, and survives it.

No call here waits for a network, except `close`, which has a deadline. None raises because W&B is broken.
"""

import json
import netrc
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import yaml

from rlhf_ray.config.common import StageConfig
from rlhf_ray.telemetry.progress import say
from rlhf_ray.telemetry.run_folder import RunFolder
from rlhf_ray.telemetry.secrets import redact, redact_values
from rlhf_ray.telemetry.wandb_process import CUT_OFF, Start

INIT_DEADLINE_S = 10.0
FINISH_DEADLINE_S = 10.0
"""W&B's time to send what is left after the run has ended; with requests under way it may take twice as long."""

Mode = Literal["online", "offline", "off"]


def mode(choice: Literal["auto", "online", "offline", "off"]) -> Mode:
    """`auto`: what WANDB_MODE says; without it, online when there is a key for the server, else offline."""
    if choice != "auto":
        return choice
    said: dict[str, Mode] = {"online": "online", "offline": "offline", "disabled": "off"}
    return said.get(os.environ.get("WANDB_MODE", "")) or ("online" if has_key() else "offline")


def has_key() -> bool:
    """Whether W&B would find credentials: its environment variables, or the server's entry in the netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    try:
        return netrc.netrc(os.environ.get("NETRC") or Path.home() / ".netrc").authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False  # no readable file, no key


class WandbClient:
    """One W&B run, written by a process of its own in `<run folder>/wandb`."""

    def __init__(self, config: StageConfig, stage: str, folder: RunFolder, mode: Literal["online", "offline"]) -> None:
        self._folder = folder.wandb
        self._noise = folder.wandb / "process.log"
        self._process = self._launch()
        self._start = Start(
            mode=mode,
            folder=str(folder.path),
            project=os.environ.get("WANDB_PROJECT") or "rlhf-ray",
            name=config.name,
            stage=stage,
            config=yaml.safe_load(folder.config.read_text(encoding="utf-8")),
            init_s=INIT_DEADLINE_S,
            finish_s=FINISH_DEADLINE_S,
        )
        self._send(self._start.message())
        if mode == "offline":
            why = "" if config.telemetry.wandb == "offline" else "no API key, "
            say(f"W&B: {why}recording offline; send it later with: wandb sync {self._folder}/offline-run-*")

    def log(self, update: int, metrics: Mapping[str, float]) -> None:
        self._send({"log": {"update": update, **metrics}})

    def samples(self, update: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table `samples` of these rows, its first column the update."""
        names = list(dict.fromkeys(name for row in rows for name in row))
        cells = [[update, *(row.get(name) for name in names)] for row in rows]
        self._send({"samples": {"update": update, "columns": ["update", *names], "rows": cells}})

    def alert(self, title: str, text: str, level: Literal["ERROR", "WARN"]) -> None:
        self._send({"alert": {"title": redact(title), "text": redact(text), "level": level}})

    def summary(self, summary: Mapping[str, Any]) -> None:
        self._send({"summary": redact_values(dict(summary))})

    def close(self, exit_code: int) -> None:
        """Waits at most a little over twice FINISH_DEADLINE_S. Safe to call twice."""
        process = self._process
        if process is None:
            return
        self._send({"finish": exit_code})
        self._process = None
        try:
            process.communicate(timeout=self._start.cut_off_s + 5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.returncode == CUT_OFF:
            say(
                f"W&B: cut off {self._start.cut_off_s:g} s after the run's end; metrics.jsonl has everything, and what "
                f"W&B wrote to disk goes with: wandb sync --include-online {self._folder}/*run-*"
            )
        elif process.returncode != 0:
            self._say_it_ended(process)

    def _launch(self) -> "subprocess.Popen[str] | None":
        self._folder.mkdir(exist_ok=True)
        package_root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
        # An offline run is complete only with its staged tables: they belong in the run folder, not in the home.
        environment = {"WANDB_DATA_DIR": str(self._folder), **os.environ, "PYTHONPATH": path}
        with self._noise.open("w") as noise:
            return subprocess.Popen(
                [sys.executable, "-m", "rlhf_ray.telemetry.wandb_process"],
                stdin=subprocess.PIPE,
                stdout=2,
                stderr=noise,
                text=True,
                env=environment,
                start_new_session=True,  # Ctrl-C is the run's to answer; the run then ends this process
            )

    def _send(self, message: Mapping[str, Any]) -> None:
        if self._process is None:
            return
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            process, self._process = self._process, None
            process.wait(timeout=5)
            self._say_it_ended(process)

    def _say_it_ended(self, process: "subprocess.Popen[str]") -> None:
        say(f"W&B: its process ended (exit code {process.returncode}, see {self._noise}); the run goes on without")
