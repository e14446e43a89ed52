"""A gloo group of the learner (rank 0) and all engine workers, apart from torch.distributed's global state."""

from datetime import timedelta
from typing import Any

import torch.distributed as dist

from rlhf_ray.errors import DeadlineError


def rendezvous(address: str, world_size: int, deadline: timedelta) -> Any:
    """The store where the group meets, on a free port (`.port`) of this machine."""
    return dist.TCPStore(address, 0, world_size, is_master=True, wait_for_workers=False, timeout=deadline)


def join(address: str, port: int, rank: int, world_size: int, deadline: timedelta) -> Any:
    """Enters the group from elsewhere. Returns when all `world_size` members are in, else raises DeadlineError."""
    store = dist.TCPStore(address, port, world_size, is_master=False, wait_for_workers=False, timeout=deadline)
    return enter(store, rank, world_size, deadline)


def enter(store: Any, rank: int, world_size: int, deadline: timedelta) -> Any:
    """As `join`, by a store that is at hand. Broadcasts of the group have the same deadline."""
    try:
        return dist.ProcessGroupGloo(dist.PrefixStore("weights", store), rank, world_size, deadline)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise DeadlineError(
            f"rank {rank} of the weight-transfer group could not meet the other {world_size - 1} within "
            f"{deadline.total_seconds():g} s: {reason}. Can the machines reach each other? On several network "
            "interfaces set GLOO_SOCKET_IFNAME"
        ) from None
