"""Every stage: its configuration, of which only the one that is asked for is imported, and the module that runs it."""

from importlib import import_module

from rlhf_ray.config.common import StageConfig

STAGES = {
    "sft": ("supervised.SFTConfig", "stages.sft"),
    "reward": ("supervised.RewardConfig", "stages.reward"),
    "dpo": ("supervised.DPOConfig", "stages.dpo"),
    "ilql": ("ilql.ILQLConfig", "stages.ilql"),
    "ppo": ("ppo.PPOConfig", "stages.ppo"),
    "critique": ("feedback.CritiqueConfig", "stages.critique"),
    "judge": ("feedback.JudgeConfig", "stages.judge"),
    "evaluate": ("evaluation.EvaluateConfig", "stages.evaluate"),
    "rllib": ("rllib.RLlibConfig", "stages.rllib"),
    "world": ("world.WorldConfig", "demo.stage"),
}
"""Stage -> its class in `config/`, and its module, which has `run(config, address) -> summary`."""


def known() -> list[str]:
    return list(STAGES)


def config_of(stage: str) -> type[StageConfig]:
    """Its configuration class."""
    module, _, name = STAGES[stage][0].partition(".")
    return getattr(import_module(f"rlhf_ray.config.{module}"), name)
