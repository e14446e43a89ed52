"""Preferences of a model that compares answers by principles: what reinforcement learning from AI feedback starts with.

Leaves `judgements.jsonl`, everything that was asked and said, and `preferences.jsonl`, rows for `rlhf-ray reward` and
`dpo`. Run again after a crash it goes on where it stopped, and ends with the same files as an uninterrupted run.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from rlhf_ray import interrupts
from rlhf_ray.config.common import DataConfig
from rlhf_ray.config.feedback import MOST_RESPONSES, EndpointJudge, JudgeConfig
from rlhf_ray.data import rows
from rlhf_ray.data.quarantine import BadRow, Quarantine
from rlhf_ray.data.templates import Message
from rlhf_ray.errors import ConfigError, JudgeError, ModelError
from rlhf_ray.feedback import constitution as constitutions
from rlhf_ray.feedback import measures
from rlhf_ray.feedback.constitution import Constitution
from rlhf_ray.feedback.endpoint import Endpoint
from rlhf_ray.feedback.journal import Journal
from rlhf_ray.feedback.judging import OPTIONS, Judge, Judged, Reply, Response, check_answers, preferences
from rlhf_ray.runtime import session
from rlhf_ray.runtime.placement import check
from rlhf_ray.stages.engines import Engines, Reader
from rlhf_ray.telemetry.run_folder import write_rows
from rlhf_ray.telemetry.tracker import Tracker


def run(config: JudgeConfig, address: str | None = None) -> dict[str, Any]:
    """The whole stage; returns what summary.json says. Any failure ends it with an RLHFError."""
    constitution = constitutions.load(config.constitution).only(config.principles)
    if config.principles_per_pair > len(constitution.principles):
        raise ConfigError(
            f"principles_per_pair is {config.principles_per_pair}, but constitution '{constitution.name}' has "
            f"{len(constitution.principles)} to draw from"
        )
    with Tracker(config, "judge", resumable=True) as tracker:
        folder = tracker.folder.path
        readers = {name: Reader(section, name, config.trust_remote_code) for name, section in config.engines.items()}
        to_judge = _read(config, readers, Quarantine(folder / "quarantine.jsonl"))
        with Journal(folder / "judgements.jsonl") as journal:
            journal.check(_marks(config, constitution))
            judged = [Judged.of(row) for row in journal.rows]
            if len(judged) < len(to_judge):
                with _models(config, readers, address) as models:
                    _judge_all(config, constitution, models, to_judge, judged, journal, tracker)
        return _finish(config, constitution, judged, tracker)


class EngineJudge:
    """A `feedback.judging.Judge` served by engines of ours."""

    def __init__(self, engines: Engines, options: list[list[int]]) -> None:
        self.engines, self.reader, self.options = engines, engines.reader, options

    def rationales(self, dialogues: Sequence[list[Message]], sample_ids: Sequence[int]) -> list[Reply]:
        """One text to each dialogue; a sample's id decides its random numbers."""

        def ask(contexts: list[list[int]], places: list[int]) -> list[Reply]:
            answers = self.engines.sample(contexts, [sample_ids[place] for place in places])
            return [
                Reply(answer.said, tokens_in=len(context), tokens_out=answer.tokens)
                for context, answer in zip(contexts, answers, strict=True)
            ]

        return self._asked(dialogues, None, ask)

    def choices(self, dialogues: Sequence[list[Message]]) -> list[Reply]:
        """Log-probabilities of the options after each dialogue."""

        def ask(contexts: list[list[int]], places: list[int]) -> list[Reply]:
            found = self.engines.option_logprobs(contexts, self.options)
            return [
                Reply(logprobs=(float(a), float(b)), tokens_in=len(context))
                for context, (a, b) in zip(contexts, found, strict=True)
            ]

        return self._asked(dialogues, max(map(len, self.options)), ask)

    def _asked(
        self,
        dialogues: Sequence[list[Message]],
        room: int | None,
        ask: Callable[[list[list[int]], list[int]], list[Reply]],
    ) -> list[Reply]:
        """`ask` about all that leaves room for so many tokens, none: for a text; what does not has failed."""
        replies: dict[int, Reply] = {}
        contexts: dict[int, list[int]] = {}
        for place, turns in enumerate(dialogues):
            try:
                contexts[place] = self.reader.ids(turns, room)
            except BadRow as fault:
                replies[place] = Reply(failed=str(fault))
        if contexts:
            replies |= zip(contexts, ask(list(contexts.values()), list(contexts)), strict=True)
        return [replies[place] for place in range(len(dialogues))]


def option_ids(reader: Reader) -> list[list[int]]:
    """Token ids of the options. Raises ModelError when the tokenizer cannot tell them apart."""
    found = [reader.option_ids([{"role": "user", "content": "?"}], option) for option in OPTIONS]
    if found[0] == found[1]:
        raise ModelError(
            f"'{reader.section.model}' cannot judge: its tokenizer makes the same tokens of {' and '.join(OPTIONS)}"
        )
    return found


def _read(config: JudgeConfig, readers: dict[str, Reader], quarantine: Quarantine) -> list[Judged]:
    """What is to be judged, in the order of the journal: rows of `data`, then those of `labelled`."""
    found: list[Judged] = []
    if config.generator:
        prompts = rows.prompts(config.data, readers["generator"].tokenizer, quarantine)
        found = [Judged(number, prompt.turns) for number, prompt in enumerate(prompts)]
    else:
        for number, row in enumerate(rows.candidates(config.data, quarantine, MOST_RESPONSES)):
            found.append(Judged(number, row.turns, [Response(text) for text in row.responses]))
    if config.labelled:
        known = rows.labelled_pairs(DataConfig(path=config.labelled), quarantine.another())
        for number, row in enumerate(known, len(found)):
            found.append(Judged(number, row.turns, [Response(text) for text in row.responses], label=row.p))
    return found


@contextmanager
def _models(
    config: JudgeConfig, readers: dict[str, Reader], address: str | None
) -> Iterator[tuple[Engines | None, Judge]]:
    """(who answers, who judges), up within it; a signal stops the run."""
    section, by = config.judge, "generator" if config.shares_engines else "judge"
    endpoint = Endpoint(section, config.seed) if isinstance(section, EndpointJudge) else None
    options = [] if endpoint else option_ids(readers[by])
    engines = {name: Engines(each, readers[name], config, config.deadline_s) for name, each in config.engines.items()}
    with ExitStack() as up:
        if engines:
            up.enter_context(session.connect(address))
            check([group for each in engines.values() for group in each.placement.wanted])
        up.enter_context(interrupts.stoppable())
        for each in engines.values():
            up.enter_context(each)
        yield engines.get("generator"), endpoint or EngineJudge(engines[by], options)


def _judge_all(
    config: JudgeConfig,
    constitution: Constitution,
    models: tuple[Engines | None, Judge],
    to_judge: Sequence[Judged],
    judged: list[Judged],
    journal: Journal,
    tracker: Tracker,
) -> None:
    """Everything that is not in the journal, a block at a time."""
    generator, judge = models
    progress = tracker.progress(len(to_judge), "judge", len(judged))
    while len(judged) < len(to_judge):
        began = time.monotonic()
        block = to_judge[len(judged) : len(judged) + config.prompts_at_once]
        if generator:
            answer(generator, [each for each in block if each.label is None], config.responses_per_prompt)
        for each in block:
            each.make_pairs(constitution.principles, config.principles_per_pair, config.seed)
        compare(judge, constitution, block, config.chain_of_thought)
        check_answers(judged, block)
        journal.add({**each.row(), **_marks(config, constitution)} for each in block)
        judged += block
        metrics = _metrics(block, time.monotonic() - began)
        tracker.log(len(judged), metrics)
        progress.advance(len(block), tokens_per_s=metrics["judge/tokens_per_s"])


def answer(generator: Engines, block: Sequence[Judged], responses: int) -> None:
    """Samples so many answers to each prompt."""
    contexts: dict[int, list[int]] = {}
    for place, each in enumerate(block):
        try:
            contexts[place] = generator.reader.ids(each.prompt)
        except BadRow as fault:
            each.dropped = str(fault)
    asked = [(place, number) for place in contexts for number in range(responses)]
    ids = [block[place].answer_id(number) for place, number in asked]
    for (place, _), answered in zip(asked, generator.sample([contexts[place] for place, _ in asked], ids), strict=True):
        block[place].take(answered.said)


def compare(judge: Judge, constitution: Constitution, block: Sequence[Judged], chain_of_thought: bool) -> None:
    """Puts every question to the judge, all of a kind at once, and concludes each pair."""
    asked = [
        (each, pair, number, question)
        for each in block
        for pair in each.pairs
        for number, question in enumerate(pair.questions)
    ]
    if chain_of_thought:
        ids = [each.rationale_id(pair, number) for each, pair, number, _ in asked]
        turns = [each.dialogue(pair, question, constitution, True) for each, pair, _, question in asked]
        for (*_, question), reply in zip(asked, judge.rationales(turns, ids), strict=True):
            question.hear(reply)
        asked = [each for each in asked if not each[-1].failed]
    turns = [each.dialogue(pair, question, constitution, chain_of_thought) for each, pair, _, question in asked]
    for (*_, question), reply in zip(asked, judge.choices(turns), strict=True):
        question.hear(reply)
    for each in block:
        for pair in each.pairs:
            pair.conclude()


def _finish(
    config: JudgeConfig, constitution: Constitution, judged: Sequence[Judged], tracker: Tracker
) -> dict[str, Any]:
    folder, marks = tracker.folder.path, _marks(config, constitution)
    own = [each for each in judged if each.label is None]
    source = {"label_source": "ai", "cot": config.chain_of_thought, **marks}
    kept = [{**row, **source} for each in own for row in preferences(each, config.most, config.labels == "hard")]
    path = folder / "preferences.jsonl"
    write_rows(path, kept)
    if not kept:
        raise JudgeError(f"no pair has a label; {folder / 'judgements.jsonl'} says why, question by question")
    questions = [question for each in judged for question in each.questions]
    failed = [question.failed.partition(":")[0] for question in questions if question.failed]
    summary = {
        "prompts": len(own),
        "prompts_dropped": sum(each.dropped is not None for each in own),
        "answers_dropped": dict(Counter(one.dropped for each in own for one in each.responses if one.dropped)),
        "pairs": sum(len(each.pairs) for each in own),
        "preferences": len(kept),
        "questions": len(questions),
        "questions_failed": dict(Counter(failed)),
        **measures.leanings(own),
        "tokens": _tokens(judged),
        "cost": _cost(config, judged),
        "calibration": measures.calibration([each for each in judged if each.label is not None]),
        "rows": str(path),
        "judgements": str(folder / "judgements.jsonl"),
        **marks,
    }
    tracker.summary(summary)
    return summary


def _metrics(block: Sequence[Judged], seconds: float) -> dict[str, float]:
    questions = [question for each in block for question in each.questions]
    answers = [one for each in block for one in each.responses]
    tokens = sum(_tokens(block).values())
    found = {**measures.leanings(block), "tokens": float(tokens), "tokens_per_s": tokens / seconds}
    if questions:
        found["failed_share"] = sum(question.failed is not None for question in questions) / len(questions)
    if answers:
        found["dropped_share"] = sum(one.dropped is not None for one in answers) / len(answers)
    return {f"judge/{name}": value for name, value in found.items()}


def _tokens(judged: Sequence[Judged]) -> dict[str, int]:
    return {
        "generated": sum(one.tokens or 0 for each in judged for one in each.responses),
        "judge_in": sum(question.tokens_in for each in judged for question in each.questions),
        "judge_out": sum(question.tokens_out for each in judged for question in each.questions),
    }


def _cost(config: JudgeConfig, judged: Sequence[Judged]) -> float:
    """Of the judge's tokens, at the configured prices."""
    if not isinstance(config.judge, EndpointJudge):
        return 0.0
    tokens = _tokens(judged)
    return (tokens["judge_in"] * config.judge.price_in + tokens["judge_out"] * config.judge.price_out) / 1e6


def _marks(config: JudgeConfig, constitution: Constitution) -> dict[str, str]:
    """Where a row comes from."""
    return {"feedback_model": config.judge.model, "constitution_sha": constitution.sha}
