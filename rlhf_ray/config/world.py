"""Configuration of `rlhf-ray world`."""

from rlhf_ray.config.common import StageConfig


class WorldConfig(StageConfig):
    """`rlhf-ray world`: the demo's world for feedback from a model, on CPU: data, constitution, and a base model that
    can criticise, revise and judge."""
