"""A Ray to run on: the cluster that an address names, or one started on this machine and ended with the run."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from rlhf_ray.errors import ResourceError
from rlhf_ray.runtime.environment import quiet_driver

ANSWER_WITHIN_S = 8.0


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

    try:
        context = ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=True, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ResourceError(f"Ray at '{options['address']}' cannot be used: {reason}") from None
    # Ray Train's helpers look for a cluster on their own and would join another one on this machine.
    os.environ["RAY_ADDRESS"] = context.address_info["gcs_address"]


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
