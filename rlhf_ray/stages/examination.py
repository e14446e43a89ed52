"""What one policy is put through: measurements of it, each by the engines that are up at the time.

Nothing is left out: an item that cannot be measured is an error, as is a measure that cannot be had. What was sampled
or measured is in the run's folder before the next thing is begun: a failure must never take away what came before it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from rlhf_ray.feedback.judging import OPTIONS, Judge, Judged, Response
from rlhf_ray.models import load
from rlhf_ray.stages import scoring
from rlhf_ray.stages.engines import Answer, Engines, Reader
from rlhf_ray.stages.judge import EngineJudge, compare, option_ids
from rlhf_ray.telemetry.progress import say
from rlhf_ray.telemetry.run_folder import RunFolder, write_rows

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
    """Measurements of one policy, each by the engines that are up at the time, and each kept as soon as it is there."""

    def __init__(self, config: EvaluateConfig, inputs: Inputs, folder: RunFolder) -> None:
        self.config, self.inputs, self.folder = config, inputs, folder
        self.summary: dict[str, Any] = {"policy": config.policy.model, "answers": {}}
        """What is known, as summary.json will say it."""
        self._known: dict[str, Sequence[Any]] = {}
        """Field of `choice.Measured` -> its values by item."""
        self._answers: dict[str, list[Answer]] = {}
        """Section of `answers` -> what the policy answered."""

    @contextmanager
    def engines(self, name: str) -> Iterator[Engines]:
        section = self.config.engines[name]
        with Engines(section, self.inputs.readers[name], self.config, self.config.deadline_s) as up:
            yield up

    def choose(self, policy: Engines) -> None:
        """What the policy's own log-probabilities say about the items."""
        found = self.inputs.items
        if not found:
            return
        say(f"{len(found)} items")
        self._know("logprobs", self._item_logprobs(policy, [item.prompt for item in found]))
        self._know("neutral", self._item_logprobs(policy, [NEUTRAL] * len(found)))
        if all(len(item.choices) == len(OPTIONS) for item in found):
            self._know("letters", self._letters(policy))

    def beside_reference(self) -> None:
        """What the reference's log-probabilities say beside them, where there is one."""
        if self.config.reference is None or not self.inputs.items:
            return
        with self.engines("reference") as reference:
            self._know("reference", self._item_logprobs(reference, [item.prompt for item in self.inputs.items]))

    def by_reward(self) -> None:
        """What `reward` says about items and pairs, where it is configured."""
        reward = self.config.reward
        if reward is None or not (self.inputs.items or self.inputs.pairs):
            return
        tokenizer = scoring.tokenizer_of(reward, self.config.policy.model)
        with scoring.scorer(reward, tokenizer, self.config, self.config.deadline_s) as up:
            if self.inputs.items:
                self._know("rewards", self._item_rewards(up))
            if self.inputs.pairs:
                outcome = reward_bench.evaluate(self.inputs.pairs, reward_bench.by_reward(up))
                self._keep(pairs=outcome.summary())

    def answer(self, policy: Engines) -> None:
        """The policy's answers to the prompts of every section."""
        for name in self.inputs.prompts:
            self._answers[name] = self._sample(policy, name)
            self._describe(name, {})

    def measure_answers(self) -> None:
        """By the rewards of every section that names some."""
        for name, section in self.config.answers.items():
            if not section.rewards:
                continue
            reward, tokenizer = RewardSection(parts=section.rewards), self.config.policy.model
            with scoring.scorer(reward, tokenizer, self.config, self.config.deadline_s) as up:
                prompts = [prompt.ids for prompt in self.inputs.prompts[name]]
                columns = up.columns(prompts, [answer.ids for answer in self._answers[name]])
            self._describe(name, {part: columns[:, place].tolist() for place, part in enumerate(section.rewards, 1)})

    def duel(self) -> None:
        """The policy's answers against the opponent's, which are sampled here, where `duel` is configured."""
        duel = self.config.duel
        if duel is None:
            return
        constitution = constitutions.load(duel.constitution).only(duel.principles)
        fights: dict[str, list[Judged]] = {}
        with self.engines("duel.opponent") as opponent:
            for name in [name for name, section in self.config.answers.items() if section.duel]:
                theirs = self._sample(opponent, name)
                triples = zip(self.inputs.prompts[name], self._answers[name], theirs, strict=True)
                fights[name] = [
                    Judged(number, prompt.turns, [Response(ours.text), Response(other.text)])
                    for number, (prompt, ours, other) in enumerate(triples)
                ]
                self._write_duel(name, fights[name])
        with self._judge(duel) as judge:
            for name, some in fights.items():
                for each in some:
                    each.make_pairs(constitution.principles, 1, self.config.seed)
                compare(judge, constitution, some, chain_of_thought=False)
                self._write_duel(name, some)
                self._keep(duel={**self.summary.get("duel", {}), name: _fought(some)})

    @contextmanager
    def _judge(self, duel: DuelConfig) -> Iterator[Judge]:
        if isinstance(duel.judge, EndpointJudge):
            yield Endpoint(duel.judge, self.config.seed)
            return
        with self.engines("duel.judge") as judge:
            yield EngineJudge(judge, option_ids(judge.reader))

    def _know(self, field: str, values: Sequence[Any]) -> None:
        """One more measurement of every item, and what the policy chooses by all that are there."""
        self._known[field] = values
        measured = [
            choice.Measured(**dict(zip(self._known, each, strict=True)))
            for each in zip(*self._known.values(), strict=True)
        ]
        results = choice.evaluate(self.inputs.items, measured)
        write_rows(self.folder.path / "items.jsonl", results.rows())
        summary = results.summary()
        if self.inputs.before is not None:
            changes = choice.compare(self.inputs.before, results.rows())
            summary["changes"] = {rule: change._asdict() for rule, change in changes.items()}
        self._keep(choices=summary)

    def _describe(self, name: str, scores: Mapping[str, list[float]]) -> None:
        """Statistics of the answers to one section's prompts; all of them are in `answers-<name>.jsonl`."""
        prompts, answers = self.inputs.prompts[name], self._answers[name]
        write_rows(
            self.folder.path / f"answers-{name}.jsonl",
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
        found = texts.describe([a.text for a in answers], [a.tokens for a in answers], ended, scores)
        self._keep(answers={**self.summary["answers"], name: found})

    def _write_duel(self, name: str, fights: Sequence[Judged]) -> None:
        """Both answers to each prompt, ours first, and what the judge has said about them."""
        write_rows(self.folder.path / f"duel-{name}.jsonl", [each.row() for each in fights])

    def _keep(self, **found: Any) -> None:
        self.summary |= found
        self.folder.write_unfinished(self.summary)

    def _sample(self, engines: Engines, name: str) -> list[Answer]:
        """An answer to each prompt of a section, read by the model's own tokenizer; the same random numbers for every
        model."""
        prompts = self.inputs.prompts[name]
        try:
            contexts = [engines.reader.ids(prompt.turns) for prompt in prompts]
        except BadRow as fault:
            raise DataError(f"a prompt cannot be put to {engines.name}: {fault}; raise policy.max_tokens") from None
        return engines.sample(contexts, range(len(prompts)))

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
