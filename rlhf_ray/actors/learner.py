"""One rank of the learner: policy and critic under DeepSpeed, and the clipped updates of PPO and its kin.

All ranks are given the whole batch and derive the same plan from lengths and seed: which rows form a minibatch, which
rank computes which of them, in which micro-batches. Losses are sums over tokens divided by the minibatch's global
token count, so the number of ranks and the size of micro-batches change no gradient, and no batch size has to divide
anything. A step whose loss is not finite, or whose batch breaks an invariant, is never applied.
"""

import pickle
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed

from rlhf_ray.actors import evidence, invariants, objective
from rlhf_ray.actors import experience as experiences
from rlhf_ray.actors.experience import Batch, Experience
from rlhf_ray.actors.invariants import Found
from rlhf_ray.actors.objective import Rows
from rlhf_ray.actors.reference import form_of, says, to_numpy
from rlhf_ray.actors.tally import Tally
from rlhf_ray.actors.weight_transfer import Sender, make_sender
from rlhf_ray.algorithms import statistics
from rlhf_ray.algorithms.logprobs import TokenStatistics
from rlhf_ray.config.ppo import PPO, PPOConfig
from rlhf_ray.data.packing import balanced, micro_batches
from rlhf_ray.errors import TrainingError
from rlhf_ray.models import load, lora, zero, zero_state
from rlhf_ray.models.device import collective_backend, torch_device
from rlhf_ray.models.heads import TokenLogprobs, Values
from rlhf_ray.models.packed import Packed
from rlhf_ray.records import Ragged, ReferenceColumns, Trajectories, token_places

POLICY, LEARNER = "policy", "learner"
"""Folders of a checkpoint."""
SAMPLES = 4
"""Answers that an update shows."""


@dataclass(frozen=True)
class Update:
    """What one PPO update did."""

    metrics: dict[str, float]
    samples: list[dict[str, Any]]
    """A few answers: prompt and response ids, score, KL in nats."""
    warnings: tuple[str, ...]
    """What a person should know though the run goes on."""
    interrupted: bool
    """A stop was asked for; the remaining optimiser steps of this update were left out."""


@dataclass(frozen=True)
class MicroBatch:
    """Rows that one forward pass takes together."""

    rows: list[int]
    real: bool
    """False for a pass that only keeps ranks in step; its loss counts zero."""


class Learner:
    def __init__(self, config: PPOConfig, rank: int, critic_is_reward_model: bool, evidence: str) -> None:
        """`evidence` is the folder for a batch that breaks an invariant, on a file system that ranks share."""
        self.config = config
        self.rank = rank
        self.world = config.roles.learner.ranks
        self.critic_is_reward_model = critic_is_reward_model
        self.evidence = Path(evidence)
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
        """Policy and, where the algorithm has one, critic under DeepSpeed, with schedules over `optimizer_steps`.

        A collective."""
        config, learner = self.config, self.config.learner
        torch.manual_seed(config.seed)
        sharded = zero.sharded_loading(learner.optimizer, learner.zero, config.device)
        model = load.causal_lm(config.policy, config.device, config.trust_remote_code)
        self.reference_head = load.frozen_head(model) if form_of(config.ppo.kl) == "hidden" else None
        self._adapt(model)
        policy = TokenLogprobs(model, config.rollout.temperature)
        if learner.zero.stage == 3:
            policy.keep_in_step(learner.tokens_per_micro_batch)
        critic = Values(self._critic_body()) if config.ppo.algorithm.needs_critic else None
        del sharded
        self.policy = self._engine(policy, optimizer_steps)
        rate = config.ppo.algorithm.critic_learning_rate if isinstance(config.ppo.algorithm, PPO) else None
        self.critic = self._engine(critic, optimizer_steps, rate) if critic else None
        return {"parameters": sum(_numel(p) for p in policy.parameters())}

    def _adapt(self, model: torch.nn.Module) -> None:
        if self.config.learner.lora:
            settings = self.config.learner.lora
            lora.add_adapters(model, settings.rank, settings.alpha, settings.targets, self.config.seed)

    def _engine(self, module: torch.nn.Module, optimizer_steps: int, rate: float | None = None) -> Any:
        learner = self.config.learner
        engine = zero.make_engine(module, learner.optimizer, learner.zero, self.config.device, optimizer_steps, rate)
        engine.train()
        return engine

    def connect(self, engines: list[Any], backend: str) -> None:
        """Opens the way by which weights reach `engines`: on rank 0, and for ipc on every rank."""
        metadata = [
            (name, parameter.dtype, tuple(getattr(parameter, "ds_shape", parameter.shape)))
            for name, parameter in lora.base_weights(self.policy.module.model)
        ]
        self.sender = make_sender(backend, engines, metadata, self.config.roles.deadline_s, rank=self.rank)

    def publish(self, version: int) -> dict[str, float]:
        """Sends the policy's weights, adapters added, to every engine. A collective: sharded ones are gathered."""
        weights = lora.merged(self.policy, self.policy.module.model)
        if self.sender is None:
            for _ in weights:
                pass
            return {}
        return self.sender.send(weights, version)

    @torch.no_grad()
    def context_logprobs(self, sequences: Ragged) -> np.ndarray:
        """[N - B] log-probabilities of all tokens of B sequences but the first of each, at temperature 1.

        A collective; every rank computes the same."""
        packed = Packed.of([sequences[row] for row in range(len(sequences))], [1] * len(sequences), self.device)
        policy: TokenLogprobs = self.policy.module
        temperature, policy.temperature = policy.temperature, 1.0
        try:
            return self.policy(packed).logprobs.cpu().numpy()
        finally:
            policy.temperature = temperature

    @ray.method(concurrency_group="control")
    def ask_stop(self) -> None:
        """Ends the running update after its current optimiser step. Runs beside the other methods."""
        self.stop_asked.set()

    @ray.method(concurrency_group="signal")
    def without_signal(self, trajectories: Trajectories, scores: np.ndarray) -> list[int]:
        """Numbers of the prompts whose answers are all paid alike: they teach nothing. Runs beside other methods."""
        paid = experiences.final_scores(trajectories, torch.from_numpy(scores[:, 0].copy()), self.config).numpy()
        prompts = trajectories.sample_ids // self.config.rollout.samples_per_prompt
        return [int(number) for number in np.unique(prompts) if np.ptp(paid[prompts == number]) == 0]

    def update(self, chunks: Sequence[Sequence[Any]], coefficient: float, update: int, prompts: np.ndarray) -> Update:
        """One update on chunks of references to (trajectories, what the reference says of them, scores).

        `coefficient` is the KL penalty's beta; `prompts` are the numbers of those to train on; others in the chunks
        are left out. A collective. Raises TrainingError when a loss is not finite or an invariant is broken, before a
        step is taken with it; what it happened on is then kept as evidence.
        """
        batch, bytes_on_wire = self._gather(chunks), self._bytes_on_wire
        carried = batch.trajectories.tokens
        batch = batch.of_prompts(prompts, self.config.rollout.samples_per_prompt)
        if self.config.shares_reference:
            batch = replace(batch, reference=self._own_reference(batch.trajectories))
        attempt = Attempt(batch, coefficient, update)
        try:
            metrics = self._learn(attempt)
        except TrainingError as error:
            raise TrainingError(f"{error}. {self._keep_evidence(attempt, str(error))}") from None
        assert attempt.experience is not None
        metrics |= {
            "lr/policy": self.policy.get_lr()[0],
            "wire/bytes": float(bytes_on_wire),
            "wire/bytes_per_token": bytes_on_wire / carried,
        }
        if self.critic:
            metrics["lr/critic"] = self.critic.get_lr()[0]
        return Update(metrics, _samples(batch, attempt.experience), tuple(attempt.warnings), attempt.interrupted)

    def _gather(self, chunks: Sequence[Sequence[Any]]) -> Batch:
        fetched = [tuple(ray.get(list(chunk))) for chunk in chunks]
        self._bytes_on_wire = sum(_wire_bytes(column) for chunk in fetched for column in chunk)
        if self.config.shares_reference:  # NaN, which no update survives, until the learner has said it itself
            unsaid = [np.full(trajectories.tokens, np.nan, np.float32) for trajectories, _ in fetched]
            fetched = [(t, ReferenceColumns.sampled(u), s) for (t, s), u in zip(fetched, unsaid, strict=True)]
        return Batch.gather(fetched)  # type: ignore[arg-type]

    def _learn(self, attempt: "Attempt") -> dict[str, float]:
        """All optimiser steps; metrics."""
        attempt.experience = old = self._experience(attempt.batch, attempt.coefficient)
        self._heed(invariants.of_experience(old.metrics, attempt.update, self.config), attempt)
        tally = Tally(self.config, self.device)
        for number, (epoch, minibatch) in enumerate(self._minibatches(len(attempt.batch), attempt.update)):
            attempt.interrupted = self._stop_agreed()
            if attempt.interrupted:
                break
            self._step(
                attempt, old, minibatch, tally, first=number == 0, where=f"update {attempt.update}, epoch {epoch}"
            )
        return {**old.metrics, **tally.means()}

    def _heed(self, found: Found, attempt: "Attempt") -> None:
        """Warnings are noted. Breaches stop the run, unless it is configured to go on with a warning."""
        attempt.warnings += found.warnings
        if found.breaches and self.config.ppo.on_breach == "stop":
            raise TrainingError(f"update {attempt.update}: {'; '.join(found.breaches)}")
        attempt.warnings += found.breaches

    def _keep_evidence(self, attempt: "Attempt", what: str) -> str:
        """Writes the batch and the weights as they are; says where. A collective; rank 0 writes.

        A disk that is full must not hide what went wrong, nor leave other ranks waiting.
        """
        place = self.evidence / f"update_{attempt.update:06d}"
        policy = self._whole(self.policy, self.policy.module.model)
        critic = self._whole(self.critic, self.critic.module) if self.critic else {}
        said = [f"To look at it on one process: rlhf-ray replay {place}"]
        if self.rank == 0:
            about = {"error": what, "update": attempt.update, "kl_coefficient": attempt.coefficient}
            try:
                evidence.write(place, self.config, attempt.batch, attempt.experience, about)
                self._write_policy(place / evidence.POLICY, policy)
                if critic:
                    evidence.write_critic(place, critic)
            except (OSError, SafetensorError) as error:
                said = [f"The batch could not be kept in '{place}': {error}"]
        # Any rank may be the one that is heard, and none may be gone while another still writes.
        distributed.broadcast_object_list(said, src=0, device=self.device)
        return said[0]

    def save(self, folder: str) -> dict[str, Any]:
        """Writes the policy, adapters added, as a Hugging Face folder, and beside it what training goes on from.

        Returns what `restore` wants to be told. A collective; rank 0 writes."""
        weights = self._whole(self.policy, self.policy.module.model)
        states = {name: zero_state.optimizer_state(engine) for name, engine in self._engines.items()}
        if self.rank == 0:
            self._write_policy(Path(folder) / POLICY, weights)
            (Path(folder) / LEARNER).mkdir()
            for name, (tensors, _) in states.items():
                save_file(tensors, Path(folder) / LEARNER / f"{name}.safetensors")
        return {name: counted for name, (_, counted) in states.items()}

    def restore(self, folder: str, counted: dict[str, Any]) -> None:
        """Goes on from what `save` left in `folder` and returned. A collective, on any number of ranks."""
        for name, engine in self._engines.items():
            tensors = load_file(Path(folder) / LEARNER / f"{name}.safetensors")
            zero_state.restore_optimizer(engine, tensors, counted[name], self._touch)

    @property
    def _engines(self) -> dict[str, Any]:
        return {"policy": self.policy, **({"critic": self.critic} if self.critic else {})}

    def _touch(self, engine: Any) -> Tensor:
        found = engine(Packed.of([np.array([0, 1])], [1], self.device))
        return (found.logprobs if isinstance(found, TokenStatistics) else found).sum()

    def _write_policy(self, folder: Path, weights: dict[str, Tensor]) -> None:
        tokens = load.tokenizer(self.config.policy, "policy", self.config.trust_remote_code)
        load.save(self.policy.module.model, tokens, folder, weights)

    def _whole(self, engine: Any, model: torch.nn.Module) -> dict[str, Any]:
        """Weights by name, adapters added, in host memory of rank 0; none elsewhere. A collective."""
        return {name: weight.cpu().clone() if self.rank == 0 else None for name, weight in lora.merged(engine, model)}

    def _critic_body(self) -> torch.nn.Module:
        config = self.config
        if self.critic_is_reward_model:
            body = load.classifier(config.critic_body, config.device, config.trust_remote_code).base_model
        else:
            body = load.causal_lm(config.critic_body, config.device, config.trust_remote_code).base_model
        self._adapt(body)
        return body

    def _experience(self, batch: Batch, coefficient: float) -> Experience:
        """Statistics of the policy and values by a forward pass, shared out over ranks; the rest alike on each."""
        with_kl, with_critic = self.config.ppo.kl.estimator.name == "full", self.critic is not None
        columns = torch.zeros(2 + with_kl + with_critic, batch.trajectories.tokens, device=self.device)
        with torch.no_grad():
            for micro in self._micro_batches(batch.trajectories, np.arange(len(batch))):
                some, packed = Rows(batch, np.array(micro.rows)), self._pack(batch.trajectories, micro.rows)
                policy = self.policy(packed, self._reference_rows(some))
                found = [*(column for column in policy if column is not None)]
                if self.critic:
                    found.append(self.critic(packed))
                if micro.real:
                    columns[:, some.places] = torch.stack(found)
        distributed.all_reduce(columns)
        rows = iter(columns.cpu())
        policy = TokenStatistics(next(rows), next(rows), next(rows) if with_kl else None)
        values = next(rows) if with_critic else None
        return experiences.build(batch, policy, values, self.config, coefficient)

    def _own_reference(self, trajectories: Trajectories) -> ReferenceColumns:
        """What the policy said before it had adapters, shared out over ranks. A collective."""
        form = form_of(self.config.ppo.kl)
        width = trajectories.top_ids.shape[1], self.policy.module.model.config.hidden_size if form == "hidden" else 0
        columns = torch.zeros(trajectories.tokens, 1 + sum(width), device=self.device)
        with lora.disabled(self.policy.module.model):
            for micro in self._micro_batches(trajectories, np.arange(len(trajectories))):
                places = token_places(trajectories.responses.offsets, np.array(micro.rows))
                found = says(
                    self.policy.module, self._pack(trajectories, micro.rows), trajectories.top_ids[places], form
                )
                if micro.real:
                    columns[torch.from_numpy(places)] = torch.cat([found[0][:, None], *found[1:]], 1).float()
        distributed.all_reduce(columns)
        logprobs, top, hidden = columns.cpu().split([1, *width], 1)
        hidden = hidden.to(next(self.policy.module.parameters()).dtype)
        return ReferenceColumns(logprobs[:, 0].numpy(), top.numpy(), to_numpy(hidden))

    def _reference_rows(self, some: Rows) -> Any:
        return objective.reference_rows(some, self.config, self.reference_head, self.device)

    def _minibatches(self, size: int, update: int) -> Iterator[tuple[int, np.ndarray]]:
        for epoch in range(self.config.ppo.epochs):
            order = np.random.default_rng([self.config.seed, update, epoch]).permutation(size)
            # Where fewer answers are kept than there are minibatches, there are as many as answers.
            for rows in np.array_split(order, min(self.config.ppo.minibatches, size)):
                yield epoch, rows

    def _step(
        self, attempt: "Attempt", old: Experience, rows: np.ndarray, tally: Tally, first: bool, where: str
    ) -> None:
        """One optimiser step of policy and critic on the minibatch `rows`."""
        batch, config = attempt.batch, self.config
        algorithm = config.ppo.algorithm
        weights = objective.token_weights(batch, rows, config)
        tokens = int(batch.trajectories.responses.lengths[rows].sum())
        total = torch.zeros((), device=self.device)
        for micro in self._micro_batches(batch.trajectories, rows):
            some, packed = Rows(batch, np.array(micro.rows)), self._pack(batch.trajectories, micro.rows)
            in_loss = config.ppo.kl.estimator.placement != "reward"
            found = self.policy(packed, self._reference_rows(some) if in_loss else None)
            policy = objective.policy_tokens(found, old, some, config, attempt.coefficient)
            of_token = statistics.at_tokens(weights[torch.from_numpy(some.rows)], some.offsets).to(self.device)
            policy_sum = (of_token * policy.total).sum()
            # DeepSpeed averages gradients over ranks; sums over tokens need the world back.
            self.policy.backward(policy_sum * self.world * micro.real)
            total += policy_sum.detach()
            value = None
            if self.critic:
                assert isinstance(algorithm, PPO)
                value = objective.value_tokens(self.critic(packed), old, some, algorithm.clip_value)
                self.critic.backward(value.loss.sum() * self.world / tokens * micro.real)
                total += value.loss.detach().sum()
            if micro.real:
                tally.add(policy, value)
                if first:
                    tally.note_first(policy)
        if not zero.finite(total):
            raise TrainingError(
                f"the loss at {where} is not finite; no step was taken with it. Look at samples.jsonl and at the last "
                "lines of metrics.jsonl: usual causes are a learning rate too high and rewards of great size"
            )
        if first:
            self._heed(invariants.of_first_minibatch(tally.largest_first_deviation(), config), attempt)
        tally.norms["policy/grad_norm"] = zero.step(self.policy, f"policy, {where}")
        if self.critic:
            tally.norms["critic/grad_norm"] = zero.step(self.critic, f"critic, {where}")

    def _micro_batches(self, trajectories: Trajectories, rows: np.ndarray) -> list[MicroBatch]:
        """This rank's passes over `rows`, at least one: DeepSpeed reduces nothing on a rank that computed nothing.

        Sharded gradients or parameters need equally many on every rank."""
        budget = self.config.learner.tokens_per_micro_batch
        lengths = (trajectories.prompt_lengths + trajectories.responses.lengths)[rows]
        passes = []
        for part in balanced(lengths, self.world):
            packs = micro_batches(lengths[part], budget) if len(part) else []
            passes.append([[int(rows[part[place]]) for place in pack] for pack in packs])
        mine = [MicroBatch(pack, real=True) for pack in passes[self.rank]]
        wanted = max(len(other) for other in passes) if self._lockstep else 1
        return mine + [MicroBatch([int(rows[0])], real=False)] * (wanted - len(mine))

    @property
    def _lockstep(self) -> bool:
        return self.config.learner.zero.stage >= 2

    def _pack(self, trajectories: Trajectories, rows: list[int]) -> Packed:
        return Packed.of(
            [trajectories.sequence(row) for row in rows],
            [len(trajectories.prompt(row)) for row in rows],
            self.device,
        )

    def _stop_agreed(self) -> bool:
        asked = torch.tensor(float(self.stop_asked.is_set()), device=self.device)
        distributed.all_reduce(asked, op=distributed.ReduceOp.MAX)
        return asked.item() > 0


@dataclass
class Attempt:
    """An update under way: what has to be told of it if it fails."""

    batch: Batch
    coefficient: float
    update: int
    experience: Experience | None = None
    warnings: tuple[str, ...] = ()
    interrupted: bool = False


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
