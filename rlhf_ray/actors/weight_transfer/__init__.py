"""From the learner's weights to every engine's, by vLLM's weight-transfer interface. Importing this needs no vLLM."""

from rlhf_ray.actors.weight_transfer.engines import Engines, call_all
from rlhf_ray.actors.weight_transfer.senders import Sender, choose_backend, make_sender

__all__ = ["Engines", "Sender", "call_all", "choose_backend", "make_sender"]
