import asyncio
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from rlhf_ray.errors import ConfigError, ResourceError
from rlhf_ray.runtime import submit as submitting
from rlhf_ray.runtime.submit import check_answers, machines, submit

# Stands for the real command on the head node's PATH, so that these tests are about jobs and not about training.
STAND_IN = """#!/bin/sh
for argument in "$@"; do echo "argument <$argument>"; done
cat "$2"; find . -type f
case "$3" in
fail) exit 7 ;;
wait) trap 'sleep 5; echo saved; exit 130' TERM; echo waiting; while :; do sleep 0.1; done ;;
esac
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A directory to upload."""
    for name in ("configs/ppo", "runs/old", "checkpoints", ".git"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").touch()
    (tmp_path / "configs/ppo/my run.yaml").write_text("name: from-the-upload\n")
    return tmp_path


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The dashboard's address of a real head node."""
    home = Path(tmp_path_factory.mktemp("head"))
    (home / "rlhf-ray").write_text(STAND_IN)
    (home / "rlhf-ray").chmod(0o755)
    # Ray's sockets lie below its folder, and their paths have to be short.
    folder = Path("/tmp") / f"rr{os.getpid()}"
    patch = pytest.MonkeyPatch()
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        patch.delenv(name, raising=False)
    dashboard = free_port()
    options = {
        "port": free_port(),
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": free_port(),
        "metrics-export-port": free_port(),
        "temp-dir": folder,
        "num-cpus": 1,
        "object-store-memory": 100_000_000,
    }
    ray = Path(sys.executable).parent / "ray"
    line = [ray, "start", "--head", "--disable-usage-stats", "--block", *(f"--{k}={v}" for k, v in options.items())]
    path = f"{home}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    with (home / "log").open("wb") as log:
        head = subprocess.Popen(line, stdout=log, stderr=log, env=os.environ | {"PATH": path})
    try:
        _wait_for(f"http://127.0.0.1:{dashboard}", head, home / "log")
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        head.terminate()
        head.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)
        patch.undo()


def _wait_for(address: str, head: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and head.poll() is None:
        try:
            return check_answers(address)
        except ResourceError:
            time.sleep(0.3)
    raise AssertionError(f"no head node: {log.read_text()}")


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "restored afterwards")


@pytest.mark.real
def test_a_job_runs_the_command_on_the_upload_and_its_log_is_followed(
    cluster: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = project / "configs/ppo/my run.yaml"
    assert submit(config, "ppo", ["data.path=a b; echo $HOME"], cluster, project) == 0
    said = capsys.readouterr().out.splitlines()
    arguments = [line for line in said if line.startswith("argument")]
    assert arguments == [
        "argument <ppo>",
        "argument <configs/ppo/my run.yaml>",
        "argument <data.path=a b; echo $HOME>",  # quoted: one argument, nothing run or expanded
    ]
    assert "name: from-the-upload" in said
    assert {line for line in said if line.startswith("./")} == {"./configs/ppo/file", "./configs/ppo/my run.yaml"}
    job = said[0].split()[1].rstrip(":")
    assert said[1] == f"to stop it: ray job stop --address {cluster} {job}"
    assert said[-1] == f"job {job}: SUCCEEDED"


@pytest.mark.real
def test_a_job_that_fails_gives_a_code_that_is_not_zero(
    cluster: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(project / "configs/ppo/my run.yaml", "ppo", ["fail"], cluster, project) == 1
    assert "FAILED" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.real
def test_a_job_that_somebody_stops_may_save_first_and_gives_a_code_that_is_not_zero(
    cluster: str, project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.job_submission import JobSubmissionClient

    seen: list[str] = []
    submit_job = JobSubmissionClient.submit_job

    def noted(self: JobSubmissionClient, **options: object) -> str:
        seen.append(submit_job(self, **options))
        return seen[-1]

    monkeypatch.setattr(JobSubmissionClient, "submit_job", noted)

    def stop() -> None:
        client = JobSubmissionClient(cluster)
        while not seen or "waiting" not in client.get_job_logs(seen[0]):
            time.sleep(0.3)
        client.stop_job(seen[0])

    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", cluster)
    stopper = threading.Thread(target=stop, daemon=True)
    stopper.start()
    assert submit(project / "configs/ppo/my run.yaml", "ppo", ["wait"], cluster, project) == 1
    said = capsys.readouterr().out.splitlines()
    assert "saved" in said  # five seconds after the signal: Ray's own grace is three
    assert "STOPPED" in said[-1]


@pytest.mark.real
def test_a_clusters_machines_are_known_without_being_part_of_it(cluster: str) -> None:
    assert [machine["CPU"] for machine in machines(cluster)] == [1.0]


def test_a_configuration_that_would_not_be_uploaded_is_refused(project: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lies outside"):
        submit(tmp_path.parent / "else.yaml", "ppo", [], "http://127.0.0.1:1", project)


@pytest.mark.parametrize("address", ["127.0.0.1:8265", "ray://127.0.0.1:10001", "auto"])
def test_an_address_that_is_not_a_dashboards_is_refused(address: str) -> None:
    with pytest.raises(ResourceError, match="expected the cluster's dashboard"):
        check_answers(address)


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "http://no-such-host.invalid:8265", "http://127.0.0.1:x"])
def test_an_address_nobody_answers_at_is_named(address: str) -> None:
    with pytest.raises(ResourceError, match=f"nobody answers at {address}"):
        check_answers(address)


def test_a_server_that_takes_the_connection_and_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submitting, "ANSWER_WITHIN_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(ResourceError, match="nobody answers"):
        check_answers(f"http://127.0.0.1:{server.getsockname()[1]}")


class _Status(str):
    def is_terminal(self) -> bool:
        return self != "RUNNING"


class _BrokenOnce:
    """A job server whose first connection breaks in the middle of the log."""

    def __init__(self) -> None:
        self.connections = 0

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        self.connections += 1
        yield "one\n"
        if self.connections == 1:
            raise RuntimeError("WebSocket connection closed unexpectedly")
        yield "two\n"

    def get_job_status(self, job: str) -> _Status:
        return _Status("RUNNING" if self.connections == 1 else "SUCCEEDED")


def test_a_connection_that_breaks_is_taken_up_again_without_lines_twice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(submitting, "ENDING_S", 0.01)
    monkeypatch.setattr(submitting, "check_answers", lambda address: None)
    assert asyncio.run(submitting._follow(_BrokenOnce(), "job", "http://h")) == "SUCCEEDED"  # type: ignore[arg-type]
    assert capsys.readouterr().out == "one\ntwo\n"


def test_where_several_jobs_are_followed_each_line_says_whose_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(submitting, "ENDING_S", 0.01)
    monkeypatch.setattr(submitting, "check_answers", lambda address: None)
    asyncio.run(submitting._follow(_BrokenOnce(), "job", "http://h", "sft: "))  # type: ignore[arg-type]
    assert capsys.readouterr().out == "sft: one\nsft: two\n"


class _Vanished(_BrokenOnce):
    """A job server that keeps the connection open and never says anything again."""

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        yield "one\n"
        await asyncio.sleep(3600)


def test_a_cluster_that_vanishes_in_silence_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submitting, "SILENCE_S", 0.01)
    with pytest.raises(ResourceError, match="nobody answers"):
        asyncio.run(submitting._follow(_Vanished(), "job", "http://127.0.0.1:9"))  # type: ignore[arg-type]
