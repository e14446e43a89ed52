"""Against the real client: offline runs read back, and servers that refuse, vanish, or never were."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb_records import logged, of, records

from rlhf_ray.telemetry import wandb_client
from rlhf_ray.telemetry.tracker import Tracker

pytestmark = pytest.mark.real

KEY = "feedfacefeedfacefeedfacefeedfacefeedface"
NOBODY = "http://127.0.0.1:9"


def files_with(text: str, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def log_three(tracker: Tracker) -> None:
    for update in range(3):
        tracker.log(update, {"sft/loss": 1 / (update + 1), "lr/model": 1e-05, "sft/tokens": 1234567 + update})
        tracker.samples(update, [{"prompt": f"p{update}", "response": "ä\nb", "score": 0.1, "kl": None}])


def test_a_failed_offline_run_reads_back_as_what_metrics_jsonl_says(
    config_of: Any, capfd: pytest.CaptureFixture
) -> None:
    with pytest.raises(RuntimeError), Tracker(config_of("auto", seed=5), "sft") as tracker:
        log_three(tracker)
        tracker.summary({"loss": {"last": 0.25}})
        raise RuntimeError("the disk is on fire")

    folder = tracker.folder
    recorded = records(folder.path)
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert logged(recorded) == [{name: value for name, value in row.items() if name != "time"} for row in rows]

    [run] = of("run", recorded)
    assert (run["project"], run["display_name"], run["job_type"]) == ("rlhf-ray", "a-run", "sft")
    configuration = {name: value for name, value in run["config"]["update"].items() if name != "_wandb"}
    assert configuration == yaml.safe_load(folder.config.read_text())

    tables = [json.loads(path.read_text()) for path in folder.wandb.glob("offline-run-*/files/media/table/*.json")]
    assert {tuple(table["columns"]) for table in tables} == {("update", "prompt", "response", "score", "kl")}
    assert sorted(row for table in tables for row in table["data"]) == [
        [update, f"p{update}", "ä\nb", 0.1, None] for update in range(3)
    ]

    [alert] = of("alert", recorded)
    assert (alert["title"], alert["level"]) == ("sft 'a-run' failed", "ERROR")
    assert alert["text"] == "RuntimeError: the disk is on fire"
    assert of("exit", recorded)[-1]["exit_code"] == 1
    assert {"loss": {"last": 0.25}} in [summary["update"] for summary in of("summary", recorded)]
    assert "W&B: no API key, recording offline; send it later with: wandb sync" in capfd.readouterr().err


def test_a_killed_driver_leaves_a_whole_run_that_says_it_failed(config_of: Any) -> None:
    config = config_of("offline")
    code = """
import os, sys
from rlhf_ray.config.supervised import SFTConfig
from rlhf_ray.telemetry.tracker import Tracker
with Tracker(SFTConfig.model_validate_json(sys.argv[1]), "sft") as tracker:
    tracker.log(0, {"sft/loss": 2.0})
    print(tracker._wandb._process.pid, flush=True)
    os.kill(os.getpid(), 9)
"""
    command = [sys.executable, "-c", code, config.model_dump_json()]
    driver = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, timeout=60)
    assert driver.returncode == -signal.SIGKILL
    until(lambda: not alive(int(driver.stdout)))
    recorded = records(Path(config.output_dir) / config.name)
    assert logged(recorded) == [{"update": 0, "sft/loss": 2}]
    assert of("exit", recorded)[-1]["exit_code"] == 1


def test_a_server_that_nobody_answers_costs_one_line_and_the_key_is_nowhere(
    config_of: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", NOBODY)
    monkeypatch.setattr(wandb_client, "INIT_DEADLINE_S", 2.0)
    said = f"told {KEY} to a reward function"
    with pytest.raises(RuntimeError), Tracker(config_of("auto"), "sft") as tracker:
        log_three(tracker)
        tracker.alert("odd", said)
        tracker.summary({"model": said})
        assert KEY not in repr([vars(tracker), vars(tracker.folder), vars(tracker._wandb)])
        raise RuntimeError(said)
    output = capfd.readouterr()
    [line] = [line for line in output.err.splitlines() if line.startswith("W&B")]
    assert line.startswith("W&B: cannot go online (")
    assert "recording offline, send it later with: wandb sync" in line
    assert files_with(KEY, tracker.folder.path) == []
    assert KEY not in output.out + output.err

    recorded = records(tracker.folder.path)
    assert [row["update"] for row in logged(recorded)] == [0, 1, 2]
    assert [alert["text"] for alert in of("alert", recorded)] == [
        "told <redacted> to a reward function",
        "RuntimeError: told <redacted> to a reward function",
    ]


def test_a_server_that_falls_silent_does_not_hold_the_run(
    config_of: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, server: "Server"
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setattr(wandb_client, "FINISH_DEADLINE_S", 2.0)
    with Tracker(config_of("online"), "sft") as tracker:
        assert server.opened.wait(60), "the client never opened its run"
        for update in range(3):
            tracker.log(update, {"sft/loss": 0.5})
    assert f"W&B: {server.url}/e/p/runs/" in (said := capfd.readouterr().err)
    # W&B itself gives up after 2 s, or, where the machine is too busy for that, its process is cut off after 4.
    assert re.search(r"W&B: (not everything was sent within 2 s|cut off 4 s after)", said), said
    assert "wandb sync --include-online" in said
    recorded = records(tracker.folder.path, "run-*")
    assert [row["update"] for row in logged(recorded)] == [0, 1, 2]
    assert files_with(KEY, tracker.folder.path) == []


def test_a_server_that_falls_silent_in_a_request_does_not_hold_the_run(
    config_of: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, server: "Server"
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setattr(wandb_client, "FINISH_DEADLINE_S", 1.0)
    with Tracker(config_of("online"), "sft") as tracker:
        process = process_of(tracker)
        assert server.opened.wait(60), "the client never opened its run"
        tracker.alert("look", "the client's own timeout does not count while this is under way")
    assert process.returncode is not None
    assert "W&B: cut off 2 s after the run's end; metrics.jsonl has everything" in capfd.readouterr().err


def test_a_wandb_process_that_dies_costs_one_line(config_of: Any, capfd: pytest.CaptureFixture) -> None:
    with Tracker(config_of("offline"), "sft") as tracker:
        process = process_of(tracker)
        process.kill()
        process.wait()
        log_three(tracker)
    assert len(tracker.folder.metrics.read_text().splitlines()) == 3
    lines = [line for line in capfd.readouterr().err.splitlines() if "W&B: its process ended" in line]
    assert len(lines) == 1
    assert "exit code -9" in lines[0]


class Server:
    """Answers what opening a run asks, and nothing after."""

    def __init__(self) -> None:
        self.opened = opened = threading.Event()
        self.ending = ending = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                if opened.is_set() or b"UpsertBucket" not in body:
                    ending.wait()
                    return
                asked = json.loads(body)
                project = {"id": "UA==", "name": "p", "entity": {"id": "RQ==", "name": "e"}}
                name = asked["variables"]["name"]
                bucket = {"id": "QQ==", "name": name, "displayName": name, "config": "{}", "project": project}
                answer = {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
                body = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
                opened.set()

            def log_message(self, *words: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.ending.set()
    server.http.shutdown()
    server.http.server_close()


def process_of(tracker: Tracker) -> "subprocess.Popen[str]":
    assert tracker._wandb is not None
    assert tracker._wandb._process is not None
    return tracker._wandb._process


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()


def until(condition: Callable[[], bool], limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
