"""The learner against a plain PyTorch oracle, and against itself under other ranks, shards and micro-batches."""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.records import Finish, Ragged, Trajectories
from tests import tiny

pytestmark = pytest.mark.real

ANSWERS, BETA = 7, 0.1


class Host:
    """A process that plays one rank of one learner after another: imports and the process group are paid once."""

    def open(self, config: PPOConfig, rank: int) -> tuple[str, int] | None:
        from rlhf_ray.actors.learner import Learner

        self.first = Learner(config, rank, critic_is_reward_model=False)
        return self.first.open_store() if rank == 0 else None

    def join(self, address: tuple[str, int]) -> None:
        self.first.join(address)

    def update(self, config: PPOConfig, rank: int, chunks: list[Any]) -> dict[str, float]:
        from rlhf_ray.actors.learner import Learner

        self.learner = Learner(config, rank, critic_is_reward_model=False)
        self.learner.load(config.ppo.epochs * config.ppo.minibatches)
        return self.learner.update(chunks, BETA, 0, ANSWERS).metrics

    def weights(self) -> dict[str, np.ndarray]:
        from rlhf_ray.models.zero import whole_weights

        policy = self.learner.policy
        return {name: weight.clone().numpy() for name, weight in whole_weights(policy, policy.module.named_weights())}


class Ranks:
    """`world` hosts that have joined."""

    def __init__(self, world: int, policy: str) -> None:
        import ray

        from rlhf_ray.runtime.environment import torch_environment

        ray.cloudpickle.register_pickle_by_value(sys.modules[Host.__module__])  # tests are not on the workers' path
        kind = ray.remote(Host).options(num_cpus=1, runtime_env={"env_vars": torch_environment(1)})
        self.hosts = [kind.remote() for _ in range(world)]
        self.world = world
        opened = [host.open.remote(config(policy, world), rank) for rank, host in enumerate(self.hosts)]
        address = ray.get(opened, timeout=90)[0]
        ray.get([host.join.remote(address) for host in self.hosts], timeout=60)

    def run(self, chosen: PPOConfig, columns: tuple) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Metrics of one update from fresh models, and the weights after it."""
        import ray

        chunk = [ray.put(column) for column in columns]
        updates = [host.update.remote(chosen, rank, [chunk]) for rank, host in enumerate(self.hosts)]
        metrics = ray.get(updates, timeout=120)[0]
        return metrics, self.weights()

    def weights(self) -> dict[str, np.ndarray]:
        import ray

        return ray.get([host.weights.remote() for host in self.hosts], timeout=60)[0]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def one(ray_cluster: None, policy: str) -> Ranks:
    return Ranks(1, policy)


@pytest.fixture(scope="module")
def two(ray_cluster: None, policy: str) -> Ranks:
    return Ranks(2, policy)


@pytest.fixture(scope="module")
def columns() -> tuple[Trajectories, np.ndarray, np.ndarray]:
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
    )
    reference = random.normal(-4, 1, tokens).astype(np.float32)
    return trajectories, reference, random.normal(0, 1, ANSWERS).astype(np.float32)


def config(policy: str, ranks: int = 1, stage: int = 1, budget: int = 4096, **ppo: Any) -> PPOConfig:
    return PPOConfig.model_validate(
        {
            "name": "x",
            "policy": policy,
            "reward": {"function": "a:b"},
            "data": {"path": "d", "max_tokens": 8},
            "rollout": {"max_new_tokens": 16, "temperature": 0.7},
            "ppo": {"epochs": 2, "minibatches": 2, "clip_ratio": 0.05, **ppo},
            "learner": {
                "tokens_per_micro_batch": budget,
                "zero": {"stage": stage},
                "optimizer": {"learning_rate": 1e-2, "schedule": "constant", "warmup_share": 0, "max_grad_norm": 0.5},
            },
            "roles": {"learner": {"ranks": ranks}, "deadline_s": 60},
        }
    )


@pytest.fixture(scope="module")
def whole(one: Ranks, policy: str, columns: tuple) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """One rank, one micro-batch."""
    return one.run(config(policy), columns)


@pytest.mark.parametrize(("ranks", "stage", "budget"), [(1, 0, 24), (1, 3, 24), (2, 1, 24), (2, 2, 48), (2, 3, 24)])
def test_ranks_shards_and_micro_batches_change_neither_weights_nor_metrics(
    one: Ranks, two: Ranks, policy: str, columns: tuple, whole: tuple, ranks: int, stage: int, budget: int
) -> None:
    metrics, weights = (one if ranks == 1 else two).run(config(policy, ranks, stage, budget), columns)
    expected_metrics, expected_weights = whole
    assert set(metrics) == set(expected_metrics)
    for name, value in expected_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=2e-3, abs=2e-4), name
    assert set(weights) == set(expected_weights)
    start = {name: p.detach().numpy() for name, p in _fresh(policy).named_parameters()}
    moved = max(float(np.abs(weights[name] - start[name]).max()) for name in weights)
    apart = max(float(np.abs(weights[name] - expected_weights[name]).max()) for name in weights)
    assert moved > 1e-2
    # Adam divides by the root of a gradient's square: where a gradient is nearly zero, rounding shows.
    assert apart < 0.02 * moved
    mean = np.mean([float(np.abs(weights[name] - expected_weights[name]).mean()) for name in weights])
    assert mean < 1e-5


def test_one_update_is_what_plain_pytorch_computes(one: Ranks, policy: str, columns: tuple) -> None:
    """One epoch, one minibatch: loops over tokens, no packing, torch's own Adam and clipping."""
    metrics, weights = one.run(config(policy, epochs=1, minibatches=1, entropy_bonus=0.01), columns)
    trajectories, reference, scores = columns
    model = _fresh(policy)
    temperature, penalty, tokens = 0.7, 1.0, trajectories.tokens
    logprobs, entropies, advantages, kl_total = [], [], [], 0.0
    place = 0
    for row in range(ANSWERS):
        ids = torch.from_numpy(trajectories.sequence(row).astype(np.int64))
        prompt = len(trajectories.prompt(row))
        table = (model(ids[None]).logits[0] / temperature).log_softmax(-1)
        length = len(ids) - prompt
        own = [table[prompt - 1 + t, ids[prompt + t]] for t in range(length)]
        entropies += [-(table[prompt - 1 + t].exp() * table[prompt - 1 + t]).sum() for t in range(length)]
        rewards = [-BETA * (own[t].item() - reference[place + t]) for t in range(length)]
        kl_total += sum(own[t].item() - reference[place + t] for t in range(length))
        rewards[-1] += -penalty if trajectories.finish[row] == Finish.LENGTH else float(scores[row])
        # values are zero at the start, gamma 1, lambda 0.95
        advantages += [sum(0.95 ** (s - t) * rewards[s] for s in range(t, length)) for t in range(length)]
        logprobs += own
        place += length
    mean = sum(advantages) / tokens
    deviation = math.sqrt(sum((a - mean) ** 2 for a in advantages) / tokens + 1e-8)
    loss = torch.zeros(())
    for logprob, advantage, entropy in zip(logprobs, advantages, entropies, strict=True):
        ratio = (logprob - logprob.detach()).exp()
        loss = loss - ratio * (advantage - mean) / deviation / tokens - 0.01 * entropy / tokens
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item()
    torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0).step()

    assert metrics["policy/grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert metrics["objective/kl"] == pytest.approx(kl_total / ANSWERS, rel=1e-4)
    assert metrics["objective/entropy"] == pytest.approx(sum(e.item() for e in entropies) / tokens, rel=1e-5)
    assert metrics["val/ratio_max_first"] < 1e-5
    assert metrics["policy/clipfrac_avg"] == 0
    for name, parameter in model.named_parameters():
        assert np.abs(parameter.detach().numpy() - weights[name]).max() < 2e-4, name


@pytest.mark.parametrize("stage", [0, 1])
def test_a_loss_that_is_not_finite_stops_the_run_with_the_weights_as_they_were(
    one: Ranks, policy: str, columns: tuple, stage: int
) -> None:
    trajectories, reference, scores = columns
    broken = reference.copy()
    broken[5] = np.nan
    with pytest.raises(Exception, match="the loss at update 0, epoch 0 is not finite"):
        one.run(config(policy, stage=stage), (trajectories, broken, scores))
    after = one.weights()
    for name, parameter in _fresh(policy).named_parameters():
        assert np.array_equal(after[name], parameter.detach().numpy())


def test_a_lost_answer_is_noticed(one: Ranks, policy: str, columns: tuple) -> None:
    trajectories, reference, scores = columns
    fewer = trajectories.take(np.arange(ANSWERS - 1))
    with pytest.raises(Exception, match="7 answers were asked for; 6 arrived, 6 of them distinct"):
        one.run(config(policy), (fewer, reference[: fewer.tokens], scores[:-1]))


def _fresh(policy: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(Path(policy), dtype=torch.float32)
