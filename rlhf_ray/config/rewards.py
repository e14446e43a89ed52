"""What scores an answer: a model, several as one, a function, a server; or several of these by name, added up."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from rlhf_ray.config.base import Config, named
from rlhf_ray.config.common import Name


class Mean(Config):
    """The members' mean."""

    name: Literal["mean"] = "mean"


class Worst(Config):
    """The smallest of the members' scores: a policy has to please them all."""

    name: Literal["worst"] = "worst"


class Uncertainty(Config):
    """The mean less `coefficient` times the variance over members (Coste et al. 2023)."""

    name: Literal["uncertainty"] = "uncertainty"
    coefficient: Annotated[float, Field(ge=0)] = 1.0


class Weights(Config):
    """One model whose weights are the mean of the members' (Rame et al. 2024, WARM): the memory and time of one."""

    name: Literal["weights"] = "weights"


Combination = Annotated[Mean | Worst | Uncertainty | Weights, Field(discriminator="name"), named("mean")]


class Ensemble(Config):
    """Several reward models as one, every replica holding them all; docs/reward-models.md."""

    models: Annotated[list[str], Field(min_length=2)]
    """Each as `model`."""
    combine: Combination = Mean()
    """How their scores become one: its name, or a section with its settings."""


class RewardSource(Config):
    """Exactly one way to score an answer."""

    ways: ClassVar[tuple[str, ...]] = ("model", "ensemble", "function", "url")

    model: str | None = None
    """A sequence-classification model with one output, scored at the last real token."""
    ensemble: Ensemble | None = None
    """Several such models as one."""
    function: str | None = None
    """A Python function `package.module:name` of (prompts, responses), two lists of text, to a list of floats."""
    url: Annotated[str, Field(pattern=r"^https?://")] | None = None
    """An HTTP server: POST {"prompts": [...], "responses": [...]} is answered with {"scores": [...]}."""
    deadline_s: Annotated[float, Field(gt=0)] = 60.0
    """Longest time for one batch of scores, retries included, for `function` and `url`."""

    @model_validator(mode="after")
    def exactly_one(self) -> "RewardSource":
        given = [name for name in self.ways if getattr(self, name)]
        if len(given) != 1:
            known = f"{', '.join(self.ways[:-1])} and {self.ways[-1]}"
            raise ValueError(f"give exactly one of {known}; {', '.join(given) or 'none'} given")
        return self

    @property
    def members(self) -> list[str]:
        """Reward models that it reads; none for a function or a server."""
        if self.ensemble is not None:
            return self.ensemble.models
        return [self.model] if self.model else []

    @property
    def disagrees(self) -> bool:
        """Whether there are several scores of each answer."""
        return self.ensemble is not None and not isinstance(self.ensemble.combine, Weights)


class RewardPart(RewardSource):
    """One of several rewards."""

    weight: float = 1.0
    """What a point of it adds to an answer's score; 0 only logs it, a negative one is a price."""


class RewardSection(RewardSource):
    """Where scores come from: one source, or several by name."""

    ways: ClassVar[tuple[str, ...]] = (*RewardSource.ways, "parts")

    parts: dict[Name, RewardPart] = {}
    """Several sources by name, such as `{helpful: {model: m}, brief: {function: f:g, weight: 0.2}}`, added up."""

    @property
    def sources(self) -> dict[str, RewardPart]:
        """By their place in the configuration."""
        if self.parts:
            return {f"reward.parts.{name}": part for name, part in self.parts.items()}
        return {"reward": RewardPart(**{name: getattr(self, name) for name in RewardSource.model_fields})}

    @property
    def members(self) -> list[str]:
        """Every reward model of every source."""
        return [model for source in self.sources.values() for model in source.members]

    @property
    def details(self) -> list[str]:
        """Metrics of the columns that come with an answer's score, in their order."""
        named = {place.rpartition(".")[2]: source for place, source in self.sources.items()}
        scores = [f"scores/{name}" for name in named] if self.parts else []
        return scores + [f"disagreement/{name}" for name, source in named.items() if source.disagrees]
