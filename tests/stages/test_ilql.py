"""Offline Q-learning: the reward stands at the EOS, a step is what plain PyTorch takes, and good tokens are found."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from ranks import on_ranks
from safetensors.torch import load_file
from supervised_runs import settings, written
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_ray.config.common import DataConfig
from rlhf_ray.config.ilql import ILQLConfig
from rlhf_ray.config.load import load
from rlhf_ray.data.order import held_out_split
from rlhf_ray.data.quarantine import Quarantine
from rlhf_ray.data.rows import RewardedAnswer, rewarded_answers
from rlhf_ray.errors import DataError
from rlhf_ray.models.q_heads import FILE, SETTINGS, ActionValues, Decoder
from rlhf_ray.models.zero import BETAS, EPS
from rlhf_ray.runtime.feed import Logged, Saved, Word
from rlhf_ray.stages import ilql
from rlhf_ray.stages.ilql import ImplicitQ
from rlhf_ray.stages.supervised_rank import Job, Rank, training_tokenizer

# The first letter earns the reward: x is good, y is bad and just as frequent, z comes after either.
ROWS = [
    {
        "prompt": "abc"[row % 3] * (1 + row % 4),
        "completion": "xy"[row // 4 % 2] + "z" * (row % 3),
        "reward": (3.0, -1.0)[row // 4 % 2],
    }
    for row in range(40)
]
SMALL: dict[str, Any] = {"max_tokens": 20, "sequences_per_step": 13, "learning_rate": 3e-3}


def config(**changes: Any) -> ILQLConfig:
    return ILQLConfig.model_validate({"name": "run", "model": "m", "data": {"path": "d"}, **changes})


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


# Settings


@pytest.mark.parametrize(
    "changes", [{"tau": 1.0}, {"tau": 0.4}, {"alpha": 0.0}, {"sync_every": 0}, {"gamma": 1.1}, {"cql": -0.1}]
)
def test_a_setting_without_a_meaning_is_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        config(**changes)


def test_the_demos_configuration_is_a_configuration() -> None:
    assert load(ILQLConfig, Path(__file__).parents[2] / "configs" / "demo" / "ilql.yaml").tau == 0.7


def test_rewards_that_are_all_the_same_are_refused() -> None:
    same = [RewardedAnswer(ids(1), ids(2), 0.5), RewardedAnswer(ids(1), ids(3), 0.5)]
    with pytest.raises(DataError, match=r"all 2 rows have the reward 0\.5"):
        ImplicitQ(same, config())


# What is learnt


def test_a_rows_reward_stands_at_its_last_token_and_its_outputs_are_sums_over_its_own_tokens() -> None:
    answers = [RewardedAnswer(ids(10, 11), ids(1, 2), 6.0), RewardedAnswer(ids(20), ids(3), 2.0)]
    objective = ImplicitQ(answers, config(gamma=0.5, tau=0.75, cql=0.25, awac_beta=1.0))
    assert objective.unit == 2.0  # so rewards are 3 and 1
    seen = []

    def engine(packed: Any) -> ActionValues:
        """Of tokens 3, 1 and 2: the second row comes first."""
        seen.append(packed)
        return ActionValues(
            logprobs=torch.tensor([-1.0, -2.0, -3.0]),
            values=torch.tensor([2.0, 4.0, 6.0]),
            q=torch.tensor([[1.0, 3.0, 5.0], [1.0, 2.0, 3.0]]),
            conservative=torch.tensor([1.0, 2.0, 4.0]),
            target_q=torch.tensor([4.0, 4.0, 5.0]),
        )

    rows = np.array([1, 0])
    outputs = objective.forward(engine, rows, torch.device("cpu"))
    assert seen[0].targets.tolist() == [3, 1, 2]
    # y is 1 for the second row's only token; 0 + 6 / 2 and 3 for the first row's two.
    expected = [
        [0 + 0, 0.75 * 4, 1, math.e**2 * 1, 1, 4, 2, 4],
        [(0 + 1) + (4 + 0), 0 + 0.25 * 1, 6, 2 + 3 / math.e, 5, 9, 10, 1],
    ]
    torch.testing.assert_close(outputs, torch.tensor(expected))
    losses = [sum(row[:2]) + 0.25 * row[2] + row[3] for row in expected]
    torch.testing.assert_close(objective.losses(outputs, rows), torch.tensor(losses))

    metrics = objective.step_metrics(outputs, rows)
    assert metrics["ilql/loss"] == pytest.approx(sum(losses) / 3)  # three tokens
    assert metrics["ilql/td_loss"] == pytest.approx(5 / 3)
    assert metrics["ilql/tokens"] == 3
    advantages = np.array([2.0, 0.0, -1.0])
    assert metrics["ilql/advantage"] == pytest.approx(advantages.mean())
    assert metrics["ilql/advantage_std"] == pytest.approx(advantages.std())
    assert metrics["ilql/q_p50"] == pytest.approx((4 + 4.5) / 2)
    assert metrics["ilql/v_p10"] == pytest.approx(2 + 0.1 * 3)


def test_rewards_keep_their_mean_and_may_keep_their_unit() -> None:
    answers = [RewardedAnswer(ids(1), ids(2), 30.0), RewardedAnswer(ids(1), ids(2), 10.0)]
    assert ImplicitQ(answers, config()).rewards.tolist() == [3, 1]
    assert ImplicitQ(answers, config(scale_rewards=False)).rewards.tolist() == [30, 10]


# A step is the step of plain PyTorch


def job_of(told: dict[str, Any], world: int, train: int = 31) -> Job:
    config = ILQLConfig.model_validate(told)
    answers = rewarded_answers(config.data, training_tokenizer(config), Quarantine())
    objective = ImplicitQ(answers, config)
    return Job(config, objective, np.arange(train), np.arange(31, 40), str(Path(config.output_dir) / f"{world}"))


def logged(words: list[Word]) -> list[dict[str, float]]:
    return [word.metrics for word in words if isinstance(word, Logged)]


def taken_twice(_: int, told: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, float]]]:
    """All weights and targets after a training, by the stage and by the loops below, and the stage's metrics."""
    words: list[Word] = []

    def tell(word: Word) -> bool:
        words.append(word)
        return False

    job = job_of(told, 1)
    rank = Rank(job, 0, 1, tell)
    torch.manual_seed(1)
    for head in (rank.module.v, rank.module.q1, rank.module.q2):
        nn.init.normal_(head[2].weight, std=0.1)
    rank.module.targets = {name: torch.randn(target.shape) * 0.1 for name, target in rank.module.targets.items()}
    policy = AutoModelForCausalLM.from_pretrained(told["model"], attn_implementation="eager")
    heads = {name: copy.deepcopy(getattr(rank.module, name)) for name in ("v", "q1", "q2")}
    targets = {name: copy.deepcopy(heads[name]) for name in ("q1", "q2")}
    for name, target in targets.items():
        target.load_state_dict({key: rank.module.targets[f"{name}.{key}"] for key in target.state_dict()})
        target.requires_grad_(False)
    plain_steps(job, policy, heads, targets)
    rank.train()
    ours = {**dict(rank.module.named_parameters()), **rank.module.targets_by_name}
    theirs = nn.ModuleDict({"model": policy, **heads, **{f"target_{name}": head for name, head in targets.items()}})
    return as_arrays(ours), as_arrays(dict(theirs.named_parameters())), logged(words)


def as_arrays(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Arrays travel by value; of tensors a process that is gone would have kept the memory."""
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


def plain_steps(job: Job, policy: Any, heads: dict[str, Any], targets: dict[str, Any]) -> None:
    """The whole training, row by row and token by token."""
    config, objective = job.config, job.objective
    assert isinstance(config, ILQLConfig) and isinstance(objective, ImplicitQ)
    weights = [*policy.parameters(), *(weight for head in heads.values() for weight in head.parameters())]
    optimizer = torch.optim.AdamW(weights, lr=3e-3, betas=BETAS, eps=EPS, weight_decay=0)
    order = job.order()
    answers = rewarded_answers(config.data, training_tokenizer(config), Quarantine())
    unit = np.std([answer.reward for answer in answers])
    for step, size in enumerate((13, 13, 5), 1):
        total, count = torch.zeros(()), 0
        for row in order.take(size):
            answer = answers[row]
            sequence = torch.from_numpy(np.concatenate([answer.prompt, answer.answer]).astype(np.int64))
            found = policy(sequence[None], output_hidden_states=True)
            hidden, logp = found.hidden_states[-1][0], found.logits[0].log_softmax(-1)
            first, last = len(answer.prompt) - 1, len(sequence) - 2
            for place in range(first, last + 1):
                action = sequence[place + 1]
                v = heads["v"](hidden[place])[0]
                tables = [heads[name](hidden[place]) for name in ("q1", "q2")]
                target_q = min(targets[name](hidden[place])[action].detach() for name in ("q1", "q2"))
                if place == last:
                    y = torch.tensor(answer.reward / unit, dtype=torch.float32)
                else:
                    y = config.gamma * heads["v"](hidden[place + 1])[0].detach()
                for table in tables:
                    total = total + (table[action] - y) ** 2
                    total = total + config.cql * (table.exp().sum().log() - table[action])
                below = 1.0 if target_q < v else 0.0
                total = total + abs(config.tau - below) * (target_q - v) ** 2
                total = total - math.exp(config.awac_beta * (target_q - v).item()) * logp[place, action]
                count += 1
        optimizer.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if step % config.sync_every == 0:
            for name, target in targets.items():
                for ours, theirs in zip(target.parameters(), heads[name].parameters(), strict=True):
                    ours.data = config.alpha * theirs.data + (1 - config.alpha) * ours.data


@pytest.mark.real
def test_steps_are_those_of_plain_pytorch_and_targets_move_at_every_other_one(policy: str, tmp_path: Path) -> None:
    asked = {"tau": 0.8, "gamma": 0.9, "cql": 0.3, "awac_beta": 0.7, "alpha": 0.25, "sync_every": 2}
    told = settings(policy, written(ROWS, tmp_path / "rows.jsonl"), tmp_path, **SMALL, **asked)
    told["training"] |= {"epochs": 1, "zero": {"stage": 0}}
    told["training"]["optimizer"] |= {"schedule": "constant", "warmup_share": 0}
    told["training"]["sequences_per_step"] = 13
    [(ours, theirs, metrics)] = on_ranks(1, taken_twice, told)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        np.testing.assert_allclose(weight, theirs[name], atol=2e-4, rtol=1e-3, err_msg=name)
    assert [line["ilql/target_syncs"] for line in metrics[1:]] == [0, 1, 1]


def steps_of(rank: int, world: int, told: dict[str, Any]) -> list[Word]:
    """The words of rank 0 over a whole training, without Ray."""
    words: list[Word] = []

    def tell(word: Word) -> bool:
        words.append(word)
        return False

    Rank(job_of(told, world), rank, world, tell).train()
    return words


def saved(words: list[Word]) -> dict[str, Tensor]:
    folder = Path(next(word.path for word in words if isinstance(word, Saved)))
    return load_file(folder / "model.safetensors") | load_file(folder / FILE)


@pytest.mark.real
@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_and_micro_batches_change_no_metric_no_weight_and_no_target(
    stage: int, policy: str, tmp_path: Path
) -> None:
    large = settings(policy, written(ROWS, tmp_path / "rows.jsonl"), tmp_path, **SMALL, alpha=0.3, sync_every=2)
    large["training"]["epochs"] = 2
    one_large = on_ranks(1, steps_of, 1, large)[0]
    small = {**large["training"], "tokens_per_micro_batch": 24, "zero": {"stage": stage}}
    two_small = on_ranks(2, steps_of, 2, {**large, "training": small})[0]

    found, expected = logged(two_small), logged(one_large)
    assert len(found) == len(expected) == 1 + math.ceil(2 * 31 / 13)
    for ours, theirs in zip(found, expected, strict=True):
        kept = [name for name in ours if name != "time/step"]
        assert [ours[name] for name in kept] == pytest.approx([theirs[name] for name in kept], rel=2e-3, abs=1e-4)
    theirs_saved = saved(one_large)
    assert {name for name in theirs_saved if name.startswith("target_")} != set()
    for name, weight in saved(two_small).items():
        torch.testing.assert_close(weight, theirs_saved[name], atol=2e-3, rtol=1e-3, msg=name)


# With real workers


@pytest.mark.real
def test_values_learnt_offline_lead_a_cloned_policy_to_the_better_token(
    ray_session: None, policy: str, tmp_path: Path
) -> None:
    data = written([ROWS[0], {"prompt": "a", "completion": "x", "reward": "good"}, *ROWS[1:]], tmp_path / "rows.jsonl")
    asked = {"awac_beta": 0.0, "alpha": 0.2, "sync_every": 2, "decode_beta": 4.0}
    told = settings(policy, data, tmp_path, **{**SMALL, "learning_rate": 1e-2}, **asked)
    told["data"]["max_bad_share"] = 0.1
    told["training"]["epochs"] = 8
    summary = ilql.run(ILQLConfig.model_validate(told))

    run = tmp_path / "runs" / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # Heads begin at zero: all actions are worth the same, and the policy's loss is that of cloning.
    start = lines[0]
    assert start["ilql/conservative_loss_held_out"] == pytest.approx(2 * math.log(64), rel=1e-6)
    assert start["ilql/awac_loss_held_out"] == pytest.approx(start["ilql/cross_entropy_held_out"])
    assert start["ilql/q_p90_held_out"] == start["ilql/v_p10_held_out"] == start["ilql/advantage_std_held_out"] == 0
    assert lines[-1]["ilql/target_syncs"] == summary["steps"] // 2
    assert lines[-1]["ilql/target_distance"] > 0
    assert summary["held_out_last"]["ilql/td_loss"] < 0.3 * summary["held_out_first"]["ilql/td_loss"]
    [entry] = map(json.loads, (run / "quarantine.jsonl").read_text().splitlines())
    assert (entry["line"], entry["reason"]) == (2, "wrong type: 'reward' is str, expected a number")

    folder = Path(summary["model"])
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert [file.name for file in folder.glob("*.safetensors")] == ["model.safetensors"]  # all that vLLM would read
    kept = getattr(model.config, SETTINGS)
    assert (kept["decode_beta"], kept["sync_every"]) == (4.0, 2)
    tokens = AutoTokenizer.from_pretrained(policy)
    answers = rewarded_answers(DataConfig(path=data, max_bad_share=0.1), tokens, Quarantine())
    assert kept["reward_unit"] == pytest.approx(np.std([answer.reward for answer in answers]))

    decoder = Decoder(folder, model)
    _, held_out = held_out_split(len(answers), 0.2, 0)
    measured = [q_of(decoder, model, answers[row]) for row in held_out]
    for share in (10, 50, 90):
        expected = np.quantile(measured, share / 100)
        assert lines[-1][f"ilql/q_p{share}_held_out"] == pytest.approx(expected, abs=1e-4)
    x, y = tokens.convert_tokens_to_ids(["x", "y"])
    for row in held_out:
        prompt = torch.from_numpy(answers[row].prompt.astype(np.int64))[None]
        scores = decoder.scores(prompt)[0]
        assert scores.argmax() == x
        cloned = decoder.scores(prompt, decode_beta=0)[0]
        torch.testing.assert_close(cloned, model(prompt).logits[0, -1].log_softmax(-1), atol=1e-4, rtol=1e-4)
        # The data have as many of either; only values tell them apart.
        assert abs(cloned[x] - cloned[y]) < (scores[x] - scores[y]) / 2


def q_of(decoder: Decoder, model: Any, answer: RewardedAnswer) -> float:
    """Mean Qhat over an answer's tokens, by transformers alone."""
    sequence = torch.from_numpy(np.concatenate([answer.prompt, answer.answer]).astype(np.int64))
    with torch.no_grad():
        hidden = model(sequence[None], output_hidden_states=True).hidden_states[-1][0]
        tables = [decoder.heads[f"target_q{i}"](hidden) for i in (1, 2)]
    places = range(len(answer.prompt) - 1, len(sequence) - 1)
    return float(np.mean([min(float(table[place, sequence[place + 1]]) for table in tables) for place in places]))
