"""Whether a reward can score a model's answers, found out from small files before anything large is loaded."""

from typing import TYPE_CHECKING

from rlhf_ray.actors.reward import ServerScores, imported
from rlhf_ray.config.rewards import RewardSection
from rlhf_ray.models import load
from rlhf_ray.models.averaging import check_same_shapes
from rlhf_ray.telemetry.progress import say
from rlhf_ray.telemetry.secrets import in_clear

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_reward(
    reward: RewardSection,
    tokenizer: "PreTrainedTokenizerBase",
    model: str,
    trust_remote_code: bool,
    section: str = "reward.parts",
) -> None:
    """Functions can be imported; servers get no token in clear; models are reward models and read the ids of
    `tokenizer`, which is `model`'s.

    `section` is where parts stand in the configuration. Raises RewardError, ConfigError or ModelError.
    """
    for place, source in reward.sources.items():
        place = place.replace("reward.parts", section)
        if source.function is not None:
            imported(source.function)
        if source.url is not None:
            ServerScores(source.url, source.deadline_s)
            if in_clear(source.url):
                say(f"warning: {place}.url {source.url}: over plain http others can read answers and forge scores")
        for number, path in enumerate(source.members):
            role = f"{place}.model" if source.model else f"{place}.ensemble.models[{number}]"
            description = load.model_config(path, role, trust_remote_code)
            load.check_reward_model(description, path, role)
            other = load.tokenizer(path, role, trust_remote_code)
            load.check_vocabulary(other, description, path, role)
            load.check_same_tokenizer(tokenizer, other, model, path)
        if source.ensemble is not None and not source.disagrees:
            check_same_shapes(source.members)
