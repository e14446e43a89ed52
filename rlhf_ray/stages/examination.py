"""What one policy is put through: measurements of it, each by the engines that are up at the time.

Nothing is left out: an item that cannot be measured is an error, as is a measure that cannot be had.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_ray.config.evaluation import DuelConfig, EvaluateConfig
from rlhf_ray.config.feedback import EndpointJudge
from rlhf_ray.config.rewards import RewardSection
from rlhf_ray.data import rows
from rlhf_ray.data.quarantine import BadRow
from rlhf_ray.data.templates import answer_ids, as_messages, ensure_chat_template, prompt_ids
from rlhf_ray.errors import DataError, JudgeError
from rlhf_ray.evaluation import answers as texts
from rlhf_ray.evaluation import choice, duels, reward_bench
from rlhf_ray.evaluation.items import Item
from rlhf_ray.feedback import constitution as constitutions
from rlhf_ray.feedback.endpoint import Endpoint
from rlhf_ray.feedback.judging import OPTIONS, Judged, Response
from rlhf_ray.models import load
from rlhf_ray.stages import scoring
from rlhf_ray.stages.engines import Answer, Engines, Reader
from rlhf_ray.stages.judge import EngineJudge, compare, option_ids
from rlhf_ray.telemetry.progress import say
from rlhf_ray.telemetry.run_folder import write_rows

NEUTRAL = "?"
"""A prompt that says nothing, for what the prompt adds to an answer's log-probability."""


@dataclass(frozen=True)
class Inputs:
    """What an examination needs beyond its configuration, checked before any model is loaded."""

    readers: dict[str, Reader]
    items: list[Item]
    pairs: list[rows.BenchmarkPair]
    prompts: dict[str, list[rows.Prompt]]
    """Section of `answers` -> its prompts."""
    before: list[dict[str, Any]] | None
    """Rows of the earlier evaluation."""


class Examination:
    """Measurements of one policy, each by the engines that are up at the time."""

    def __init__(self, config: EvaluateConfig, inputs: Inputs, folder: Path) -> None:
        self.config, self.inputs, self.folder = config, inputs, folder

    @contextmanager
    def engines(self, name: str) -> Iterator[Engines]:
        section = self.config.engines[name]
        with Engines(section, self.inputs.readers[name], self.config, self.config.deadline_s) as up:
            yield up

    def measure_items(self, policy: Engines) -> list[dict[str, Any]]:
        """By item what the policy's own log-probabilities say, as fields of `choice.Measured`."""
        found = self.inputs.items
        if not found:
            return []
        say(f"{len(found)} items")
        logprobs = self._item_logprobs(policy, [item.prompt for item in found])
        neutral = self._item_logprobs(policy, [NEUTRAL] * len(found))
        letters = self._letters(policy) if all(len(item.choices) == len(OPTIONS) for item in found) else None
        return [
            {"logprobs": own, "neutral": other, "letters": None if letters is None else letters[place]}
            for place, (own, other) in enumerate(zip(logprobs, neutral, strict=True))
        ]

    def beside_reference(self, measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The same with what the reference's log-probabilities say, where there is one."""
        if self.config.reference is None or not measured:
            return measured
        with self.engines("reference") as reference:
            others = self._item_logprobs(reference, [item.prompt for item in self.inputs.items])
        return [{**each, "reference": other} for each, other in zip(measured, others, strict=True)]

    @contextmanager
    def reward(self) -> Iterator[scoring.Scorer | None]:
        """What scores given answers; None where no reward is configured."""
        reward = self.config.reward
        if reward is None:
            yield None
            return
        tokenizer = scoring.tokenizer_of(reward, self.config.policy.model)
        with scoring.scorer(reward, tokenizer, self.config, self.config.deadline_s) as up:
            yield up

    def choices(self, measured: list[dict[str, Any]], reward: scoring.Scorer | None) -> dict[str, Any]:
        found = self.inputs.items
        if reward is not None:
            scores = self._item_rewards(reward)
            measured = [{**each, "rewards": own} for each, own in zip(measured, scores, strict=True)]
        results = choice.evaluate(found, [choice.Measured(**each) for each in measured])
        write_rows(self.folder / "items.jsonl", results.rows())
        summary = results.summary()
        if self.inputs.before is not None:
            changes = choice.compare(self.inputs.before, results.rows())
            summary["changes"] = {rule: change._asdict() for rule, change in changes.items()}
        return summary

    def pairs(self, reward: scoring.Scorer) -> dict[str, Any]:
        return reward_bench.evaluate(self.inputs.pairs, reward_bench.by_reward(reward)).summary()

    def sample(self, engines: Engines, prompts: Sequence[rows.Prompt]) -> list[Answer]:
        """One answer to each, read by the model's own tokenizer; the same random numbers for every model."""
        try:
            contexts = [engines.reader.ids(prompt.turns) for prompt in prompts]
        except BadRow as fault:
            raise DataError(f"a prompt cannot be put to {engines.name}: {fault}; raise policy.max_tokens") from None
        return engines.sample(contexts, range(len(prompts)))

    def describe(self, name: str, answers: Sequence[Answer]) -> dict[str, Any]:
        """Statistics of the answers to one section's prompts; all of them are in `answers-<name>.jsonl`."""
        prompts, section = self.inputs.prompts[name], self.config.answers[name]
        scores: dict[str, list[float]] = {}
        if section.rewards:
            reward, tokenizer = RewardSection(parts=section.rewards), self.config.policy.model
            with scoring.scorer(reward, tokenizer, self.config, self.config.deadline_s) as up:
                columns = up.columns([prompt.ids for prompt in prompts], [answer.ids for answer in answers])
            scores = {part: columns[:, place].tolist() for place, part in enumerate(section.rewards, 1)}
        write_rows(
            self.folder / f"answers-{name}.jsonl",
            [
                {
                    "prompt": prompt.text,
                    "response": answer.text,
                    "tokens": answer.tokens,
                    "finish": answer.finish,
                    **{part: values[row] for part, values in scores.items()},
                }
                for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
            ],
        )
        ended = [answer.finish == "eos" for answer in answers]
        return texts.describe([a.text for a in answers], [a.tokens for a in answers], ended, scores)

    def duel(self, duel: DuelConfig, sampled: Mapping[str, Sequence[Answer]]) -> dict[str, Any]:
        """The policy's answers against the opponent's, which are sampled here."""
        names = [name for name, section in self.config.answers.items() if section.duel]
        with self.engines("duel.opponent") as opponent:
            theirs = {name: self.sample(opponent, self.inputs.prompts[name]) for name in names}
        constitution = constitutions.load(duel.constitution).only(duel.principles)
        fights: dict[str, list[Judged]] = {}
        for name in names:
            pairs = zip(self.inputs.prompts[name], sampled[name], theirs[name], strict=True)
            fights[name] = [
                Judged(number, prompt.turns, [Response(ours.text), Response(other.text)])
                for number, (prompt, ours, other) in enumerate(pairs)
            ]
        everybody = [each for some in fights.values() for each in some]
        for each in everybody:
            each.make_pairs(constitution.principles, 1, self.config.seed)
        if isinstance(duel.judge, EndpointJudge):
            compare(Endpoint(duel.judge, self.config.seed), constitution, everybody, chain_of_thought=False)
        else:
            with self.engines("duel.judge") as judge:
                asked = EngineJudge(judge, option_ids(judge.reader))
                compare(asked, constitution, everybody, chain_of_thought=False)
        return {name: _fought(some) for name, some in fights.items()}

    def _item_logprobs(self, engines: Engines, prompts: Sequence[Any]) -> list[list[np.ndarray]]:
        """By item, by choice: [T] log-probabilities of the choice after the item's prompt, its EOS included."""
        reader, contexts, answers = engines.reader, [], []
        for item, prompt in zip(self.inputs.items, prompts, strict=True):
            try:
                for text in item.choices:
                    ids = answer_ids(reader.tokenizer, prompt, text)
                    contexts.append(reader.ids(prompt, len(ids)))
                    answers.append(ids)
            except BadRow as fault:
                raise DataError(
                    f"item '{item.id}' cannot be put to {engines.name}: {fault}. Raise policy.max_tokens, or leave the "
                    "item out of the file"
                ) from None
        flat = iter(engines.logprobs(contexts, answers))
        return [[next(flat).astype(np.float64) for _ in item.choices] for item in self.inputs.items]

    def _letters(self, engines: Engines) -> list[np.ndarray]:
        """By item [2, 2]: log-probabilities of the letters, in both orders of the choices."""
        templates, reader = constitutions.load(self.config.constitution).templates, engines.reader
        options, contexts = option_ids(reader), []
        longest = max(map(len, options))
        for item in self.inputs.items:
            for order in choice.orders(len(OPTIONS)):
                a, b = (item.choices[place] for place in order)
                request = templates.fill(templates.comparison, as_messages(item.prompt), self.config.question, a, b)
                try:
                    contexts.append(reader.ids(request, longest))
                except BadRow as fault:
                    raise DataError(f"item '{item.id}' cannot be put to {engines.name}: {fault}") from None
        found = engines.option_logprobs(contexts, options).astype(np.float64)
        return list(found.reshape(len(self.inputs.items), len(OPTIONS), len(OPTIONS)))

    def _item_rewards(self, reward: scoring.Scorer) -> list[np.ndarray]:
        """By item [n] scores of its choices."""
        model = scoring.tokenizer_of(reward.reward, self.config.policy.model)
        tokenizer = ensure_chat_template(load.tokenizer(model, "reward", self.config.trust_remote_code))
        both = [(item.prompt, text) for item in self.inputs.items for text in item.choices]
        prompts = [prompt_ids(tokenizer, prompt) for prompt, _ in both]
        answers = [answer_ids(tokenizer, prompt, text) for prompt, text in both]
        flat = reward.columns(prompts, answers)[:, 0].astype(np.float64)
        ends = np.cumsum([len(item.choices) for item in self.inputs.items])
        return np.split(flat, ends[:-1])


def _fought(fights: Sequence[Judged]) -> dict[str, Any]:
    """Identical answers are a tie without a question."""
    p: list[tuple[float, float]] = []
    failed = 0
    for each in fights:
        if not each.pairs:
            p.append((0.5, 0.5))
            continue
        ours_first, theirs_first = (question.p for question in each.pairs[0].questions)
        if ours_first is None or theirs_first is None:
            failed += 1
            continue
        p.append((ours_first, theirs_first))
    if 2 * failed > len(fights):
        raise JudgeError(f"the judge failed on {failed} of {len(fights)} pairs; the rest say too little")
    return {**duels.duels(np.array(p, np.float64))._asdict(), "failed": failed}
