"""Configuration of `rlhf-ray critique` and `rlhf-ray judge`: feedback from a model, guided by a constitution."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf_ray.config.base import Config, named
from rlhf_ray.config.common import DataConfig, GPUs, Positive, StageConfig


class EnginesConfig(Config):
    """vLLM engines that serve one model, each an actor of its own."""

    model: str
    """Folder or hub name."""
    engines: Positive = 1
    gpus: GPUs = 0
    """GPUs of each engine; more than one: tensor parallel."""
    cpus: Annotated[float, Field(gt=0)] = 1
    """CPU cores of each engine."""
    max_tokens: Positive = 4096
    """Longest prompt and answer together."""
    max_new_tokens: Positive = 256
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of sampled text. Options are always scored at temperature 1."""
    kv_cache_gib: Annotated[float, Field(gt=0)] = 0.0625
    """Memory for each engine's KV cache."""
    decode_beta: Annotated[float, Field(ge=0)] | None = None
    """Of a model that `rlhf-ray ilql` left: what its advantages count; none: the policy alone. docs/ilql.md."""

    @model_validator(mode="after")
    def a_prompt_has_room(self) -> "EnginesConfig":
        if self.max_new_tokens >= self.max_tokens:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}, which leaves no room of {self.max_tokens}")
        return self


class GuidedConfig(StageConfig):
    """What critique and judge share."""

    data: DataConfig
    """Prompts; `max_tokens` bounds a prompt alone."""
    constitution: str | None = None
    """A file of principles; none: the one that comes with the package."""
    principles: list[str] = []
    """Ids or tags of the principles to use; none: all."""
    prompts_at_once: Positive = 256
    """Prompts under way at a time. What they come to is on disk before the next ones begin; changes no result."""
    deadline_s: Annotated[float, Field(gt=0)] = 600.0
    """Longest time without an answer from an engine before the run stops."""

    @property
    def engines(self) -> dict[str, EnginesConfig]:
        """Name of the section -> engines that the stage starts for it."""
        raise NotImplementedError

    @model_validator(mode="after")
    def devices_agree(self) -> "GuidedConfig":
        for name, section in self.engines.items():
            if (self.device == "gpu") != (section.gpus > 0):
                raise ValueError(f"device is {self.device}, but {name}.gpus is {section.gpus:g}")
        return self


class CritiqueConfig(GuidedConfig):
    """`rlhf-ray critique`: the supervised phase of constitutional AI; docs/constitutional-ai.md."""

    generator: EnginesConfig
    """Who answers, criticises and revises."""
    rounds: Annotated[int, Field(ge=1, le=24)] = 4
    """Revisions of each answer, each by a principle drawn anew."""
    critique: bool = True
    """Ask for a critique before each revision; else for the revision directly."""
    keep: Literal["all", "last"] = "all"
    """Revisions that become rows for fine-tuning: those of all rounds, or of the last one."""

    @property
    def engines(self) -> dict[str, EnginesConfig]:
        return {"generator": self.generator}


class LocalJudge(EnginesConfig):
    """A model of one's own, served by vLLM."""

    name: Literal["local"] = "local"


class EndpointJudge(Config):
    """A server that speaks OpenAI's chat completions with log-probabilities. Its key is the environment variable
    RLHF_RAY_JUDGE_KEY."""

    name: Literal["endpoint"] = "endpoint"
    model: str
    """Name by which the server knows the model."""
    base_url: Annotated[str, Field(pattern=r"^https?://")]
    """Such as https://host/v1."""
    max_new_tokens: Positive = 256
    """Of a rationale."""
    requests_per_minute: Annotated[float, Field(gt=0)] = 600.0
    concurrency: Positive = 8
    """Requests under way at a time."""
    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """Longest wait for one reply."""
    retry_for_s: Annotated[float, Field(gt=0)] = 120.0
    """How long one request is tried again after time-outs, 429 and 5xx before it counts as failed."""
    price_in: Annotated[float, Field(ge=0)] = 0.0
    """Price of a million prompt tokens, in whatever currency; the summary tells the cost."""
    price_out: Annotated[float, Field(ge=0)] = 0.0
    """Price of a million generated tokens."""


MOST_RESPONSES = 16
"""Answers to one prompt; all their pairs are judged."""
MOST_PRINCIPLES = 64
"""Principles of one pair."""

Judge = Annotated[LocalJudge | EndpointJudge, Field(discriminator="name"), named("local")]


class JudgeConfig(GuidedConfig):
    """`rlhf-ray judge`: AI preferences between answers; docs/constitutional-ai.md.

    Rows of `data` hold `prompt` and, where no generator is given, `responses` (a list of texts) or `chosen` and
    `rejected`, which are judged anew; `data.max_tokens` does not apply to those.
    """

    judge: Judge
    """Who compares."""
    generator: EnginesConfig | None = None
    """Who answers the prompts; none: rows bring the answers. A local judge of the same keys and values shares its
    engines."""
    responses_per_prompt: Annotated[int, Field(ge=2, le=MOST_RESPONSES)] = 2
    """With a generator. Of more than two, every pair is judged."""
    principles_per_pair: Annotated[int, Field(ge=1, le=MOST_PRINCIPLES)] = 1
    """Principles drawn for a pair, without replacement; the label averages over them."""
    chain_of_thought: bool = False
    """Sample a rationale before each choice."""
    clamp: Annotated[float, Field(gt=0.5, le=1)] | None = None
    """Greatest p of soft labels, and 1 - clamp the least; none: 0.6 with chain_of_thought (Bai et al. 2022, section
    4.1), else 1."""
    labels: Literal["soft", "hard"] = "soft"
    """soft: p is the judge's probability; hard: p is 1, and a pair without a preferred answer has no label."""
    labelled: str | None = None
    """A file of pairs `prompt`, `chosen`, `rejected` with known labels, to measure the judge on."""

    @property
    def most(self) -> float:
        """Greatest p."""
        return self.clamp or (0.6 if self.chain_of_thought else 1.0)

    @model_validator(mode="after")
    def clamp_has_something_to_hold(self) -> "JudgeConfig":
        if self.clamp is not None and self.labels == "hard":
            raise ValueError("clamp belongs to labels soft, but labels is hard")
        return self

    @property
    def engines(self) -> dict[str, EnginesConfig]:
        found: dict[str, EnginesConfig] = {"generator": self.generator} if self.generator else {}
        if isinstance(self.judge, LocalJudge) and not self.shares_engines:
            found["judge"] = self.judge
        return found

    @property
    def shares_engines(self) -> bool:
        """Whether the generator's engines serve the judge too: both sections say the same."""
        if self.generator is None or not isinstance(self.judge, LocalJudge):
            return False
        return self.generator.model_dump() == self.judge.model_dump(exclude={"name"})
