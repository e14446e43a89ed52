"""Policy optimisation of a language model against a reward, held near its start by a per-token KL penalty.

`train` reads as the algorithm: collect scored answers, learn, publish. What each step means stands in actors/; what
overlaps with what, where it runs and how failures end stand in runtime/.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_ray import interrupts
from rlhf_ray.algorithms.kl import AdaptiveKL, BudgetKL, FixedKL
from rlhf_ray.config.advice import advice
from rlhf_ray.config.ppo import AdaptiveController, BudgetController, PPOConfig
from rlhf_ray.data import rows
from rlhf_ray.data.quarantine import Quarantine
from rlhf_ray.data.templates import ensure_chat_template
from rlhf_ray.errors import ModelError, StopRequested
from rlhf_ray.models import load
from rlhf_ray.records import Ragged
from rlhf_ray.runtime import checkpoints, session
from rlhf_ray.stages.reward_check import check_reward
from rlhf_ray.telemetry.clock import PhaseClock
from rlhf_ray.telemetry.progress import say
from rlhf_ray.telemetry.run_folder import RunFolder
from rlhf_ray.telemetry.tracker import Tracker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_ray.stages.roles import Roles

CANARY_PROMPTS, CANARY_TOKENS = 4, 64


@dataclass(frozen=True)
class Inputs:
    """What a run needs beyond its configuration, checked before any model is loaded."""

    tokenizer: "PreTrainedTokenizerBase"
    eos_ids: tuple[int, ...]
    prompts: list[rows.Prompt]


def run(config: PPOConfig, address: str | None = None) -> dict[str, Any]:
    """The whole stage; returns what summary.json says. Any failure ends it with an RLHFError, actors gone."""
    begun, may_go_on = last_state(config)
    with Tracker(config, "ppo", resumable=may_go_on) as tracker:
        for sentence in advice(config):
            say(f"warning: {sentence}")
        inputs = prepare(config, tracker.folder.path)
        with session.connect(address), interrupts.stoppable():
            from rlhf_ray.stages.roles import Roles  # Ray's actors: not before the input is known to be good

            steps = config.ppo.updates * config.ppo.epochs * config.ppo.minibatches
            evidence = tracker.folder.path / "evidence"
            with Roles(config, inputs.eos_ids, canary(inputs.prompts), steps, evidence) as roles:
                totals = Totals()
                with _saved_when_stopped(config, roles, tracker, totals):
                    train(config, inputs, roles, tracker, totals, begun)
                roles.check_reference()
        summary = totals.summary()
        tracker.summary(summary)
        return summary


def last_state(config: PPOConfig) -> tuple[checkpoints.Checkpoint | None, bool]:
    """What an earlier process of this run left to go on from, and whether its folder may be taken up at all.

    Without a checkpoint only where one was still to come: what a run without any has measured is not thrown away.
    """
    folder = RunFolder.checkpoints_of(config)
    begun = checkpoints.newest(folder, "controller", lambda what: say(f"warning: {what}"))
    return begun, begun is not None or (config.checkpoint.every is not None and not checkpoints.written(folder))


def prepare(config: PPOConfig, folder: Path) -> Inputs:
    """Reads and checks everything small: model descriptions, tokenizers, prompts."""
    trust = config.trust_remote_code
    description = load.model_config(config.policy, "policy", trust)
    tokenizer = ensure_chat_template(load.tokenizer(config.policy, "policy", trust))
    load.check_vocabulary(tokenizer, description, config.policy, "policy")
    longest = config.data.max_tokens + config.rollout.max_new_tokens
    context = getattr(description, "max_position_embeddings", longest)
    if longest > context:
        raise ModelError(
            f"policy '{config.policy}' has a context of {context} tokens; data.max_tokens {config.data.max_tokens} + "
            f"rollout.max_new_tokens {config.rollout.max_new_tokens} = {longest} do not fit; lower one of them"
        )
    check_reward(config.reward, tokenizer, config.policy, trust)
    quarantine = Quarantine(folder / "quarantine.jsonl")
    prompts = rows.prompts(config.data, tokenizer, quarantine)
    return Inputs(tokenizer, load.eos_ids(config.policy, tokenizer), prompts)


def train(
    config: PPOConfig,
    inputs: Inputs,
    roles: "Roles",
    tracker: Tracker,
    totals: "Totals",
    begun: checkpoints.Checkpoint | None = None,
) -> None:
    """Every update of the run, or those that are left after `begun`. What it comes to is added up in `totals`."""
    from rlhf_ray.stages.flow import Flow

    ppo, clock = config.ppo, PhaseClock()
    first = begun.state["updates"] if begun else 0
    for line in tracker.folder.rewind(first):
        totals.add(line)
    state = begun.state["controller"] if begun else None
    flow = Flow(config, inputs.prompts, roles, clock, tracker.folder.log_event, first, state)
    beta = kl_controller(config)
    if begun:
        say(f"going on after update {first}, from {begun.place}")
        totals.policy = str(begun.place / "policy")
        roles.restore(begun.place, begun.state["learner"])
        beta.restore(begun.state["kl_controller"])
    flow.publish(first)
    progress = tracker.progress(ppo.updates, "PPO", first)
    for update in range(first, ppo.updates):
        batch = flow.collect(update)
        learned = flow.learn(batch, beta.coefficient, update)
        for warning in learned.warnings:
            tracker.alert(f"update {update}", warning)
        if learned.interrupted:
            break
        published = flow.publish(update + 1)
        kl = learned.metrics.get("objective/kl_full", learned.metrics["objective/kl"])
        beta.update(kl, len(batch.groups) * config.rollout.samples_per_prompt)
        tracker.samples(update, [readable(inputs.tokenizer, sample) for sample in learned.samples])
        metrics = {**learned.metrics, **published, **flow.metrics(batch), **clock.finish()}
        metrics["tokens/total"] = totals.add(metrics)
        metrics["tokens/per_s"] = metrics["tokens/generated"] / metrics["time/update"]
        tracker.log(update, metrics)
        progress.advance(
            reward=metrics["objective/scores"], kl=metrics["objective/kl"], tokens_per_s=metrics["tokens/per_s"]
        )
        with clock.phase("checkpoint"):  # what has been told is what the next process goes on from
            last = update + 1 == ppo.updates
            if last or (config.checkpoint.every and (update + 1) % config.checkpoint.every == 0):
                state = {"kl_controller": beta.state(), "controller": flow.controller.state()}
                totals.policy = save(config, roles, tracker, update + 1, state)
    interrupts.Interrupt.check()
    flow.end()


def kl_controller(config: PPOConfig) -> FixedKL | AdaptiveKL | BudgetKL:
    beta = config.ppo.kl.coefficient
    match config.ppo.kl.controller:
        case AdaptiveController(target=target, horizon=horizon):
            return AdaptiveKL(beta, target, horizon)
        case BudgetController(budget=budget, rate=rate):
            return BudgetKL(beta, budget, rate)
    return FixedKL(beta)


def canary(prompts: list[rows.Prompt]) -> Ragged:
    """A few token sequences whose log-probabilities learner and engines compare after each publication."""
    long_enough = [prompt.ids[:CANARY_TOKENS] for prompt in prompts if len(prompt.ids) > 1]
    if not long_enough:
        raise ModelError("every prompt is a single token: nothing to compare learner and engines on")
    return Ragged.of(long_enough[:CANARY_PROMPTS], np.int32)


def save(
    config: PPOConfig, roles: "Roles", tracker: Tracker, updates: int, state: dict[str, Any], name: str = ""
) -> str:
    """A checkpoint after `updates` updates; its `policy` is an ordinary Hugging Face folder, whose path is returned."""
    place = checkpoints.write(
        tracker.folder.checkpoints,
        name or f"update_{updates:06d}",
        lambda folder: {"learner": roles.save(folder)},
        {"updates": updates, **state},
        config.checkpoint.keep,
        roles.checkpoint_bytes,
    )
    return str(place / "policy")


def readable(tokenizer: "PreTrainedTokenizerBase", sample: dict[str, Any]) -> dict[str, Any]:
    """A sample's ids as text."""
    return {
        "prompt": tokenizer.decode(sample["prompt_ids"], skip_special_tokens=True),
        "response": tokenizer.decode(sample["response_ids"], skip_special_tokens=True),
        "score": sample["score"],
        "kl": sample["kl"],
    }


class Totals:
    """What a run adds up for its summary."""

    def __init__(self) -> None:
        self.updates = 0
        self.tokens = 0.0
        self.seconds = 0.0
        self.gap = 0.0
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.policy: str | None = None

    def add(self, metrics: dict[str, float]) -> float:
        """All tokens generated so far."""
        self.updates += 1
        self.tokens += metrics["tokens/generated"]
        self.seconds += metrics["time/update"]
        self.gap = max(self.gap, metrics["rollout/logprob_gap_max"])
        self.first = self.first or metrics
        self.last = metrics
        return self.tokens

    def summary(self) -> dict[str, Any]:
        return {
            "updates": self.updates,
            "tokens": int(self.tokens),
            "tokens_per_s": self.tokens / self.seconds,
            "kl_first": self.first["objective/kl"],
            "kl": self.last["objective/kl"],
            "scores_first": self.first["objective/scores"],
            "scores_last": self.last["objective/scores"],
            "logprob_gap_max": self.gap,
            "policy": self.policy,
        }


@contextmanager
def _saved_when_stopped(config: PPOConfig, roles: "Roles", tracker: Tracker, totals: Totals) -> Iterator[None]:
    """A stop that was asked for saves the policy as it is before it goes on its way."""
    try:
        yield
    except StopRequested as stop:
        with interrupts.Interrupt.deferred():
            roles.ask_stop()
            policy = save(config, roles, tracker, totals.updates, {}, name="stopped")
        raise StopRequested(f"{stop}; the policy as it was is saved in '{policy}'") from None
