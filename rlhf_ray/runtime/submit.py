"""A run as a Ray job: uploads a directory, starts `rlhf-ray STAGE CONFIG` on the cluster, follows its log.

The job's success is the cluster's word about it, never the end of a log: only a job that Ray says succeeded gives 0.
"""

import asyncio
import os
import shlex
from collections.abc import AsyncIterator
from http.client import HTTPException
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING
from urllib.error import HTTPError
from urllib.request import urlopen

from rlhf_ray.errors import ConfigError, ResourceError, StopRequested
from rlhf_ray.runtime.environment import job_environment
from rlhf_ray.telemetry.secrets import redact

if TYPE_CHECKING:
    from ray.job_submission import JobStatus, JobSubmissionClient

EXCLUDES = ["runs/", "outputs/", "checkpoints/", "wandb/", ".venv/", ".git/", "__pycache__/", "*.pyc"]
"""Left out of the upload, as .gitignore's entries are: models and data belong on a file system that all nodes share."""

MOST_NODES = 10_000
"""Ray tells no more at once."""
ANSWER_WITHIN_S = 8.0
SILENCE_S = 30.0
"""How long the log may be silent before the cluster is asked whether it is still there."""
ENDING_S = 30.0
"""How long a job whose log has ended may take to be called finished."""


def submit(config: Path, stage: str, overrides: list[str], address: str, working_dir: Path) -> int:
    """Exit code of the job: 0 only if it succeeded.

    Raises ConfigError for a configuration outside `working_dir`, which the upload would lack, and for a secret among
    `overrides`; ResourceError within ten seconds when nobody answers at `address` (http://...), and when the cluster
    goes away or refuses.
    """
    for override in overrides:
        if redact(override) != override:
            raise ConfigError(
                f"override '{redact(override)}': holds a secret, which Ray would show on its dashboard and in `ps`; "
                "put it into the environment of the nodes"
            )
    return submit_command(["rlhf-ray", stage, _inside(config, working_dir), *overrides], address, working_dir)


def submit_command(command: list[str], address: str, working_dir: Path, who: str = "") -> int:
    """As `submit`, for any command; paths in it that are absolute must lie where all nodes see them.

    `who` stands before every line, for where several jobs are followed at once.
    """
    entrypoint = shlex.join(command)
    check_answers(address)
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray prefers its variables, RAY_ADDRESS too, to its argument
    from aiohttp import ClientError
    from ray.exceptions import RayError
    from ray.job_submission import JobStatus, JobSubmissionClient

    environment = {**job_environment(), "working_dir": str(working_dir), "excludes": EXCLUDES}
    try:
        client = JobSubmissionClient(address)
        job = client.submit_job(entrypoint=entrypoint, runtime_env=environment)
    except (RuntimeError, ValueError, OSError, RayError) as error:
        raise ResourceError(f"the Ray cluster at {address} did not take the job: {error}") from None
    stop = f"ray job stop --address {address} {job}"
    print(f"{who}job {job}: {redact(entrypoint)}\n{who}to stop it: {stop}", flush=True)
    try:
        status = asyncio.run(_follow(client, job, address, who))
        message = client.get_job_info(job).message or ""
    except KeyboardInterrupt:
        raise StopRequested(f"no longer following; job {job} runs on. To stop it: {stop}") from None
    except (RuntimeError, OSError, RayError, ClientError) as error:
        raise ResourceError(f"lost the Ray cluster at {address}: {error}. Job {job} may run on: {stop}") from None
    succeeded = status == JobStatus.SUCCEEDED
    why = message.partition(", last available logs")[0]  # the log has been printed
    print(f"{who}job {job}: {status}" if succeeded else f"{who}job {job}: {status}: {why}")
    return 0 if succeeded else 1


def machines(address: str) -> list[dict[str, float]]:
    """Resources of every node of the cluster at `address`, whoever holds them. Raises ResourceError."""
    check_answers(address)
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    from ray.exceptions import RayError
    from ray.util.state import list_nodes
    from ray.util.state.exception import RayStateApiException

    try:
        nodes = list_nodes(address, filters=[("state", "=", "ALIVE")], limit=MOST_NODES)
    except (RayStateApiException, RayError, RuntimeError, OSError) as error:
        raise ResourceError(f"the Ray cluster at {address} does not say what machines it has: {error}") from None
    return [dict(node.resources_total) for node in nodes]


def check_answers(address: str) -> None:
    """Raises ResourceError when no server answers at `address` in time; Ray itself would wait without end."""
    if not address.startswith(("http://", "https://")):
        raise ResourceError(f"address '{address}': expected the cluster's dashboard, such as http://HOST:8265")
    try:
        with urlopen(f"{address.rstrip('/')}/api/version", timeout=ANSWER_WITHIN_S):
            return
    except HTTPError:
        return  # somebody is there; what Ray's own client makes of the refusal says more
    except (OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ResourceError(
            f"nobody answers at {address}: {reason}. Is the cluster up (`ray status` on its head), and its dashboard's "
            f"port reachable from here (`ssh -L`, `kubectl port-forward`)?"
        ) from None


def _inside(config: Path, working_dir: Path) -> str:
    try:
        return config.resolve().relative_to(working_dir.resolve()).as_posix()
    except ValueError:
        raise ConfigError(
            f"{config}: lies outside {working_dir}, the directory that is uploaded; submit from a directory above it"
        ) from None


async def _follow(client: "JobSubmissionClient", job: str, address: str, who: str = "") -> "JobStatus":
    """Prints the log as it grows; the job's final status. A connection that breaks is taken up again."""
    from aiohttp import ClientError

    printed = 0
    while True:
        seen = 0
        try:
            async for text in _unless_gone(client.tail_job_logs(job), address):
                print(indent(text[max(0, printed - seen) :], who), end="", flush=True)
                seen += len(text)
                printed = max(printed, seen)
        except (RuntimeError, OSError, ClientError):  # RuntimeError: how Ray's client reports a broken connection
            await asyncio.to_thread(check_answers, address)
        status = await _final_status(client, job)
        if status is not None:
            return status


async def _unless_gone(log: AsyncIterator[str], address: str) -> AsyncIterator[str]:
    """`log`, with a look at the cluster at every long silence: a host that vanished never closes a connection."""
    while True:
        following = asyncio.ensure_future(anext(log))
        while not (await asyncio.wait({following}, timeout=SILENCE_S))[0]:
            await asyncio.to_thread(check_answers, address)
        try:
            yield following.result()
        except StopAsyncIteration:
            return


async def _final_status(client: "JobSubmissionClient", job: str) -> "JobStatus | None":
    """None: the job still runs."""
    deadline = asyncio.get_running_loop().time() + ENDING_S
    while asyncio.get_running_loop().time() < deadline:
        status = await asyncio.to_thread(client.get_job_status, job)
        if status.is_terminal():
            return status
        await asyncio.sleep(0.5)
    return None
