"""Configuration of `rlhf-ray ilql`."""

from typing import Annotated

from pydantic import Field

from rlhf_ray.config.common import Positive, Share
from rlhf_ray.config.supervised import SupervisedConfig


class ILQLConfig(SupervisedConfig):
    """`rlhf-ray ilql`: values of next tokens, learnt from answers with rewards, steer decoding; docs/ilql.md."""

    tau: Annotated[float, Field(ge=0.5, lt=1)] = 0.7
    """Which expectile of Q over the data's actions V is: 0.5 is their mean, towards 1 the best of them."""
    gamma: Share = 0.99
    """Discount of a token."""
    cql: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the conservative loss, which keeps Q low for tokens that the data do not have."""
    awac_beta: Annotated[float, Field(ge=0)] = 1.0
    """A token weighs exp(awac_beta * advantage) in the policy's loss; 0 is behaviour cloning."""
    decode_beta: Annotated[float, Field(ge=0)] = 1.0
    """What decoding multiplies advantages by; kept with the checkpoint, and nothing to training."""
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.005
    """How far targets move towards Q in each sync."""
    sync_every: Positive = 1
    """Optimiser steps from one sync of the targets to the next."""
    scale_rewards: bool = True
    """Divide rewards by their standard deviation over all rows, so that losses and betas mean the same for every
    reward. The mean stays: with gamma < 1 a shift would pay for answers of another length."""
