"""A real head node of a Ray cluster on this machine, reached as a person reaches one: by its dashboard's address.

It is ended by its own process group: `ray stop` would end every Ray on the machine.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rlhf_ray.errors import ResourceError
from rlhf_ray.runtime.submit import check_answers

BIN = Path(sys.executable).parent
UP_WITHIN_S = 90


@contextmanager
def head_node(cpus: int, environment: dict[str, str]) -> Iterator[str]:
    """The dashboard's address, http://127.0.0.1:PORT. `environment` is the head's whole environment, and its jobs'."""
    # Ray's sockets lie below its folder, and their paths have to be short.
    folder = Path(tempfile.mkdtemp(prefix="rr", dir="/tmp"))
    dashboard = free_port()
    options = {
        "node-ip-address": "127.0.0.1",
        "port": free_port(),
        "include-dashboard": "true",
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": free_port(),
        "metrics-export-port": free_port(),
        "temp-dir": folder,
        "num-cpus": cpus,
        "object-store-memory": 100_000_000,
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    # A test run that is killed comes to no `finally`; then the kernel ends the head, and the head its processes.
    tied = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []
    line = [*tied, BIN / "ray", "start", "--head", "--disable-usage-stats", "--block", *flags]
    log = folder / "log"
    with log.open("wb") as out:
        head = subprocess.Popen(line, stdout=out, stderr=out, env=environment, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{dashboard}"
        _wait_for(address, head, log)
        yield address
    finally:
        head.terminate()
        with suppress(subprocess.TimeoutExpired):
            head.wait(timeout=30)
        with suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)
        head.wait(timeout=10)
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _wait_for(address: str, head: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + UP_WITHIN_S
    while time.monotonic() < deadline and head.poll() is None:
        try:
            return check_answers(address)
        except ResourceError:
            time.sleep(0.3)
    raise AssertionError(f"no head node: {log.read_text()}")
