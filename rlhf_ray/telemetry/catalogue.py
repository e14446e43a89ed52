"""Every metric there is: its name, unit, meaning, and how one number is made of many.

Nothing is logged that does not stand here, and `docs/metrics.md` is generated from it:

    python -m rlhf_ray.telemetry.catalogue
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Metric:
    name: str
    """What stands in <> is a name that the configuration gives."""
    unit: str
    meaning: str
    reduction: str
    """How the logged number is made of the update's many values."""


TOKENS = "mean over answer tokens"
SEQUENCES = "mean over answers"
STEPS = "mean over answer tokens of all optimiser steps"
LAST_STEP = "last optimiser step"
ROWS = "mean over held-out rows"
PAIRS = "mean over held-out pairs"
SUM = "sum"
MAX = "max over answer tokens"
LAST = "last value"
BLOCK = "over a block of prompts"
QUESTIONS = "mean over questions"

_DPO = (
    Metric("dpo/loss", "loss", "the chosen loss: sigmoid, ipo or kto", "mean over pairs, with kto over answers"),
    Metric("rewards/chosen", "reward", "beta (log pi - log reference) of chosen (kto: desirable) answers", SEQUENCES),
    Metric("rewards/rejected", "reward", "the same of rejected (kto: undesirable) answers", SEQUENCES),
    Metric("rewards/margins", "reward", "rewards/chosen - rewards/rejected", "difference of means"),
    Metric(
        "rewards/accuracies",
        "share",
        "pairs whose better answer has the higher reward (kto: answers on their side of kto/kl); a tie is half",
        "mean over pairs, with kto over answers",
    ),
    Metric("logps/chosen", "nats/answer", "log pi of chosen (kto: desirable) answers, summed over tokens", SEQUENCES),
    Metric("logps/rejected", "nats/answer", "log pi of rejected (kto: undesirable) answers", SEQUENCES),
    Metric(
        "kto/kl",
        "nats/answer",
        "kto's reference point: log pi - log reference of answers to other prompts, at least 0",
        SEQUENCES,
    ),
)

_MEAN_OF_ANSWERS = "over answers, of each one's mean over its tokens"
_ILQL = (
    Metric("ilql/loss", "loss", "all four losses below, the conservative one by its weight `cql`", TOKENS),
    Metric("ilql/td_loss", "reward^2", "(Q - y)^2 of both heads, y = r + gamma V of the next state", TOKENS),
    Metric("ilql/expectile_loss", "reward^2", "what V is off the expectile of Qhat", TOKENS),
    Metric("ilql/conservative_loss", "nats/token", "log sum exp Q - Q of the token taken, of both heads", TOKENS),
    Metric("ilql/awac_loss", "nats/token", "cross-entropy, weighed by exp(awac_beta * advantage)", TOKENS),
    Metric("ilql/cross_entropy", "nats/token", "the same without weights", TOKENS),
    Metric("ilql/advantage", "reward", "Qhat, the smaller target's, less V", TOKENS),
    Metric("ilql/advantage_std", "reward", "spread of advantages", "standard deviation over answer tokens"),
    *(
        Metric(f"ilql/{name}_p{share}", "reward", f"{what}: {share}% of answers have less", _MEAN_OF_ANSWERS)
        for name, what in (("q", "Qhat of the tokens taken"), ("v", "V of the states"))
        for share in (10, 50, 90)
    ),
)

_RECENT = "mean over the last 100 answers"
_EVERY_START = "mean over walks from every start"

_HELD_OUT = (
    Metric("accuracy_held_out", "share", "reward/accuracy on held-out pairs", PAIRS),
    Metric(
        "length_controlled_accuracy_held_out",
        "share",
        "accuracy where the better answer is the longer, and where it is the shorter, each one half",
        "mean of two means",
    ),
    Metric("margin_held_out", "score", "reward/margin on held-out pairs", PAIRS),
    Metric(
        "ece_held_out",
        "share",
        "expected calibration error: |confidence - accuracy| in bins of confidence",
        "mean over held-out pairs",
    ),
    Metric("brier_held_out", "share^2", "(probability that chosen is better - label)^2", PAIRS),
)

SECTIONS: dict[str, tuple[Metric, ...]] = {
    "PPO: what is optimised": (
        Metric(
            "objective/kl", "nats/answer", "log p(policy) - log p(reference), summed over an answer's tokens", SEQUENCES
        ),
        Metric("objective/kl_per_token", "nats/token", "log p(policy) - log p(reference) of sampled tokens", TOKENS),
        Metric("objective/kl_coefficient", "score/nat", "beta, the price of KL in this update", LAST),
        Metric("objective/scores", "score", "what the reward gives, before any missing-EOS penalty", SEQUENCES),
        Metric("objective/scores_std", "score", "spread of the scores", "standard deviation over answers"),
        Metric(
            "objective/rlhf_reward",
            "score",
            "score - beta * KL of the answer, missing-EOS penalty included: the objective",
            SEQUENCES,
        ),
        Metric("objective/entropy", "nats/token", "entropy of the policy's next-token distribution", TOKENS),
    ),
    "PPO: policy and critic": (
        Metric(
            "policy/approxkl_avg", "nats/token", "how far updates moved the policy from the sampling one, k3", TOKENS
        ),
        Metric("policy/clipfrac_avg", "share", "tokens whose policy loss is clipped", STEPS),
        Metric("policy/grad_norm", "norm", "global norm of the policy's gradient before clipping", LAST_STEP),
        Metric("loss/policy_avg", "loss", "clipped policy loss", STEPS),
        Metric("loss/value_avg", "loss", "clipped value loss", STEPS),
        Metric("val/ratio", "ratio", "p(policy) / p(sampling policy) of sampled tokens", STEPS),
        Metric("val/ratio_max_first", "ratio", "|ratio - 1| in the first minibatch, 0 but for rounding", MAX),
        Metric("val/clipfrac_avg", "share", "tokens whose value loss is clipped", STEPS),
        Metric(
            "val/explained_variance",
            "share",
            "1 - Var(return - value) / Var(return), before the update; at most 1",
            "over all answer tokens",
        ),
        Metric("critic/grad_norm", "norm", "global norm of the critic's gradient before clipping", LAST_STEP),
        Metric("lr/policy", "1", "learning rate of the policy", LAST),
        Metric("lr/critic", "1", "learning rate of the critic", LAST),
    ),
    "PPO: rollouts": (
        Metric("tokens/prompt", "tokens", "prompt tokens, each prompt once for all its answers", SUM),
        Metric("tokens/generated", "tokens", "tokens sampled in this update", SUM),
        Metric("tokens/trained", "tokens", "those of them that the update trains on", SUM),
        Metric("tokens/total", "tokens", "tokens sampled since the run began", LAST),
        Metric("tokens/per_s", "tokens/s", "tokens/generated by time/update", "quotient"),
        Metric("tokens/response_length", "tokens", "length of an answer, EOS included", SEQUENCES),
        Metric(
            "staleness/mean",
            "updates",
            "between the weights of a prompt's oldest token and those trained",
            "mean over prompts",
        ),
        Metric("staleness/max", "updates", "the same; at most ppo.max_staleness", "max over prompts"),
        Metric(
            "busy/rollout",
            "share",
            "of the update's wall time in which an engine had prompts to answer",
            "mean over engines",
        ),
        Metric("busy/scoring", "share", "in which reference or reward had answers to score", "quotient"),
        Metric("busy/learner", "share", "in which the learner trained or published", "quotient"),
        Metric("rollout/eos_share", "share", "answers that end by themselves, not by max_new_tokens", SEQUENCES),
        Metric("rollout/logprob_gap_max", "nats", "|learner - engine| log-probability of a sampled token", MAX),
        Metric(
            "rollout/logprob_gap_p99",
            "nats",
            "|learner - engine| log-probability of a sampled token",
            "what 99% of answer tokens do not exceed",
        ),
        Metric("rollout/logprob_gap_mean", "nats", "|learner - engine| log-probability of a sampled token", TOKENS),
        Metric("correction/weight_mean", "ratio", "importance weight p(learner) / p(engine), as corrected", TOKENS),
        Metric("correction/clipped_share", "share", "tokens whose weight is cut at the cap, or masked", TOKENS),
        Metric(
            "correction/effective_sample_share",
            "share",
            "(sum w)^2 / (N sum w^2): 1 for equal weights, 1 / N if one token has all",
            "over all answer tokens",
        ),
    ),
    "Where the algorithm or the form of the KL asks for it": (
        Metric(
            "objective/kl_full",
            "nats/answer",
            "KL over the whole vocabulary, summed over an answer's tokens",
            SEQUENCES,
        ),
        Metric("loss/kl_avg", "nats/token", "KL where it is a loss, before beta", STEPS),
        Metric("rollout/prompts_dropped", "prompts", "not trained on: all their answers are paid alike", SUM),
        Metric(
            "rollout/refills", "1", "prompts without signal that one after the other had one place", "max over places"
        ),
    ),
    "Where the reward has named parts, or several models": (
        Metric("scores/<part>", "score", "what one of `reward.parts` gives, before its weight", SEQUENCES),
        Metric(
            "disagreement/<part>",
            "score",
            "standard deviation over an ensemble's members of an answer's score; <part> is `reward` if it has no name",
            SEQUENCES,
        ),
    ),
    "PPO: data between processes": (
        Metric("wire/bytes", "bytes", "columns that crossed process boundaries, weights not counted", SUM),
        Metric("wire/bytes_per_token", "bytes/token", "wire/bytes by tokens/generated", "quotient"),
        Metric("weights/version", "1", "version of the weights that the engines now hold", LAST),
        Metric("weights/bytes", "bytes", "weights sent in this publication", SUM),
        Metric("weights/publish_s", "s", "from the first byte until every engine has the last", LAST),
        Metric(
            "weights/canary_gap",
            "nats",
            "|learner - engine| log-probability after publication",
            "max over canary tokens",
        ),
    ),
    "PPO: wall time of an update, as the controller spends it": (
        Metric("time/update", "s", "the whole update, the sum of those below", LAST),
        Metric("time/generate", "s", "waiting for answers", SUM),
        Metric("time/score", "s", "waiting for scores and reference log-probabilities", SUM),
        Metric("time/learn", "s", "waiting for the learner", SUM),
        Metric("time/publish", "s", "sending weights to the engines", SUM),
        Metric("time/checkpoint", "s", "writing checkpoints", SUM),
        Metric("time/other", "s", "everything else", SUM),
    ),
    "SFT, reward model, DPO and ILQL": (
        Metric("epoch", "epochs", "passes over the data so far, fractions included", LAST),
        Metric("lr/model", "1", "learning rate", LAST),
        Metric("model/grad_norm", "norm", "global norm of the gradient before clipping", LAST),
        Metric("time/step", "s", "wall time of an optimiser step", LAST),
    ),
    "SFT": (
        Metric("sft/loss", "nats/token", "cross-entropy of completion tokens", "mean over completion tokens"),
        Metric("sft/loss_held_out", "nats/token", "the same on held-out rows", "mean over completion tokens"),
        Metric("sft/tokens", "tokens", "completion tokens of this step", SUM),
    ),
    "Reward model": (
        Metric("reward/loss", "nats/pair", "Bradley-Terry loss, centring term included", "mean over pairs"),
        Metric("reward/accuracy", "share", "pairs whose chosen answer scores higher; a tie is half", "mean over pairs"),
        Metric("reward/margin", "score", "score of chosen - score of rejected", "mean over pairs"),
        Metric("reward/tokens", "tokens", "tokens of this step, both answers", SUM),
        Metric("reward/loss_held_out", "nats/pair", "reward/loss on held-out pairs", PAIRS),
        *(Metric(f"reward/{m.name}", m.unit, m.meaning, m.reduction) for m in _HELD_OUT),
        *(
            Metric(f"reward/<source>/{m.name}", m.unit, f"reward/{m.name} of one of `data.sources`", m.reduction)
            for m in _HELD_OUT
        ),
    ),
    "DPO": (
        *_DPO,
        Metric("dpo/tokens", "tokens", "tokens of this step, prompts included", SUM),
        *(Metric(f"{m.name}_held_out", m.unit, f"{m.name} of held-out rows", m.reduction) for m in _DPO),
    ),
    "ILQL: rewards in units of their standard deviation, unless `scale_rewards` is off": (
        *_ILQL,
        Metric("ilql/tokens", "tokens", "answer tokens of this step", SUM),
        Metric("ilql/target_distance", "1", "weight of a Q head - its target's", "root mean square over weights"),
        Metric("ilql/target_syncs", "1", "times that targets moved: steps // sync_every", LAST),
        *(Metric(f"{m.name}_held_out", m.unit, f"{m.name} of held-out rows", m.reduction) for m in _ILQL),
    ),
    "RLlib": (
        Metric("rllib/loss", "loss", "RLlib's whole loss", LAST_STEP),
        Metric("rllib/value_loss", "reward^2", "PPO: squared error of the value function", LAST_STEP),
        Metric("rllib/entropy", "nats/token", "PPO: entropy of the policy", LAST_STEP),
        Metric("rllib/q", "reward", "DQN: Q of the tokens replayed", LAST_STEP),
        Metric("rllib/return", "reward", "score - beta cross-entropy of answers sampled to learn", _RECENT),
        Metric("rllib/optimality", "share", "fewest steps by steps taken, 0 for a walk that fails", _EVERY_START),
        Metric("rllib/kl", "nats/answer", "KL to the reference, summed over states", _EVERY_START),
        Metric("rllib/answer_tokens", "tokens", "length of a walk", _EVERY_START),
    ),
    "Evaluate": (
        Metric(
            "choices/<rule>", "share", "items of which the rule chooses the right answer, ties half", "mean over items"
        ),
        Metric(
            "pairs/accuracy", "share", "pairs of which `reward` prefers the chosen answer, ties half", "mean over pairs"
        ),
        Metric("answers/<name>/<measure>", "score", "the measure of sampled answers", SEQUENCES),
        Metric("answers/<name>/tokens", "tokens", "length of a sampled answer, EOS included", SEQUENCES),
        Metric("answers/<name>/commonest_5gram", "share", "answers that have the commonest 5-gram of words", SEQUENCES),
        Metric(
            "duel/<name>/win_rate",
            "share",
            "pairs that the policy wins against the opponent, ties half",
            "mean over pairs",
        ),
    ),
    "Critique": (
        Metric("critique/dropped_share", "share", "prompts that ended in a text cut short, empty or too long", BLOCK),
        Metric("critique/changed_share", "share", "revisions that differ from the answer that they revise", BLOCK),
        Metric("critique/tokens", "tokens", "tokens sampled", SUM),
        Metric("critique/tokens_per_s", "tokens/s", "critique/tokens by the seconds of the block", "quotient"),
    ),
    "Judge": (
        Metric(
            "judge/position_bias", "share", "probability of (A), either answer standing there once, - 0.5", QUESTIONS
        ),
        Metric(
            "judge/flip_rate",
            "share",
            "comparisons whose preference changes with the order; undecided in one order: half",
            "mean over pairs and principles",
        ),
        Metric("judge/option_mass", "share", "probability that the judge says (A) or (B) at all", QUESTIONS),
        Metric("judge/low_mass_share", "share", "questions whose judge/option_mass is below one half", QUESTIONS),
        Metric(
            "judge/spread",
            "share",
            "standard deviation over principles of p that the first answer is better",
            "mean over pairs",
        ),
        Metric("judge/failed_share", "share", "questions that the judge did not answer", BLOCK),
        Metric("judge/dropped_share", "share", "answers that are not compared: truncated, empty or identical", BLOCK),
        Metric("judge/tokens", "tokens", "answers sampled, and what the judge read and wrote", SUM),
        Metric("judge/tokens_per_s", "tokens/s", "judge/tokens by the seconds of the block", "quotient"),
    ),
}

CATALOGUE: dict[str, Metric] = {metric.name: metric for section in SECTIONS.values() for metric in section}


_FAMILIES = [re.compile(re.sub("<.*?>", "[A-Za-z0-9][A-Za-z0-9_-]*", name)) for name in CATALOGUE if "<" in name]


def check(names: Iterable[str]) -> None:
    """ValueError when a name (the keys, given a dict) is not in the catalogue: a bug of ours."""
    for name in names:
        if name not in CATALOGUE and not any(family.fullmatch(name) for family in _FAMILIES):
            close = difflib.get_close_matches(name, CATALOGUE, n=1)
            meant = f"; did you mean '{close[0]}'?" if close else ""
            raise ValueError(f"metric '{name}' is not in rlhf_ray/telemetry/catalogue.py{meant}")


def markdown() -> str:
    """The page `docs/metrics.md`."""
    lines = [
        "# Metrics",
        "",
        "<!-- Generated by `python -m rlhf_ray.telemetry.catalogue`; edit `rlhf_ray/telemetry/catalogue.py`. -->",
        "",
        "Each line of a run's `metrics.jsonl` is one update (PPO) or optimiser step (SFT, reward model): its number",
        "`update`, its time `time` in Unix seconds, and metrics of the names below. A value that is not finite is",
        "`null`. W&B gets the same names and values. A metric that could not be had is absent, never zero. What stands",
        "in `<>` is a name that the configuration gives.",
    ]
    for title, section in SECTIONS.items():
        lines += ["", f"## {title}", "", "| Name | Unit | Meaning | Reduction |", "| --- | --- | --- | --- |"]
        lines += [f"| `{m.name}` | {m.unit} | {_cell(m.meaning)} | {m.reduction} |" for m in section]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    page = Path(__file__).parents[2] / "docs" / "metrics.md"
    page.write_text(markdown(), encoding="utf-8")
    print(f"wrote {page}")
