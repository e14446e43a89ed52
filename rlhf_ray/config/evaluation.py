"""Configuration of `rlhf-ray evaluate`: is a policy better, and at what?"""

from typing import Annotated

from pydantic import Field, model_validator

from rlhf_ray.config.base import Config
from rlhf_ray.config.common import DataConfig, Name, StageConfig
from rlhf_ray.config.feedback import EnginesConfig, Judge, LocalJudge
from rlhf_ray.config.rewards import RewardPart, RewardSection


class AnswersConfig(Config):
    """Prompts that the policy answers, and what its answers are measured by."""

    path: Annotated[str, Field(min_length=1)]
    """As `data.path` elsewhere."""
    split: str = "train"
    """As `data.split` elsewhere."""
    rewards: dict[Name, RewardPart] = {}
    """Models, functions and servers by name; each is reported for itself, so weights play no part."""
    duel: bool = False
    """Have the answers compared with the opponent's by the judge of `duel`."""

    def data(self, max_tokens: int) -> DataConfig:
        return DataConfig(path=self.path, split=self.split, max_tokens=max_tokens)


class DuelConfig(Config):
    """A fixed judge compares the policy's answers with an opponent's, each pair in both orders."""

    opponent: str
    """Folder or hub name of the other model; it is served and sampled as the policy is, but never steered by values."""
    judge: Judge
    constitution: str | None = None
    """A file of principles; none: the one that comes with the package."""
    principles: list[str] = []
    """Ids or tags of principles, one of which is drawn for each pair; none: all."""


class EvaluateConfig(StageConfig):
    """`rlhf-ray evaluate`: choices between given answers, measures of sampled ones, duels; docs/evaluation.md."""

    policy: EnginesConfig
    """Who is examined."""
    items: str | None = "hhh"
    """hhh, the 160 items that come with the package; a file of others; or null."""
    question: str = "Which answer would a helpful, honest and harmless assistant give?"
    """Asked where items are chosen from by letter."""
    constitution: str | None = None
    """A file whose templates word that question; none: the one that comes with the package."""
    reference: str | None = None
    """A model to compare log-probabilities with: the implicit reward of DPO."""
    reward: RewardSection | None = None
    """Scores the items' answers and `pairs`."""
    pairs: str | None = None
    """A file of `prompt`, `chosen`, `rejected`, `subset`, as RewardBench has it, for `reward`."""
    answers: dict[Name, AnswersConfig] = {}
    """By name: prompts to answer, with measures of the answers."""
    duel: DuelConfig | None = None
    """Who judges the answers of those sections of `answers` that say so."""
    before: str | None = None
    """Run folder of an earlier evaluation on the same items, for McNemar's test of the change."""
    deadline_s: Annotated[float, Field(gt=0)] = 600.0
    """Longest time without an answer from an actor before the run stops."""

    @property
    def engines(self) -> dict[str, EnginesConfig]:
        """Every model that vLLM serves, one after the other."""
        found = {"policy": self.policy}
        unsteered = self.policy.model_copy(update={"decode_beta": None})
        if self.reference is not None:
            found["reference"] = unsteered.model_copy(update={"model": self.reference})
        if self.duel is not None:
            found["duel.opponent"] = unsteered.model_copy(update={"model": self.duel.opponent})
            if isinstance(self.duel.judge, LocalJudge):
                found["duel.judge"] = self.duel.judge
        return found

    @model_validator(mode="after")
    def there_is_something_to_do(self) -> "EvaluateConfig":
        if self.items is None and self.pairs is None and not self.answers:
            raise ValueError("nothing to evaluate: give items, pairs or answers")
        if self.pairs is not None and self.reward is None:
            raise ValueError("pairs are scored by reward, which is not given")
        if self.before is not None and self.items is None:
            raise ValueError("before compares items, but items is null")
        dueling = [name for name, section in self.answers.items() if section.duel]
        if bool(dueling) != (self.duel is not None):
            raise ValueError("duel needs a section of answers with duel: true, and such a section needs duel")
        return self

    @model_validator(mode="after")
    def devices_agree(self) -> "EvaluateConfig":
        for name, section in self.engines.items():
            if (self.device == "gpu") != (section.gpus > 0):
                raise ValueError(f"device is {self.device}, but {name}.gpus is {section.gpus:g}")
        return self
