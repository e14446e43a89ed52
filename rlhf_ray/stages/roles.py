"""The four roles of PPO as one thing: started together, spoken to by the controller, ended together.

The controller holds references and lengths, never token columns: chunks go from the engines' nodes straight to
reference and reward actors, and from there to the learner.
"""

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import ray

from rlhf_ray import interrupts
from rlhf_ray.actors import rollout, weight_transfer
from rlhf_ray.actors.learner import Learner, Update
from rlhf_ray.actors.reference import Reference, form_of
from rlhf_ray.actors.reward import Rewards
from rlhf_ray.config.layout import groups, needs, workers
from rlhf_ray.config.ppo import ROLES, PPOConfig
from rlhf_ray.errors import PublicationError, TrainingError
from rlhf_ray.records import Ragged
from rlhf_ray.runtime.deadlines import arrivals, fetch, late
from rlhf_ray.runtime.environment import cache_folder, torch_environment
from rlhf_ray.runtime.placement import Placement
from rlhf_ray.runtime.pools import LeastLoaded, shares

CANARY_BOUND = {"cpu": 1e-3, "gpu": 0.5}
"""Largest log-probability difference between learner and engine: fp32 differs by rounding, bf16 by 0.01 on average
and by some tenths at worst; weights one update old differ by more."""


@dataclass(frozen=True)
class Chunk:
    """Trajectories under way through the roles: references only."""

    trajectories: Any
    reference: Any | None
    """None where the learner is the reference itself."""
    scores: Any

    @property
    def columns(self) -> list[Any]:
        return [column for column in (self.trajectories, self.reference, self.scores) if column is not None]


class Roles:
    """Use as a context: roles are up within it and gone after it, whatever happened."""

    def __init__(
        self, config: PPOConfig, eos_ids: tuple[int, ...], canary: Ragged, optimizer_steps: int, evidence: Path
    ) -> None:
        """`evidence` is where the learner keeps a batch that breaks an invariant."""
        self.config = config
        self.evidence = str(evidence.absolute())
        self.eos_ids = eos_ids
        self.canary = canary
        self.optimizer_steps = optimizer_steps
        self.deadline_s = config.roles.deadline_s
        taken: dict[str, dict[str, float]] = {role: needs(config, role) for role in ROLES}
        self.placement = Placement(groups(config), taken, self.deadline_s, "`roles`")

    def __enter__(self) -> "Roles":
        try:
            self.placement.reserve()
            self._start()
        except BaseException:
            self.placement.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.placement.release()

    def generate(self, prompts: Ragged, sample_ids: np.ndarray) -> list[Chunk]:
        """Generates answers to all prompts; scoring of a chunk begins while others are still being generated."""
        streams = [
            engine.generate.options(num_returns="streaming").remote(
                Ragged.of([prompts[row] for row in share], np.int32),
                sample_ids[share],
                self.config.seed,
                self.config.learner.tokens_per_micro_batch,
            )
            for engine, share in zip(
                self.engines,
                shares(prompts.lengths + self.config.rollout.max_new_tokens, len(self.engines)),
                strict=True,
            )
            if share
        ]
        references, scorers = LeastLoaded(len(self.references)), LeastLoaded(len(self.rewards))
        return [
            Chunk(
                trajectories,
                self.references[references.assign(1)].score.remote(trajectories) if self.references else None,
                self.rewards[scorers.assign(1)].scores.remote(trajectories),
            )
            for trajectories in arrivals(streams, self.deadline_s, "rollout", "generating")
        ]

    def wait_scored(self, chunks: list[Chunk]) -> None:
        """Until every chunk is scored, without fetching a column. Raises what an engine or a scorer raised."""
        waiting = [ref for chunk in chunks for ref in chunk.columns]
        waited = 0.0
        while waiting:
            interrupts.Interrupt.check()
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=0.5, fetch_local=False)
            waited += 0.5
            if waiting and waited > self.deadline_s:
                raise late("reference and reward", "scoring", self.deadline_s)

    def prompts_with_signal(self, chunks: list[Chunk]) -> np.ndarray:
        """Numbers of the prompts whose answers are not all paid alike."""
        columns = [chunk.columns for chunk in chunks]
        asked = self.ranks[0].prompts_with_signal.remote(columns)
        return fetch(asked, self.deadline_s, "learner rank 0", "looking for prompts with signal")

    def learn(
        self, chunks: list[Chunk], coefficient: float, update: int, answers: int, kept: np.ndarray | None = None
    ) -> Update:
        """One update on all ranks. `coefficient` is the KL penalty's beta; `answers` is how many there must be; `kept`
        are the numbers of the prompts to train on, all where none are named."""
        columns = [chunk.columns for chunk in chunks]
        results = self._all_ranks("update", columns, coefficient, update, answers, kept, doing=f"update {update}")
        return results[0]

    def publish(self, version: int) -> dict[str, float]:
        """Sends the learner's weights to all engines and proves on a few tokens that they arrived."""
        sent = self._all_ranks("publish", version, doing=f"publication of weights {version}")[0]
        lengths = np.ones(len(self.canary), dtype=np.int32)
        learner = self._all_ranks("logprobs", self.canary, lengths, doing="canary")[0]
        engines = fetch(
            [engine.logprobs.remote(self.canary, lengths) for engine in self.engines],
            self.deadline_s,
            "rollout",
            "canary",
        )
        gaps = [float(np.abs(learner - engine).max()) for engine in engines]
        bound = self.config.publication.canary_bound or CANARY_BOUND[self.config.device]
        if not max(gaps) <= bound:
            worst = int(np.argmax(gaps))
            raise PublicationError(
                f"after publication of weights {version}, engine {worst} and the learner differ by {gaps[worst]:.3g} "
                f"in the log-probability of a token; the bound is {bound:g} (publication.canary_bound). The engine "
                "does not have the learner's weights, or computes otherwise"
            )
        return {
            "weights/version": float(version),
            "weights/bytes": float(sent["bytes"]),
            "weights/publish_s": float(sent["seconds"]),
            "weights/canary_gap": max(gaps),
        }

    def ask_stop(self) -> None:
        """Lets a running update end after its current optimiser step."""
        fetch([rank.ask_stop.remote() for rank in self.ranks], self.deadline_s, "learner", "stopping")

    def save(self, folder: Path) -> None:
        self._all_ranks("save", str(folder.absolute()), doing=f"writing '{folder}'")

    def check_reference(self) -> None:
        """Raises TrainingError when the reference's weights are not what they were at the start."""
        if self._reference_checksums() != self.reference_checksums:
            raise TrainingError("the reference's weights changed during the run: every KL of it is worthless")

    @property
    def checkpoint_bytes(self) -> int:
        return self.parameters * (2 if self.config.device == "gpu" else 4)

    def _start(self) -> None:
        """Actors import and load at the same time; then the learner opens its way to the engines."""
        config, place = self.config, self.placement
        roles = config.roles
        tokens, trust = config.learner.tokens_per_micro_batch, config.trust_remote_code
        one_thread = torch_environment(1)
        engine_environment = rollout.environment(config.device, str(cache_folder()))
        # Asked of each engine: the backend's name must be known when an engine is made, before where it runs is.
        backend: str = config.publication.backend
        if backend == "auto":
            backend = weight_transfer.choose_backend(config.device, *self._neighbours())
        settings = self._rollout_settings(backend)
        self.ranks = [
            place.start(
                "learner",
                rank,
                Learner,
                config,
                rank,
                bool(config.reward.members),
                self.evidence,
                env=torch_environment(self._learner_threads()),
                concurrency_groups={"control": 1},
            )
            for rank in range(roles.learner.ranks)
        ]
        self.engines = [
            place.start("rollout", number, rollout.RolloutEngine, settings, env=engine_environment)
            for number in range(roles.rollout.engines)
        ]
        self.references = [
            place.start(
                "reference",
                number,
                Reference,
                config.policy,
                config.rollout.temperature,
                tokens,
                form_of(config.ppo.kl),
                config.device,
                trust,
                env=one_thread,
            )
            for number in range(workers(config, "reference"))
        ]
        self.rewards = [
            place.start(
                "reward", number, Rewards, config.reward, tokens, config.device, config.policy, trust, env=one_thread
            )
            for number in range(roles.reward.replicas)
        ]

        address = fetch(self.ranks[0].open_store.remote(), self.deadline_s, "learner rank 0", "starting")
        started = [rank.start.remote(address, self.optimizer_steps) for rank in self.ranks]
        self._ready("rollout", self.engines)
        self._ready("reward", self.rewards)
        self.reference_checksums = self._reference_checksums()
        self.parameters = fetch(started, self.deadline_s, "learner", "starting")[0]["parameters"]
        senders = self.ranks if backend == "ipc" else self.ranks[:1]
        fetch(
            [rank.connect.remote(self.engines, backend) for rank in senders], self.deadline_s, "learner", "connecting"
        )

    def _rollout_settings(self, backend: str) -> rollout.RolloutSettings:
        config = self.config
        tensor_parallel = max(1, int(config.roles.rollout.gpus))
        return rollout.RolloutSettings(
            model=config.policy,
            max_model_len=config.data.max_tokens + config.rollout.max_new_tokens,
            max_new_tokens=config.rollout.max_new_tokens,
            temperature=config.rollout.temperature,
            samples_per_prompt=config.rollout.samples_per_prompt,
            top_k=config.ppo.kl.top_k or 0,
            kv_cache_bytes=int(config.rollout.kv_cache_gib * 2**30 / tensor_parallel),
            dtype=config.dtype,
            tensor_parallel=tensor_parallel,
            transfer_backend=backend,
            eos_token_ids=self.eos_ids,
            trust_remote_code=config.trust_remote_code,
        )

    def _neighbours(self) -> tuple[bool, bool]:
        """Whether all engines share the learner's machine, and whether they share its GPUs."""
        shared = any({"rollout", "learner"} <= set(group) for group in self.config.roles.shared)
        machines = {
            node
            for role in ("rollout", "learner")
            for node in self.placement.machines(role, workers(self.config, role))
        }
        return len(machines) == 1, shared

    def _learner_threads(self) -> int:
        """While the learner computes the other roles wait, so on CPU it takes the machine's cores."""
        if self.config.device == "gpu":
            return max(1, int(self.config.roles.cpus))
        cores = min(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"])
        return max(1, int(cores // self.config.roles.learner.ranks))

    def _all_ranks(self, method: str, *arguments: Any, doing: str) -> list[Any]:
        refs = [getattr(rank, method).remote(*arguments) for rank in self.ranks]
        return fetch(refs, self.deadline_s, "learner", doing)

    def _ready(self, who: str, actors: list[Any]) -> None:
        fetch([actor.__ray_ready__.remote() for actor in actors], self.deadline_s, who, "starting")

    def _reference_checksums(self) -> list[str]:
        return fetch(
            [reference.checksum.remote() for reference in self.references], self.deadline_s, "reference", "checksum"
        )
