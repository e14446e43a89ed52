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

from rlhf_ray.actors import rollout, weight_transfer
from rlhf_ray.actors.learner import Learner
from rlhf_ray.actors.reference import Reference, form_of
from rlhf_ray.actors.reward import Rewards
from rlhf_ray.config.layout import groups, needs, workers
from rlhf_ray.config.ppo import ROLES, PPOConfig
from rlhf_ray.errors import PublicationError, TrainingError
from rlhf_ray.records import Ragged
from rlhf_ray.runtime.deadlines import fetch
from rlhf_ray.runtime.environment import cache_folder, torch_environment
from rlhf_ray.runtime.placement import Placement

CANARY_BOUND = {"cpu": 1e-3, "gpu": 0.5}
"""Largest log-probability difference between learner and engine: fp32 differs by rounding, bf16 by 0.01 on average
and by some tenths at worst; weights one update old differ by more."""

STREAMS = 64
"""Threads of an engine: calls that it serves at the same time; more of them wait."""


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

    def abort(self) -> None:
        """Every engine gives up what it is generating."""
        fetch([engine.abort.remote() for engine in self.engines], self.deadline_s, "rollout", "giving up answers")

    def without_signal(self, chunk: Chunk) -> Any:
        """Will be the numbers of the chunk's prompts whose answers are all paid alike."""
        return self.ranks[0].without_signal.remote(chunk.trajectories, chunk.scores)

    def learn(self, chunks: list[Chunk], coefficient: float, update: int, prompts: list[int]) -> list[Any]:
        """Begins an update on all ranks, each of which will answer with an `Update`.

        `coefficient` is the KL penalty's beta; `prompts` are the numbers of those in the chunks to train on.
        """
        columns = [chunk.columns for chunk in chunks]
        numbers = np.array(prompts, np.int64)
        return [rank.update.remote(columns, coefficient, update, numbers) for rank in self.ranks]

    def publish(self, version: int) -> list[Any]:
        """Begins to send the learner's weights to all engines; the first answer has `bytes` and `seconds`."""
        return [rank.publish.remote(version) for rank in self.ranks]

    def ask_canary(self) -> list[Any]:
        """Will be the log-probabilities of a few tokens, of every rank and then of every engine."""
        return [actor.context_logprobs.remote(self.canary) for actor in [*self.ranks, *self.engines]]

    def check_canary(self, answers: list[np.ndarray], version: int) -> float:
        """Largest difference between learner and engines. Raises PublicationError when it is no rounding error."""
        learner, engines = answers[0], answers[len(self.ranks) :]
        gaps = [float(np.abs(learner - engine).max()) for engine in engines]
        bound = CANARY_BOUND[self.config.device]
        if not max(gaps) <= bound:
            worst = int(np.argmax(gaps))
            raise PublicationError(
                f"after publication of weights {version}, engine {worst} and the learner differ by {gaps[worst]:.3g} "
                f"in the log-probability of a token; the bound is {bound:g}. The engine does not have the learner's "
                "weights, or computes otherwise"
            )
        return max(gaps)

    def ask_stop(self) -> None:
        """Lets a running update end after its current optimiser step."""
        fetch([rank.ask_stop.remote() for rank in self.ranks], self.deadline_s, "learner", "stopping")

    def save(self, folder: Path) -> dict[str, Any]:
        """Writes policy and learner there; returns what `restore` wants to be told."""
        return self._all_ranks("save", str(folder.absolute()), doing=f"writing '{folder}'")[0]

    def restore(self, folder: Path, told: dict[str, Any]) -> None:
        """The learner goes on from what `save` left."""
        self._all_ranks("restore", str(folder.absolute()), told, doing=f"going on from '{folder}'")

    def check_reference(self) -> None:
        """Raises TrainingError when the reference's weights are not what they were at the start."""
        if self._reference_checksums() != self.reference_checksums:
            raise TrainingError("the reference's weights changed during the run: every KL of it is worthless")

    @property
    def checkpoint_bytes(self) -> int:
        """The policy, and three fp32 numbers for each trained weight, the critic's as many as the policy's."""
        trained = 2 if self.config.ppo.algorithm.needs_critic else 1
        return self.parameters * ((2 if self.config.device == "gpu" else 4) + 12 * trained)

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
                concurrency_groups={"control": 1, "signal": 1},
            )
            for rank in range(roles.learner.ranks)
        ]
        self.engines = [
            place.start(
                "rollout",
                number,
                rollout.RolloutEngine,
                settings,
                env=engine_environment,
                max_concurrency=STREAMS,
            )
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
        ready = fetch([engine.ready.remote() for engine in self.engines], self.deadline_s, "rollout", "starting")
        self.kv_tokens: list[int] = [engine["kv_tokens"] for engine in ready]
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
            top_k=config.ppo.kl.estimator.top_k or 0,
            kv_cache_bytes=int(config.rollout.kv_cache_gib * 2**30 / tensor_parallel),
            dtype=config.dtype,
            tensor_parallel=tensor_parallel,
            transfer_backend=backend,
            eos_token_ids=self.eos_ids,
            trust_remote_code=config.trust_remote_code,
            deadline_s=self.deadline_s,
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
