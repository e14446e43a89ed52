"""A Ray to run on: the cluster that an address names, or one started on this machine and ended with the run.

Whoever speaks to a Ray can run any code as its owner. One started here has no dashboard and asks for a token, which no
other user of the machine may read; a cluster's token is the person's to give.
"""

import logging
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rlhf_ray.errors import ResourceError
from rlhf_ray.runtime.environment import quiet_driver

ANSWER_WITHIN_S = 8.0
TOKEN_REMEDY = (
    "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the cluster's token; on its head that is "
    "~/.ray/auth_token"
)


@contextmanager
def connect(address: str | None = None, cpus: float | None = None) -> Iterator[None]:
    """Ray is up within it. A session that is up already is used and left as it is.

    `address` (or RAY_ADDRESS, which Ray sets inside a job) names a cluster; without one, Ray starts here with `cpus`
    or all cores. Raises ResourceError within seconds when nobody answers.
    """
    quiet_driver()
    import ray

    if ray.is_initialized():
        yield
        return
    before = os.environ.get("RAY_ADDRESS")
    address = address or before
    if address and address != "local":
        _check_answers(address)
        _start(address=address)
    else:
        _keep_token()
        _start(address="local", num_cpus=cpus, include_dashboard=False)
    try:
        yield
    finally:
        ray.shutdown()
        if before is None:
            os.environ.pop("RAY_ADDRESS", None)
        else:
            os.environ["RAY_ADDRESS"] = before


def _start(**options: object) -> None:
    import ray
    from ray.exceptions import AuthenticationError

    try:
        context = ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=True, **options)
    except AuthenticationError as error:
        raise ResourceError(f"Ray at '{options['address']}': {error.message}. {TOKEN_REMEDY}") from None
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        # Of a token that is missing or wrong Ray only says that it cannot connect.
        hint = f". Does it ask for a token? {TOKEN_REMEDY}" if isinstance(error, ConnectionError) else ""
        raise ResourceError(f"Ray at '{options['address']}' cannot be used: {reason}{hint}") from None
    # Ray Train's helpers look for a cluster on their own and would join another one on this machine.
    os.environ["RAY_ADDRESS"] = context.address_info["gcs_address"]


def _keep_token() -> None:
    """A token where Ray looks for one, unless the person gave one or said RAY_AUTH_MODE=disabled. Ray would make the
    same file, for everybody to read."""
    given = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if given or os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return
    file = Path.home() / ".ray" / "auth_token"
    aside = file.with_name(f".auth_token.{os.getpid()}")
    try:
        file.parent.mkdir(mode=0o700, exist_ok=True)
        if not file.exists():
            aside.touch(0o600)
            aside.write_text(secrets.token_hex(32))
            with suppress(FileExistsError):  # another run was faster: its token is everybody's
                os.link(aside, file)
            aside.unlink()
        file.chmod(0o600)
    except OSError as error:
        raise ResourceError(
            f"{error.filename or file}: Ray's token cannot be kept there: {error.strerror or error}. Put one into a "
            "file elsewhere that you alone can read, and set RAY_AUTH_TOKEN_PATH to it"
        ) from None


def _check_answers(address: str) -> None:
    """Ray itself tries an address that is dead for a minute before it says so."""
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=ANSWER_WITHIN_S):
            return
    except (OSError, ValueError) as error:
        raise ResourceError(
            f"nobody answers at Ray address '{address}': {error}. Start a cluster with `ray start --head`, correct the "
            "address, or leave it out to run on this machine"
        ) from None
