"""One rank of the learner: policy and critic under DeepSpeed, and the clipped updates of PPO.

All ranks are given the whole batch and derive the same plan from lengths and seed: which rows form a minibatch, which
rank computes which of them, in which micro-batches. Losses are sums over tokens divided by the minibatch's global
token count, so the number of ranks and the size of micro-batches change no gradient, and no batch size has to divide
anything. A step whose loss is not finite is never applied.
"""

import pickle
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor, distributed

from rlhf_ray.actors import experience as experiences
from rlhf_ray.actors.experience import Batch, Experience
from rlhf_ray.actors.weight_transfer import Sender, make_sender
from rlhf_ray.algorithms import policy_loss, value_loss
from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.data.packing import balanced, micro_batches
from rlhf_ray.errors import TrainingError
from rlhf_ray.models import load, zero
from rlhf_ray.models.device import collective_backend, torch_device
from rlhf_ray.models.heads import TokenLogprobs, Values
from rlhf_ray.models.packed import Packed
from rlhf_ray.records import Ragged, token_places

SAMPLES = 4
"""Answers that an update shows."""


@dataclass(frozen=True)
class Update:
    """What one PPO update did."""

    metrics: dict[str, float]
    samples: list[dict[str, Any]]
    """A few answers: prompt and response ids, score, KL in nats."""
    interrupted: bool
    """A stop was asked for; the remaining optimiser steps of this update were left out."""


@dataclass(frozen=True)
class MicroBatch:
    """Rows that one forward pass takes together."""

    rows: list[int]
    real: bool
    """False for a pass that only keeps ranks in step; its loss counts zero."""


class Learner:
    def __init__(self, config: PPOConfig, rank: int, critic_is_reward_model: bool) -> None:
        self.config = config
        self.rank = rank
        self.world = config.roles.learner.ranks
        self.critic_is_reward_model = critic_is_reward_model
        self.device = torch_device(config.device)
        self.sender: Sender | None = None
        self.stop_asked = threading.Event()

    def open_store(self) -> tuple[str, int]:
        """On rank 0: where the ranks meet. The port is bound as it is chosen, so nobody can take it in between."""
        host = ray.util.get_node_ip_address()
        self.store = distributed.TCPStore(host, 0, self.world, is_master=True, wait_for_workers=False)
        return host, self.store.port

    def start(self, address: tuple[str, int], optimizer_steps: int) -> dict[str, Any]:
        """Joins the ranks and loads both models. A collective."""
        self.join(address)
        return self.load(optimizer_steps)

    def join(self, address: tuple[str, int]) -> None:
        timeout = timedelta(seconds=self.config.roles.deadline_s)
        if self.rank > 0:
            self.store = distributed.TCPStore(*address, self.world, is_master=False, timeout=timeout)
        backend = collective_backend(self.config.device)
        distributed.init_process_group(
            backend, store=self.store, rank=self.rank, world_size=self.world, timeout=timeout
        )

    def load(self, optimizer_steps: int) -> dict[str, Any]:
        """Policy and critic under DeepSpeed, with schedules over `optimizer_steps`. A collective."""
        config, learner = self.config, self.config.learner
        torch.manual_seed(config.seed)
        sharded = zero.sharded_loading(learner.optimizer, learner.zero, config.device)
        model = load.causal_lm(config.policy, config.device, config.trust_remote_code)
        policy = TokenLogprobs(model, config.rollout.temperature)
        if learner.zero.stage == 3:
            policy.keep_in_step(learner.tokens_per_micro_batch)
        critic = Values(self._critic_body())
        del sharded
        make = zero.make_engine
        self.policy = make(policy, learner.optimizer, learner.zero, config.device, optimizer_steps)
        self.critic = make(
            critic, learner.optimizer, learner.zero, config.device, optimizer_steps, learner.critic_learning_rate
        )
        self.policy.train()
        self.critic.train()
        return {"parameters": sum(_numel(p) for p in policy.parameters())}

    def connect(self, engines: list[Any], backend: str) -> None:
        """Opens the way by which weights reach `engines`: on rank 0, and for ipc on every rank."""
        metadata = [
            (name, parameter.dtype, tuple(getattr(parameter, "ds_shape", parameter.shape)))
            for name, parameter in self.policy.module.named_weights()
        ]
        self.sender = make_sender(backend, engines, metadata, self.config.roles.deadline_s, rank=self.rank)

    def publish(self, version: int) -> dict[str, float]:
        """Sends the policy's weights to every engine. A collective: sharded weights are gathered one by one."""
        weights = zero.whole_weights(self.policy, self.policy.module.named_weights())
        if self.sender is None:
            for _ in weights:
                pass
            return {}
        return self.sender.send(weights, version)

    @torch.no_grad()
    def logprobs(self, sequences: Ragged, prompt_lengths: np.ndarray) -> np.ndarray:
        """[N] log-probabilities of response tokens under the present policy; every rank computes the same."""
        packed = Packed.of([sequences[row] for row in range(len(sequences))], prompt_lengths.tolist(), self.device)
        return self.policy(packed)[0].cpu().numpy()

    @ray.method(concurrency_group="control")
    def ask_stop(self) -> None:
        """Ends the running update after its current optimiser step. Runs beside the other methods."""
        self.stop_asked.set()

    def update(self, chunks: Sequence[Sequence[Any]], coefficient: float, update: int, answers: int) -> Update:
        """One PPO update on chunks of references to (trajectories, reference log-probabilities, scores).

        `coefficient` is the KL penalty's beta; `answers` is how many there must be. A collective. Raises TrainingError
        when a loss is not finite; the parameters are then those of the last finite step.
        """
        fetched = [tuple(ray.get(list(chunk))) for chunk in chunks]
        batch = Batch.gather(fetched)  # type: ignore[arg-type]
        _check_complete(batch, answers)
        experience = self._experience(batch, coefficient)
        tally = Tally(self.device)
        interrupted = False
        for epoch, minibatch in self._minibatches(len(batch), update):
            interrupted = self._stop_agreed()
            if interrupted:
                break
            self._step(batch, experience, minibatch, tally, f"update {update}, epoch {epoch}")
        bytes_on_wire = sum(_wire_bytes(column) for chunk in fetched for column in chunk)
        metrics = {
            **experience.metrics,
            **tally.means(),
            "lr/policy": self.policy.get_lr()[0],
            "lr/critic": self.critic.get_lr()[0],
            "wire/bytes": float(bytes_on_wire),
            "wire/bytes_per_token": bytes_on_wire / experience.metrics["tokens/generated"],
        }
        return Update(metrics, _samples(batch, experience), interrupted)

    def save(self, folder: str) -> None:
        """Writes the policy as a Hugging Face folder. A collective; rank 0 writes."""
        weights = {
            name: weight.cpu().clone() if self.rank == 0 else None
            for name, weight in zero.whole_weights(self.policy, self.policy.module.named_weights())
        }
        if self.rank == 0:
            tokens = load.tokenizer(self.config.policy, "policy", self.config.trust_remote_code)
            load.save(self.policy.module.model, tokens, Path(folder), weights)

    def _critic_body(self) -> torch.nn.Module:
        config = self.config
        if self.critic_is_reward_model:
            assert config.reward.model is not None
            return load.classifier(config.reward.model, config.device, config.trust_remote_code).base_model
        return load.causal_lm(config.policy, config.device, config.trust_remote_code).base_model

    def _experience(self, batch: Batch, coefficient: float) -> Experience:
        """Old log-probabilities and values by a forward pass, shared out over ranks; the rest alike on each."""
        tokens = batch.trajectories.tokens
        columns = torch.zeros(3, tokens, device=self.device)
        with torch.no_grad():
            for micro in self._micro_batches(batch, np.arange(len(batch))):
                packed = self._pack(batch, micro.rows)
                logprobs, entropy = self.policy(packed)
                values = self.critic(packed)
                if micro.real:
                    columns[:, self._places(batch, micro.rows)] = torch.stack([logprobs, values, entropy])
        distributed.all_reduce(columns)
        logprobs, values, entropy = columns.cpu()
        return experiences.build(batch, logprobs, values, entropy, self.config.ppo, coefficient)

    def _minibatches(self, size: int, update: int) -> Iterator[tuple[int, np.ndarray]]:
        for epoch in range(self.config.ppo.epochs):
            order = np.random.default_rng([self.config.seed, update, epoch]).permutation(size)
            for rows in np.array_split(order, self.config.ppo.minibatches):
                yield epoch, rows

    def _step(self, batch: Batch, old: Experience, rows: np.ndarray, tally: "Tally", where: str) -> None:
        """One optimiser step of policy and critic on the minibatch `rows`."""
        ppo = self.config.ppo
        tokens = int(batch.trajectories.responses.lengths[rows].sum())
        # DeepSpeed averages gradients over ranks; sums over tokens need the world back.
        scale = self.world / tokens
        total = torch.zeros((), device=self.device)
        for micro in self._micro_batches(batch, rows):
            packed = self._pack(batch, micro.rows)
            places = self._places(batch, micro.rows)
            at = {
                name: getattr(old, name)[places].to(self.device)
                for name in ("old_logprobs", "values", "advantages", "returns")
            }
            logprobs, entropy = self.policy(packed)
            surrogate = policy_loss.clipped(logprobs, at["old_logprobs"], at["advantages"], ppo.clip_ratio)
            policy_sum = surrogate.loss.sum() - ppo.entropy_bonus * entropy.sum()
            self.policy.backward(policy_sum * scale * micro.real)
            values = self.critic(packed)
            squared = value_loss.clipped(values, at["values"], at["returns"], ppo.clip_value)
            self.critic.backward(squared.loss.sum() * scale * micro.real)
            total += policy_sum.detach() + squared.loss.detach().sum()
            if micro.real:
                tally.add(surrogate, squared)
        if not zero.finite(total):
            raise TrainingError(
                f"the loss at {where} is not finite; no step was taken with it. Look at samples.jsonl and at the last "
                "lines of metrics.jsonl: usual causes are a learning rate too high and rewards of great size"
            )
        tally.norms = (zero.step(self.policy, f"policy, {where}"), zero.step(self.critic, f"critic, {where}"))
        tally.first = False

    def _micro_batches(self, batch: Batch, rows: np.ndarray) -> list[MicroBatch]:
        """This rank's passes over `rows`. Sharded gradients or parameters need equally many on every rank."""
        budget = self.config.learner.tokens_per_micro_batch
        lengths = batch.lengths[rows]
        passes = []
        for part in balanced(lengths, self.world):
            packs = micro_batches(lengths[part], budget) if len(part) else []
            passes.append([[int(rows[part[place]]) for place in pack] for pack in packs])
        mine = [MicroBatch(pack, real=True) for pack in passes[self.rank]]
        if not self._lockstep:
            return mine
        missing = max(len(other) for other in passes) - len(mine)
        return mine + [MicroBatch([int(rows[0])], real=False)] * missing

    @property
    def _lockstep(self) -> bool:
        return self.config.learner.zero.stage >= 2

    def _pack(self, batch: Batch, rows: list[int]) -> Packed:
        trajectories = batch.trajectories
        return Packed.of(
            [trajectories.sequence(row) for row in rows],
            [len(trajectories.prompt(row)) for row in rows],
            self.device,
        )

    def _places(self, batch: Batch, rows: list[int]) -> Tensor:
        return torch.from_numpy(token_places(batch.trajectories.responses.offsets, np.asarray(rows)))

    def _stop_agreed(self) -> bool:
        asked = torch.tensor(float(self.stop_asked.is_set()), device=self.device)
        distributed.all_reduce(asked, op=distributed.ReduceOp.MAX)
        return asked.item() > 0


class Tally:
    """Sums over the tokens of all optimiser steps of an update, on one rank; means over all ranks at the end."""

    NAMES = (
        "policy/approxkl_avg",
        "policy/clipfrac_avg",
        "val/ratio",
        "loss/policy_avg",
        "loss/value_avg",
        "val/clipfrac_avg",
    )

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(self.NAMES) + 1, dtype=torch.float64, device=device)
        self.first_deviation = torch.zeros((), device=device)
        self.first = True
        self.norms = (float("nan"), float("nan"))

    def add(self, policy: policy_loss.PolicyLoss, value: value_loss.ValueLoss) -> None:
        columns = (policy.approx_kl, policy.clipped, policy.ratio, policy.loss, value.loss, value.clipped)
        sums = [column.detach().double().sum() for column in columns]
        self.sums += torch.stack([*sums, torch.tensor(float(len(policy.loss)), device=self.sums.device)])
        if self.first:
            deviation = (policy.ratio.detach() - 1).abs().max()
            self.first_deviation = torch.maximum(self.first_deviation, deviation)

    def means(self) -> dict[str, float]:
        """A collective."""
        distributed.all_reduce(self.sums)
        distributed.all_reduce(self.first_deviation, op=distributed.ReduceOp.MAX)
        *sums, tokens = self.sums.tolist()
        means = {name: total / max(tokens, 1.0) for name, total in zip(self.NAMES, sums, strict=True)}
        policy_norm, critic_norm = self.norms
        return {
            **means,
            "val/ratio_max_first": self.first_deviation.item(),
            "policy/grad_norm": policy_norm,
            "critic/grad_norm": critic_norm,
        }


def _check_complete(batch: Batch, answers: int) -> None:
    """No sample lost, none twice: an engine that failed must not look like one that had nothing left to do."""
    distinct = len(np.unique(batch.trajectories.sample_ids))
    if len(batch) != answers or distinct != answers:
        raise TrainingError(f"{answers} answers were asked for; {len(batch)} arrived, {distinct} of them distinct")


def _samples(batch: Batch, experience: Experience) -> list[dict[str, Any]]:
    trajectories = batch.trajectories
    return [
        {
            "prompt_ids": trajectories.prompt(row).tolist(),
            "response_ids": trajectories.responses[row].tolist(),
            "score": batch.scores[row].item(),
            "kl": experience.sequence_kl[row].item(),
        }
        for row in range(min(SAMPLES, len(batch)))
    ]


def _wire_bytes(column: object) -> int:
    """Bytes of an object as Ray's store holds it: pickled, its arrays out of band."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(column, protocol=5, buffer_callback=buffers.append)
    return len(head) + sum(buffer.raw().nbytes for buffer in buffers)


def _numel(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))
