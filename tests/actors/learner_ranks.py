"""Processes that play the learner's ranks for real, and made-up columns for them to learn from."""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.records import Finish, Ragged, ReferenceColumns, Trajectories, no_columns

ANSWERS, BETA, STEPS = 7, 0.1, 12


class Host:
    """A process that plays one rank of one learner after another: imports and the process group are paid once."""

    def open(self, config: PPOConfig, rank: int) -> tuple[str, int] | None:
        from rlhf_ray.actors.learner import Learner

        self.first = Learner(config, rank, critic_is_reward_model=False, evidence="")
        return self.first.open_store() if rank == 0 else None

    def join(self, address: tuple[str, int]) -> None:
        self.first.join(address)

    def update(self, config: PPOConfig, rank: int, chunks: list[Any], evidence: str, kept: Any) -> Any:
        from rlhf_ray.actors.learner import Learner

        self.learner = Learner(config, rank, critic_is_reward_model=False, evidence=evidence)
        self.learner.load(STEPS)
        everything = np.arange(ANSWERS) // config.rollout.samples_per_prompt
        return self.learner.update(chunks, BETA, 0, np.unique(everything) if kept is None else kept)

    def save_and_go_on(self, chunks: list[Any], folder: str) -> tuple[Any, Any]:
        """What saving told, and the next update."""
        told = self.learner.save(folder)
        return told, self.learner.update(chunks, BETA, 1, np.arange(ANSWERS))

    def go_on(self, config: PPOConfig, rank: int, chunks: list[Any], folder: str, told: Any) -> Any:
        """A fresh learner takes up what another one saved; its next update."""
        from rlhf_ray.actors.learner import Learner

        self.learner = Learner(config, rank, critic_is_reward_model=False, evidence="")
        self.learner.load(STEPS)
        self.learner.restore(folder, told)
        return self.learner.update(chunks, BETA, 1, np.arange(ANSWERS))

    def without_signal(self, trajectories: Any, scores: np.ndarray) -> list[int]:
        return self.learner.without_signal(trajectories, scores)

    def weights(self) -> dict[str, np.ndarray]:
        from rlhf_ray.models.lora import merged

        policy = self.learner.policy
        return {name: weight.clone().numpy() for name, weight in merged(policy, policy.module.model)}

    def save(self, folder: str) -> None:
        self.learner.save(folder)


class Ranks:
    """`world` hosts that have joined."""

    def __init__(self, world: int, policy: str, elsewhere: Path) -> None:
        """`elsewhere` is for evidence that a test does not look at."""
        import ray

        from rlhf_ray.runtime.environment import torch_environment

        ray.cloudpickle.register_pickle_by_value(sys.modules[Host.__module__])  # tests are not on the workers' path
        # Of no CPU by Ray's count: they stay until the last test, and engines want theirs.
        kind = ray.remote(Host).options(num_cpus=0, runtime_env={"env_vars": torch_environment(1)})
        self.hosts = [kind.remote() for _ in range(world)]
        self.world, self.elsewhere = world, elsewhere
        opened = [host.open.remote(config(policy, world), rank) for rank, host in enumerate(self.hosts)]
        address = ray.get(opened, timeout=90)[0]
        ray.get([host.join.remote(address) for host in self.hosts], timeout=60)

    def run(self, chosen: PPOConfig, columns: tuple) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Metrics of one update from fresh models, and the weights after it."""
        return self.update(chosen, columns).metrics, self.weights()

    def update(self, chosen: PPOConfig, columns: tuple, evidence: Path | None = None, kept: Any = None) -> Any:
        import ray

        place = str(evidence or self.elsewhere)
        chunk = [ray.put(column) for column in columns]
        updates = [host.update.remote(chosen, rank, [chunk], place, kept) for rank, host in enumerate(self.hosts)]
        return ray.get(updates, timeout=120)[0]

    def weights(self) -> dict[str, np.ndarray]:
        import ray

        return ray.get([host.weights.remote() for host in self.hosts], timeout=60)[0]


def made_up_columns() -> tuple[Trajectories, ReferenceColumns, np.ndarray]:
    """Seven answers of different lengths to three prompts; one was cut off."""
    random = np.random.default_rng(0)
    responses = Ragged.of([random.integers(6, 40, length) for length in (3, 9, 1, 14, 6, 11, 2)], np.int32)
    tokens = len(responses.values)
    finish = np.full(ANSWERS, Finish.EOS, np.uint8)
    finish[3] = Finish.LENGTH
    trajectories = Trajectories(
        prompts=Ragged.of([random.integers(6, 40, length) for length in (4, 2, 8)], np.int32),
        prompt_of=np.array([0, 0, 1, 1, 2, 2, 2], np.int32),
        responses=responses,
        sampler_logprobs=random.normal(-3, 1, tokens).astype(np.float32),
        finish=finish,
        sample_ids=np.arange(ANSWERS, dtype=np.int64),
        weight_version=np.zeros(ANSWERS, np.int32),
        top_ids=no_columns(tokens),
    )
    reference = ReferenceColumns.sampled(random.normal(-4, 1, tokens).astype(np.float32))
    return trajectories, reference, random.normal(0, 1, ANSWERS).astype(np.float32)


def config(
    policy: str, ranks: int = 1, stage: int = 1, budget: int = 4096, rollout: Any = None, lora: Any = None, **ppo: Any
) -> PPOConfig:
    return PPOConfig.model_validate(
        {
            "name": "x",
            "policy": policy,
            "reward": {"function": "a:b"},
            "data": {"path": "d", "max_tokens": 8},
            "rollout": {"max_new_tokens": 16, "temperature": 0.7, **(rollout or {})},
            # Columns are made up: no model is their reference or their sampler.
            "ppo": {
                "epochs": 2,
                "minibatches": 2,
                "algorithm": {"clip_ratio": 0.05},
                "correction": "none",
                "on_breach": "warn",
                **ppo,
            },
            "learner": {
                "tokens_per_micro_batch": budget,
                "zero": {"stage": stage},
                "lora": lora,
                "optimizer": {"learning_rate": 1e-2, "schedule": "constant", "warmup_share": 0, "max_grad_norm": 0.5},
            },
            "roles": {"learner": {"ranks": ranks}, "deadline_s": 60},
        }
    )
