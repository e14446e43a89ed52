"""The steps of policy optimisation on a cluster: what `ppo.train` says, done by the controller through Ray's actors."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_ray.config.ppo import DAPO, PPOConfig
from rlhf_ray.data.order import SampleOrder
from rlhf_ray.errors import TrainingError
from rlhf_ray.runtime.admission import Terms
from rlhf_ray.runtime.controller import Batch, Controller
from rlhf_ray.runtime.ledger import Ledger
from rlhf_ray.runtime.occupancy import Occupancy
from rlhf_ray.stages.fleet import Call, RayFleet
from rlhf_ray.telemetry.clock import PhaseClock

if TYPE_CHECKING:
    from rlhf_ray.actors.learner import Update
    from rlhf_ray.data.rows import Prompt
    from rlhf_ray.stages.roles import Roles


class Flow:
    def __init__(
        self,
        config: PPOConfig,
        prompts: "Sequence[Prompt]",
        roles: "Roles",
        clock: PhaseClock,
        write: Callable[[Mapping[str, Any]], None],
        updates: int = 0,
        state: dict[str, Any] | None = None,
    ) -> None:
        """`write` is given the history, event by event; with `state` the run goes on after `updates` updates."""
        self.config, self.roles, self._write = config, roles, write
        self.occupancy = Occupancy(time.time)
        order = SampleOrder(len(prompts), config.seed)

        def prompt(number: int) -> np.ndarray:
            return prompts[order.at(number)].ids

        self.fleet = RayFleet(roles, prompt, clock)
        self.ledger = Ledger(self._note)
        self.controller = Controller(
            terms(config),
            self.fleet,
            self.ledger,
            tokens=lambda number: (len(prompt(number)), config.rollout.samples_per_prompt),
            longest=config.rollout.max_new_tokens,
            in_flight=config.publication.in_flight,
            version=updates - 1,  # what engines load themselves is not what the learner has, and is not served
        )
        if state is None:
            self.controller.begin()
        else:
            self.controller.resume(state)

    def collect(self, update: int) -> Batch:
        """Scored answers to train on. Raises TrainingError when none of their prompts tells good from bad."""
        batch = self.controller.collect(update)
        if not batch.groups:
            raise TrainingError(
                f"all answers to each of {batch.dropped} prompts are paid alike: nothing to learn from. Sample "
                "more answers a prompt (rollout.samples_per_prompt) or give a reward that tells them apart"
            )
        return batch

    def learn(self, batch: Batch, coefficient: float, update: int) -> "Update":
        """One update on all ranks; what rank 0 says of it."""
        refs = self.roles.learn(batch.chunks, coefficient, update, batch.groups)
        return self.controller.learn(update, Call(refs, "learner", f"update {update}", "learn"))[0]

    def publish(self, version: int) -> dict[str, float]:
        """Gives all engines the learner's weights, and proves on a few tokens that they have arrived."""
        doing = f"publication of weights {version}"
        sent = self.controller.publish(
            version, lambda: Call(self.roles.publish(version), "learner and rollout", doing, "publish")
        )[0]
        told = self.controller.during(Call(self.roles.ask_canary(), "learner and rollout", "canary", "publish"))
        return {
            "weights/version": float(version),
            "weights/bytes": float(sent["bytes"]),
            "weights/publish_s": float(sent["seconds"]),
            "weights/canary_gap": self.roles.check_canary(told, version),
        }

    def metrics(self, batch: Batch) -> dict[str, float]:
        """What there is to say of a batch besides what it taught."""
        found = {
            "tokens/generated": float(batch.tokens),
            "staleness/mean": float(np.mean(batch.staleness)),
            "staleness/max": float(max(batch.staleness)),
            **self.occupancy.finish(),
        }
        if isinstance(self.config.ppo.algorithm, DAPO):
            found |= {"rollout/prompts_dropped": float(batch.dropped), "rollout/refills": float(batch.refills)}
        return found

    def _note(self, event: Mapping[str, Any]) -> None:
        self._write(event)
        self.occupancy.see(event)

    def end(self) -> None:
        """The run has done all that it was to do."""
        self.controller.end()


def terms(config: PPOConfig) -> Terms:
    algorithm = config.ppo.algorithm
    return Terms(
        updates=config.ppo.updates,
        groups_per_update=config.rollout.prompts_per_update,
        max_staleness=config.ppo.max_staleness,
        max_refills=algorithm.max_refills if isinstance(algorithm, DAPO) else 0,
    )
