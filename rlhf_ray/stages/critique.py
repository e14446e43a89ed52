"""Constitutional AI's supervised phase: a model answers, criticises itself by principles, and revises.

Leaves `transcripts.jsonl`, everything that was said, and `revisions.jsonl`, rows for `rlhf-ray sft`. Run again after a
crash it goes on where it stopped, and ends with the same files as an uninterrupted run.
"""

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rlhf_ray import interrupts
from rlhf_ray.config.feedback import CritiqueConfig
from rlhf_ray.data import rows
from rlhf_ray.data.quarantine import BadRow, Quarantine
from rlhf_ray.data.templates import as_messages
from rlhf_ray.feedback import constitution as constitutions
from rlhf_ray.feedback.constitution import Constitution
from rlhf_ray.feedback.critique import MOST_STEPS, Step, Transcript, sft_rows, steps
from rlhf_ray.feedback.journal import Journal
from rlhf_ray.runtime import session
from rlhf_ray.stages.engines import Engines, Reader
from rlhf_ray.telemetry.run_folder import write_rows
from rlhf_ray.telemetry.tracker import Tracker


def run(config: CritiqueConfig, address: str | None = None) -> dict[str, Any]:
    """The whole stage; returns what summary.json says. Any failure ends it with an RLHFError."""
    constitution = constitutions.load(config.constitution).only(config.principles)
    with Tracker(config, "critique", resumable=True) as tracker:
        folder = tracker.folder.path
        reader = Reader(config.generator, "generator", config.trust_remote_code)
        prompts = rows.prompts(config.data, reader.tokenizer, Quarantine(folder / "quarantine.jsonl"))
        with Journal(folder / "transcripts.jsonl") as journal:
            journal.check(_marks(config, constitution))
            if len(journal.rows) < len(prompts):
                with (
                    session.connect(address),
                    interrupts.stoppable(),
                    Engines(config.generator, reader, config, config.deadline_s) as engines,
                ):
                    _discuss_all(config, constitution, engines, prompts, journal, tracker)
            transcripts = [Transcript.of(row) for row in journal.rows]
        return _finish(config, constitution, transcripts, tracker)


def _discuss_all(
    config: CritiqueConfig,
    constitution: Constitution,
    engines: Engines,
    prompts: Sequence[rows.Prompt],
    journal: Journal,
    tracker: Tracker,
) -> None:
    """Every prompt that is not in the journal, which stands in the order of the prompts."""
    done = len(journal.rows)
    progress = tracker.progress(len(prompts), "critique", done)
    while done < len(prompts):
        began, stop = time.monotonic(), min(done + config.prompts_at_once, len(prompts))
        some = [Transcript(number, as_messages(prompts[number].turns)) for number in range(done, stop)]
        discuss(config, constitution, engines, some)
        journal.add({**each.row(), **_marks(config, constitution)} for each in some)
        metrics = _metrics(some, time.monotonic() - began)
        tracker.log(stop, metrics)
        progress.advance(len(some), tokens_per_s=metrics["critique/tokens_per_s"])
        done = stop


def discuss(
    config: CritiqueConfig, constitution: Constitution, engines: Engines, transcripts: Sequence[Transcript]
) -> None:
    """Takes `transcripts` through all steps, each step of all of them at once."""
    for step in steps(config.rounds, config.critique):
        going = [each for each in transcripts if each.dropped is None]
        asked = [(each, ids) for each in going if (ids := _ids(each, constitution, config.seed, step, engines.reader))]
        answers = engines.sample(
            [ids for _, ids in asked], [each.prompt_id * MOST_STEPS + step.number for each, _ in asked]
        )
        for (each, _), answer in zip(asked, answers, strict=True):
            each.hear(step, answer.said)


def _ids(each: Transcript, constitution: Constitution, seed: int, step: Step, reader: Reader) -> list[int] | None:
    try:
        return reader.ids(each.ask(constitution, seed, step))
    except BadRow as fault:
        each.drop(step, str(fault))
        return None


def _finish(
    config: CritiqueConfig, constitution: Constitution, transcripts: list[Transcript], tracker: Tracker
) -> dict[str, Any]:
    folder, marks = tracker.folder.path, _marks(config, constitution)
    kept = [{**row, **marks} for each in transcripts for row in sft_rows(each, config.keep)]
    path = folder / "revisions.jsonl"
    write_rows(path, kept)
    causes = Counter(each.dropped.partition(":")[0] for each in transcripts if each.dropped)
    summary = {
        "prompts": len(transcripts),
        "dropped": causes.total(),
        "dropped_at": dict(causes),
        "revisions": len(kept),
        "changed_share": _changed_share(transcripts),
        "rows": str(path),
        "transcripts": str(folder / "transcripts.jsonl"),
        **marks,
    }
    tracker.summary(summary)
    return summary


def _marks(config: CritiqueConfig, constitution: Constitution) -> dict[str, str]:
    """Where a row comes from."""
    return {"feedback_model": config.generator.model, "constitution_sha": constitution.sha}


def _metrics(transcripts: Sequence[Transcript], seconds: float) -> dict[str, float]:
    said = [
        text
        for each in transcripts
        for text in (each.response, *(part for r in each.rounds for part in (r.critique, r.revision)))
        if text is not None
    ]
    return {
        "critique/dropped_share": sum(each.dropped is not None for each in transcripts) / len(transcripts),
        "critique/changed_share": _changed_share(transcripts),
        "critique/tokens": float(sum(text.tokens for text in said)),
        "critique/tokens_per_s": sum(text.tokens for text in said) / seconds,
    }


def _changed_share(transcripts: Sequence[Transcript]) -> float:
    """Share of revisions that differ from the answer that they revise."""
    changed = []
    for each in transcripts:
        before = each.response.text if each.response else ""
        for _, _, text in each.revisions():
            changed.append(text != before)
            before = text
    return sum(changed) / len(changed) if changed else 0.0
