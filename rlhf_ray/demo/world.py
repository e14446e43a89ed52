"""The demo's data: dialogues, demonstrations, preferences and prompts, all drawn from one seed.

People in this world answer well, wrongly, evasively and harmfully, in the proportions below, and a model trained on
them can only be as good as their mixture; what PPO adds is then its own doing. No held-out prompt may occur in
anything that is trained on; its facts do, asked in other words.
"""

from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple

from rlhf_ray.demo import people
from rlhf_ray.demo.language import (
    ADMISSIONS,
    COURTESIES,
    DEEDS,
    EVASIONS,
    GUESSES,
    PROMPTS,
    REFUSALS,
    RIDDLES,
    SUGGESTIONS,
    TOPICS,
    Kind,
    Question,
    sentences,
    statements,
)
from rlhf_ray.telemetry.run_folder import write_rows

Split = Literal["train", "held_out"]
Behaviour = Literal["good", "curt", "bad", "evade", "admit", "refuse", "astray", "broken"]
"""good: the best answer; curt: right, but no way out is offered; bad: a wrong fact, a guess, or steps to do harm;
astray: about something else; broken: cut off, repeated, shuffled or run into another."""
Mix = dict[Kind, dict[Behaviour, float]]

CORPUS_MIX: Mix = {
    "benign": {"good": 0.6, "bad": 0.1, "evade": 0.18, "admit": 0.05, "refuse": 0.05, "broken": 0.02},
    "honesty": {"good": 0.1, "curt": 0.1, "bad": 0.5, "evade": 0.23, "refuse": 0.05, "broken": 0.02},
    "decline": {"good": 0.1, "curt": 0.1, "bad": 0.5, "evade": 0.23, "admit": 0.05, "broken": 0.02},
}
"""How people talk when nobody asks them to do well."""
SFT_MIX: Mix = {
    "benign": {"good": 0.45, "bad": 0.2, "evade": 0.2, "admit": 0.05, "refuse": 0.06, "broken": 0.04},
    "honesty": {"good": 0.12, "curt": 0.15, "bad": 0.44, "evade": 0.2, "refuse": 0.05, "broken": 0.04},
    "decline": {"good": 0.12, "curt": 0.15, "bad": 0.44, "evade": 0.2, "admit": 0.05, "broken": 0.04},
}
"""How paid demonstrators of mixed care answer."""
PAIR_MIX: Mix = {
    "benign": {"good": 0.36, "bad": 0.2, "evade": 0.12, "admit": 0.04, "refuse": 0.1, "astray": 0.08, "broken": 0.1},
    "honesty": {"good": 0.2, "curt": 0.15, "bad": 0.3, "evade": 0.12, "refuse": 0.08, "astray": 0.05, "broken": 0.1},
    "decline": {"good": 0.2, "curt": 0.15, "bad": 0.3, "evade": 0.12, "admit": 0.08, "astray": 0.05, "broken": 0.1},
}
"""What people compare: also the ways in which models fail. A reward model that never saw these cannot forbid them."""

HELD_OUT_SHARE = 0.2
Shares = tuple[str, ...]
"""Topics of successive prompts, gone through again and again."""
ROUND: Shares = (*TOPICS, "own", "own", "honesty", "decline", "honesty", "decline", "honesty", "decline")
"""The usual shares: 7 of 13 benign, 3 of 13 each of the others."""

_BENIGN = [question for question in PROMPTS.values() if question.kind == "benign"]


class Sizes(NamedTuple):
    """Rows of each file that `World.write` makes."""

    corpus: int = 20_000
    sft: int = 2_000
    preferences: int = 4_000
    prompts_train: int = 1_600
    prompts_held_out: int = 384


USUAL = Sizes()


class World:
    """One seed's split of the prompts and everything drawn from it. The same seed gives the same rows."""

    def __init__(self, seed: int):
        self.seed = seed
        self._prompts: dict[Split, dict[str, list[str]]] = {"train": {}, "held_out": {}}
        rng = self.rng("split")
        for topic in sorted(set(ROUND)):
            prompts = [prompt for prompt, question in PROMPTS.items() if question.topic == topic]
            rng.shuffle(prompts)
            cut = round(len(prompts) * HELD_OUT_SHARE)
            self._prompts["held_out"][topic], self._prompts["train"][topic] = prompts[:cut], prompts[cut:]

    def rng(self, purpose: str) -> Random:
        """A generator of its own for each purpose: more rows of one file change no other file."""
        return Random(f"{self.seed} {purpose}")

    def corpus(self, n: int) -> list[dict[str, Any]]:
        """`n` dialogues {"messages"} of one or two exchanges, for training the base model."""
        rng = self.rng("corpus")
        prompts = iter(self.draw(2 * n, rng))
        return [
            {"messages": [m for _ in range(rng.choice((1, 2))) for m in _exchange(next(prompts), CORPUS_MIX, rng)]}
            for _ in range(n)
        ]

    def sft_rows(self, n: int) -> list[dict[str, Any]]:
        """`n` demonstrations {"messages"} of one exchange."""
        rng = self.rng("sft")
        return [{"messages": _exchange(prompt, SFT_MIX, rng)} for prompt in self.draw(n, rng)]

    def prompts(self, n: int, split: Split = "train", shares: Shares = ROUND) -> list[dict[str, Any]]:
        """`n` different prompts {"prompt", "kind"}. Raises ValueError when the split has fewer."""
        rng = self.rng(f"prompts {split}")
        pools = {topic: iter(rng.sample(pool, len(pool))) for topic, pool in self._prompts[split].items()}
        chosen = [prompt for topic in islice(cycle(shares), n) if (prompt := next(pools[topic], None)) is not None]
        if len(chosen) < n:
            raise ValueError(f"{n} different {split} prompts asked for; only {len(chosen)} can be had in these shares")
        rng.shuffle(chosen)
        return [{"prompt": prompt, "kind": PROMPTS[prompt].kind} for prompt in chosen]

    def candidate_answers(self, prompt: str, n: int, rng: Random) -> list[str]:
        """`n` answers for people to compare."""
        return [answer(PROMPTS[prompt], PAIR_MIX, rng) for _ in range(n)]

    def draw(self, n: int, rng: Random, split: Split = "train", shares: Shares = ROUND) -> list[str]:
        """`n` prompts of a split, repeats allowed."""
        prompts = [rng.choice(self._prompts[split][topic]) for topic in islice(cycle(shares), n)]
        rng.shuffle(prompts)
        return prompts

    def write(self, folder: str | Path, sizes: Sizes = USUAL) -> None:
        """Writes corpus, sft, preferences, prompts_train and prompts_held_out, each a .jsonl file, into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = {
            "corpus": self.corpus(sizes.corpus),
            "sft": self.sft_rows(sizes.sft),
            "preferences": people.preference_rows(self, sizes.preferences),
            "prompts_train": self.prompts(sizes.prompts_train, "train"),
            "prompts_held_out": self.prompts(sizes.prompts_held_out, "held_out"),
        }
        for name, rows in files.items():
            write_rows(folder / f"{name}.jsonl", rows)


def _exchange(prompt: str, mix: Mix, rng: Random) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": answer(PROMPTS[prompt], mix, rng)},
    ]


def answer(question: Question, mix: Mix, rng: Random) -> str:
    """One answer as the mix has it."""
    shares = mix[question.kind]
    behaviour = rng.choices(list(shares), weights=list(shares.values()))[0]
    if behaviour == "broken":
        return _broken(said(question, "good", rng), rng)
    courtesy = f"{rng.choice(COURTESIES)} " if rng.random() < 0.2 else ""
    return courtesy + said(question, behaviour, rng)


def said(question: Question, behaviour: Behaviour, rng: Random) -> str:
    """What somebody who behaves like this says; anything but broken."""
    if behaviour == "evade":
        return rng.choice(EVASIONS)
    if behaviour == "astray":
        return _fact(rng.choice(_BENIGN), rng.random() < 0.5, rng)
    if behaviour == "admit" or (question.kind == "honesty" and behaviour in ("good", "curt")):
        return _sober(ADMISSIONS, "honesty", behaviour, rng)
    if behaviour == "refuse" or (question.kind == "decline" and behaviour in ("good", "curt")):
        return _sober(REFUSALS, "decline", behaviour, rng)
    if question.kind == "decline":
        return DEEDS[question.subject][1]
    if question.kind == "honesty":
        return rng.choice(GUESSES).format(value=rng.choice(RIDDLES[question.subject]))
    return _fact(question, behaviour == "good", rng)


def _sober(sayings: tuple[str, ...], kind: Kind, behaviour: Behaviour, rng: Random) -> str:
    """With the way out when good, without when curt; out of place, either."""
    offers = behaviour == "good" or (behaviour != "curt" and rng.random() < 0.5)
    return f"{rng.choice(sayings)} {SUGGESTIONS[kind]}" if offers else rng.choice(sayings)


def _fact(question: Question, right: bool, rng: Random) -> str:
    if question.topic == "own":
        things = [thing for thing in DEEDS if (thing == question.subject) == right]
        return DEEDS[rng.choice(things)][1]
    topic = TOPICS[question.topic]
    value = topic.facts[question.subject] if right else topic.mistake(question.subject)
    return rng.choice(statements(question.topic, question.subject, value))


def _broken(text: str, rng: Random) -> str:
    words = text.split()
    match rng.choice(("cut", "repeated", "shuffled", "run into another")):
        case "cut":
            return " ".join(words[: rng.randrange(1, len(words))])
        case "repeated":
            return " ".join([sentences(text)[0]] * rng.choice((2, 3)))
        case "shuffled":
            rng.shuffle(words)
            return " ".join(words)
        case _:
            other = _fact(rng.choice(_BENIGN), True, rng).split()
            return " ".join([*words[: rng.randrange(1, len(words))], *other[-rng.randrange(1, len(other)) :]])
