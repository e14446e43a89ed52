"""SFT and reward model: the same gradient however it is computed, errors in one sentence, folders that load."""

import json
import math
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as some
from ranks import on_ranks
from safetensors.torch import load_file
from supervised_runs import settings, written
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_ray.algorithms.logprobs import TokenStatistics
from rlhf_ray.config.common import DataConfig, MixedDataConfig
from rlhf_ray.config.supervised import RewardConfig, SFTConfig, SupervisedConfig
from rlhf_ray.data.order import held_out_by_source, held_out_split
from rlhf_ray.data.quarantine import Quarantine
from rlhf_ray.data.rows import PreferencePair, SFTExample, preference_pairs, sft_examples
from rlhf_ray.errors import (
    ConfigError,
    DataError,
    DeadlineError,
    ModelError,
    ResourceError,
    StopRequested,
    TrainingError,
)
from rlhf_ray.models import load
from rlhf_ray.runtime.feed import Failed, Feed, Joined, Logged, Saved, Word
from rlhf_ray.stages import reward, sft, supervised
from rlhf_ray.stages.reward import Preferences
from rlhf_ray.stages.sft import NextToken
from rlhf_ray.stages.supervised_rank import Job, Objective, Rank, Rows, passes, training_tokenizer
from rlhf_ray.telemetry.tracker import Tracker

SFT_ROWS = [{"prompt": "abc"[row % 3] * (1 + row % 4), "completion": "xyz"[row % 3] * 2 + "0"} for row in range(40)]
# x is better than y, and people are seven eighths sure of it; some rows say so the other way round.
PAIRS = [
    {
        "prompt": "abc"[row % 3],
        "chosen": "yx"[row % 4 > 0] * (1 + row % 3),
        "rejected": "xy"[row % 4 > 0] * (1 + row % 2),
    }
    | {"p": 0.875 if row % 4 > 0 else 0.125}
    for row in range(40)
]


# What a pass, a step and an epoch are


@given(some.lists(some.integers(1, 50), min_size=1, max_size=30), some.integers(50, 200), some.integers(1, 5))
def test_ranks_share_rows_out_whole_and_pass_equally_often(lengths: list[int], budget: int, world: int) -> None:
    shares = [passes(lengths, budget, rank, world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    real = [batch.places for share in shares for batch in share if batch.real]
    assert sorted(place for places in real for place in places) == list(range(len(lengths)))
    assert all(sum(lengths[place] for place in places) <= budget for places in real)


def test_a_rank_without_rows_still_passes_so_that_the_others_need_not_wait() -> None:
    assert [batch.real for batch in passes([5], 10, 1, 2)] == [False]


def test_an_epoch_ends_in_the_step_that_draws_its_last_row() -> None:
    config = SFTConfig.model_validate(
        {"name": "run", "model": "m", "data": {"path": "d"}, "training": {"epochs": 2, "sequences_per_step": 4}}
    )
    job = Job(config, _Nothing(10), np.arange(10), np.arange(0), "")
    assert job.steps == 5
    # Rows drawn after each step: 4, 8, 12 (the tenth is in it), 16, 20.
    assert [job.ends_epoch(step) for step in range(1, 6)] == [False, False, True, False, True]


# What is learnt


def test_sft_learns_only_what_the_mask_names() -> None:
    ids = np.array([10, 11, 12, 13], np.int32)
    objective = NextToken(
        [SFTExample(ids, np.array([False, False, True, True])), SFTExample(ids[:2], np.ones(2, bool))]
    )
    assert objective.weights.tolist() == [2, 1]  # nothing predicts the first token of the second
    logprobs = torch.tensor([-1.0, -2.0, -5.0])
    outputs = objective.forward(
        lambda packed: TokenStatistics(logprobs, logprobs), np.array([0, 1]), torch.device("cpu")
    )
    assert outputs.tolist() == [[3.0], [5.0]]
    assert objective.step_metrics(outputs, np.array([0, 1])) == {"sft/loss": pytest.approx(8 / 3), "sft/tokens": 3.0}


def test_soft_labels_margins_and_centring_reach_the_loss() -> None:
    pair = (np.array([1], np.int32), np.array([2], np.int32), np.array([3, 4], np.int32))
    objective = Preferences([PreferencePair(*pair, margin=0.5, p=0.75), PreferencePair(*pair)], centre=0.1)
    outputs = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    half = 1 / (1 + math.exp(-0.5))  # of d = 2 - 1 - 0.5
    first = -(0.75 * math.log(half) + 0.25 * math.log(1 - half)) + 0.1 * 9
    second = -math.log(1 / (1 + math.exp(1.0))) + 0.1 * 1
    torch.testing.assert_close(objective.losses(outputs, np.array([0, 1])), torch.tensor([first, second]))
    torch.testing.assert_close(objective.losses(outputs[1:], np.array([1])), torch.tensor([second]))
    metrics = objective.step_metrics(outputs, np.array([0, 1]))
    assert metrics == {
        "reward/loss": pytest.approx((first + second) / 2),
        "reward/accuracy": 0.5,
        "reward/margin": 0.0,
        "reward/tokens": 10.0,
    }


def sourced(source: str, p: float, *lengths: int) -> PreferencePair:
    answers = (np.arange(length, dtype=np.int32) for length in lengths)
    return PreferencePair(np.array([1], np.int32), *answers, p=p, source=source)


def test_held_out_pairs_are_measured_together_and_by_source() -> None:
    pairs = [sourced("people", 1.0, 2, 1), sourced("ai", 0.0, 2, 3), sourced("ai", 0.75, 1, 4), sourced("x", 1.0, 1, 2)]
    objective = Preferences(pairs, centre=0.0)
    logit = math.log(0.8 / 0.2)
    outputs = torch.tensor([[logit, 0.0], [0.0, logit], [0.0, logit]])
    found = objective.held_out_metrics(outputs, np.array([0, 1, 2]))
    # Predictions 0.8, 0.2, 0.2 for labels 1, 0, 0.75: right, right, wrong. Better answers: longer, longer, shorter.
    assert found == pytest.approx(
        {
            "reward/loss_held_out": (-2 * math.log(0.8) - 0.75 * math.log(0.2) - 0.25 * math.log(0.8)) / 3,
            "reward/accuracy_held_out": 2 / 3,
            "reward/length_controlled_accuracy_held_out": 0.5,
            "reward/margin_held_out": -logit / 3,
            "reward/ece_held_out": 0.8 - 2.25 / 3,
            "reward/brier_held_out": (0.04 + 0.04 + 0.55**2) / 3,
            # Of one source, without pairs on both sides: no accuracy is controlled for length.
            "reward/people/accuracy_held_out": 1.0,
            "reward/people/margin_held_out": logit,
            "reward/people/ece_held_out": 0.2,
            "reward/people/brier_held_out": 0.04,
            "reward/ai/accuracy_held_out": 0.5,
            "reward/ai/length_controlled_accuracy_held_out": 0.5,
            "reward/ai/margin_held_out": -logit,
            "reward/ai/ece_held_out": 0.8 - 1.25 / 2,
            "reward/ai/brier_held_out": (0.04 + 0.55**2) / 2,
        },
        rel=1e-5,
    )
    tables = objective.report(outputs, np.array([0, 1, 2]))["reliability"]
    assert list(tables) == ["all", "ai", "people"]
    assert tables["ai"]["count"] == [2.0] and tables["all"]["count"] == [3.0]
    assert tables["ai"]["predicted"] == pytest.approx([0.8]) and tables["ai"]["share"] == pytest.approx([1.25 / 2])


def test_rows_are_drawn_by_the_weights_of_their_sources_and_never_from_those_held_out() -> None:
    sources = {"people": {"path": "p", "weight": 3}, "ai": {"path": "a", "weight": 1}}
    config = RewardConfig.model_validate({"name": "x", "model": "m", "data": {"sources": sources}})
    objective = Preferences([sourced(name, 1.0, 1, 2) for name in ["people"] * 4 + ["ai"] * 8], centre=0.0)
    train, held_out = held_out_by_source(objective.sources, 0.25, 0)
    rows = train[Job(config, objective, train, held_out, "").order().take(len(train))]
    assert len(rows) == 9 and not set(rows) & set(held_out)
    assert objective.sources[rows].tolist().count("people") == 7  # 9 * 3 / 4, and the larger remainder


def test_a_pair_lies_in_one_pass_chosen_first() -> None:
    objective = Preferences(
        [
            PreferencePair(*(np.array(ids, np.int32) for ids in ([10 * n], [10 * n + 1], [10 * n + 2, 3])))
            for n in (1, 2)
        ],
        centre=0.0,
    )
    seen = []

    def engine(packed: Any) -> Tensor:
        seen.append(packed)
        return torch.arange(4.0)

    assert objective.lengths.tolist() == [5, 5]
    outputs = objective.forward(engine, np.array([1, 0]), torch.device("cpu"))
    assert seen[0].ids.tolist() == [20, 21, 20, 22, 3, 10, 11, 10, 12, 3]
    assert outputs.tolist() == [[0.0, 1.0], [2.0, 3.0]]


# The gradient does not depend on who computes it


def steps_of(rank: int, world: int, kind: str, settings: dict[str, Any]) -> list[Word]:
    """The words of rank 0 over a whole training, without Ray."""
    config: Any = (SFTConfig if kind == "sft" else RewardConfig).model_validate(settings)
    tokens = training_tokenizer(config)
    objective: Objective
    if kind == "sft":
        objective = NextToken(sft_examples(config.data, tokens, Quarantine()))
    else:
        objective = Preferences(preference_pairs(config.data, tokens, Quarantine()), config.centre)
    words: list[Word] = []

    def tell(word: Word) -> bool:
        words.append(word)
        return False

    job = Job(config, objective, np.arange(31), np.arange(31, 40), str(Path(config.output_dir) / f"{world}"))
    Rank(job, rank, world, tell).train()
    return words


def compare(found: list[Word], expected: list[Word]) -> None:
    metrics, oracle = ([word.metrics for word in words if isinstance(word, Logged)] for words in (found, expected))
    assert len(metrics) == 1 + math.ceil(4 * 31 / 13)
    for ours, theirs in zip(metrics, oracle, strict=True):
        kept = [name for name in ours if name != "time/step"]
        assert [ours[name] for name in kept] == pytest.approx([theirs[name] for name in kept], rel=2e-3, abs=1e-4)
    ours, theirs = (load_file(Path(saved_in(words)) / "model.safetensors") for words in (found, expected))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], atol=2e-3, rtol=1e-3, msg=name)


def saved_in(words: list[Word]) -> str:
    return next(word.path for word in words if isinstance(word, Saved))


@pytest.mark.real
@pytest.mark.parametrize(("kind", "stage"), [("sft", 2), ("reward", 3)])
def test_ranks_and_micro_batches_change_no_loss_no_norm_and_no_weight(
    kind: str, stage: int, policy: str, tmp_path: Path
) -> None:
    rows = SFT_ROWS if kind == "sft" else PAIRS
    large = settings(policy, written(rows, tmp_path / "rows.jsonl"), tmp_path)
    large["data"]["max_tokens"] = 20
    large["training"]["sequences_per_step"] = 13  # of which one rank gets seven and needs more passes for them
    one_large = on_ranks(1, steps_of, 1, kind, large)[0]
    small = {**large["training"], "tokens_per_micro_batch": 20, "zero": {"stage": stage}}
    two_small = on_ranks(2, steps_of, 2, kind, {**large, "training": small})[0]
    compare(two_small, one_large)


def refused(rank: int, settings: dict[str, Any]) -> str:
    try:
        steps_of(rank, 1, "sft", settings)
    except TrainingError as error:
        return str(error)
    return ""


@pytest.mark.real
def test_a_loss_that_is_not_finite_stops_the_training_before_the_step(policy: str, tmp_path: Path) -> None:
    broken = str(shutil.copytree(policy, tmp_path / "broken"))
    model = AutoModelForCausalLM.from_pretrained(broken)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    model.save_pretrained(broken)
    told = settings(broken, written(SFT_ROWS, tmp_path / "rows.jsonl"), tmp_path)
    said = on_ranks(1, refused, told)[0]
    assert re.match(
        r"the loss of step 1 is nan \(learning rate 0\.\d+, 12 rows of \d+ tokens\); the step was not taken", said
    )


# Bad input, before any worker starts


def test_input_is_refused_before_ray_starts(policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervised.session, "connect", lambda _: pytest.fail("Ray was asked for"))
    data = written(SFT_ROWS, tmp_path / "rows.jsonl")

    def attempt(model: str = policy, data: str = data, **changes: Any) -> SFTConfig:
        return SFTConfig.model_validate(settings(model, data, tmp_path, **changes))

    with pytest.raises(ModelError, match="model: '/nowhere' does not exist"):
        sft.run(attempt(model="/nowhere"))
    with pytest.raises(DataError, match="empty data set"):
        sft.run(attempt(data=written([], tmp_path / "empty.jsonl")))
    with pytest.raises(DataError, match="all rows bad"):
        sft.run(attempt(data=written([{"text": "a"}] * 3, tmp_path / "bad.jsonl")))
    long = written([{"prompt": "a" * 300, "completion": "b"}], tmp_path / "long.jsonl")
    with pytest.raises(ModelError, match=r"context of 256 tokens, and the longest row has 3.*data.max_tokens to 256"):
        sft.run(attempt(data=long).model_copy(update={"data": MixedDataConfig(path=long, max_tokens=1000)}))


def test_a_pair_longer_than_a_micro_batch_is_refused(policy: str, tmp_path: Path) -> None:
    pairs = written([{"prompt": "a" * 20, "chosen": "b", "rejected": "c"}], tmp_path / "pairs.jsonl")
    told = settings(policy, pairs, tmp_path, training={"tokens_per_micro_batch": 32})
    with pytest.raises(ConfigError, match=r"micro_batch is 32, but the longest row has 4[0-9] tokens"):
        reward.run(RewardConfig.model_validate(told))


def test_a_tokenizer_without_a_pad_token_is_given_one_of_its_own(policy: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(policy, tmp_path / "copy"))
    tokens = AutoTokenizer.from_pretrained(folder)
    tokens.pad_token = None
    tokens.save_pretrained(folder)
    made = training_tokenizer(SFTConfig.model_validate(settings(str(folder), "d", tmp_path)))
    assert made.pad_token == "<unk>" and made.pad_token_id != made.eos_token_id


# With real workers


class Trouble(Objective):
    """An objective that never gets as far as a model."""

    outputs = 1

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.lengths = self.weights = np.ones(4, np.int64)
        self.sources = np.full(4, "")

    def module(self, config: SupervisedConfig) -> nn.Module:
        if self.kind == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "raises":
            raise ModelError("these weights are damaged")
        raise ZeroDivisionError("a bug of ours")

    def forward(self, engine: Any, rows: Rows, device: torch.device) -> Tensor:
        raise NotImplementedError

    losses = step_metrics = held_out_metrics = forward  # type: ignore[assignment]


class _Nothing(Trouble):
    def __init__(self, rows: int) -> None:
        self.lengths = self.weights = np.ones(rows, np.int64)


@pytest.mark.real
def test_sft_lowers_the_loss_and_leaves_an_ordinary_model(ray_session: None, policy: str, tmp_path: Path) -> None:
    told = settings(policy, written(SFT_ROWS, tmp_path / "rows.jsonl"), tmp_path, checkpoint={"every": 5, "keep": 2})
    summary = sft.run(SFTConfig.model_validate(told))
    assert summary["loss_last"] < 0.5 * summary["loss_first"]
    assert summary["held_out_last"]["sft/loss"] < 0.5 * summary["held_out_first"]["sft/loss"]
    run = tmp_path / "runs" / "run"
    assert json.loads((run / "summary.json").read_text()) == summary
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == list(range(summary["steps"] + 1))
    assert sorted(place.name for place in (run / "checkpoints").iterdir()) == ["final", "step_000010"]
    assert not (run / "ray_train").exists()

    # The held-out loss, by transformers alone.
    model, tokens = (
        AutoModelForCausalLM.from_pretrained(summary["model"]),
        AutoTokenizer.from_pretrained(summary["model"]),
    )
    examples = sft_examples(DataConfig(path=told["data"]["path"]), tokens, Quarantine())
    _, held_out = held_out_split(len(examples), 0.2, 0)
    losses = []
    for example in (examples[row] for row in held_out):
        ids = torch.from_numpy(example.ids.astype(np.int64))
        with torch.no_grad():
            logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        losses.append(-logprobs[torch.from_numpy(example.loss_mask[1:])])
    assert torch.cat(losses).mean().item() == pytest.approx(summary["held_out_last"]["sft/loss"], rel=1e-4)
    assert tokens.chat_template == tiny.CHAT


@pytest.mark.real
def test_a_reward_model_learns_the_preference_and_keeps_the_scale_of_its_scores(
    ray_session: None, policy: str, tmp_path: Path
) -> None:
    told = settings(policy, "", tmp_path)
    told["data"] = {"max_tokens": 32, "sources": {}}
    for name, listed in (("people", PAIRS[:28]), ("ai", PAIRS[28:])):
        file = written(listed, tmp_path / f"{name}.jsonl")
        told["data"]["sources"][name] = {"path": file, "weight": 0.5}
    config = RewardConfig.model_validate(told)
    summary = reward.run(config)
    measured = summary["held_out_last"]
    assert measured["reward/accuracy"] == measured["reward/people/accuracy"] == measured["reward/ai/accuracy"] == 1.0
    assert {name: sum(table["count"]) for name, table in summary["reliability"].items()} == {
        "all": 8,
        "ai": 2,
        "people": 6,
    }
    run = tmp_path / "runs" / "run"
    assert json.loads((run / "summary.json").read_text()) == summary
    assert (run / "reliability.png").exists()
    # At labels of 7/8 the best loss is their entropy; a model of hard labels would be far above.
    entropy = -(0.875 * math.log(0.875) + 0.125 * math.log(0.125))
    assert entropy - 1e-3 < measured["reward/loss"] < entropy + 0.15
    assert measured["reward/brier"] < 0.03 and measured["reward/ece"] < 0.2

    model = AutoModelForSequenceClassification.from_pretrained(summary["model"])
    tokens = AutoTokenizer.from_pretrained(summary["model"])
    pairs = preference_pairs(config.data, tokens, Quarantine())
    _, held_out = held_out_by_source(np.array([pair.source for pair in pairs]), 0.2, 0)
    scores = []
    for pair in (pairs[row] for row in held_out):
        for answer in (pair.chosen, pair.rejected):
            ids = torch.from_numpy(np.concatenate([pair.prompt, answer]).astype(np.int64))
            with torch.no_grad():
                scores.append(model(ids[None]).logits.item())
    mean, sd = load.score_normalisation(model.config)
    assert (mean, sd) == (pytest.approx(np.mean(scores), abs=1e-4), pytest.approx(np.std(scores), rel=1e-4))
    assert model.config.num_labels == 1
    assert model.config.pad_token_id == tokens.pad_token_id


@pytest.mark.real
@pytest.mark.parametrize(
    ("kind", "error", "said"),
    [
        ("raises", ModelError, "^these weights are damaged$"),
        ("dies", TrainingError, r"^a training worker died while loading .*: rank 0: "),
        ("fails", TrainingError, r"^rank 0 failed while loading .*: ZeroDivisionError: a bug of ours$"),
    ],
)
def test_what_befalls_a_worker_is_one_error(
    ray_session: None, kind: str, error: type[Exception], said: str, policy: str, tmp_path: Path
) -> None:
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    config = SFTConfig.model_validate(settings(policy, "none", tmp_path))
    try:
        with Tracker(config, "sft") as tracker, pytest.raises(error, match=said) as raised:
            supervised.train(config, Trouble(kind), tracker, None)
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert "Traceback" not in str(raised.value)


@pytest.mark.real
def test_more_than_the_cluster_has_is_refused_at_once(ray_session: None, policy: str, tmp_path: Path) -> None:
    told = settings(policy, written(SFT_ROWS, tmp_path / "rows.jsonl"), tmp_path, workers={"ranks": 5})
    with pytest.raises(ResourceError, match=r"5 CPUs are asked for \(workers 5\), and the cluster has 4.*`workers`"):
        sft.run(SFTConfig.model_validate(told))


@pytest.mark.real
def test_a_stop_saves_the_model_as_it_is(
    ray_session: None, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = settings("", "", tmp_path)["training"] | {"epochs": 500}
    told = settings(policy, written(SFT_ROWS, tmp_path / "rows.jsonl"), tmp_path, training=training)
    log = Tracker.log

    def stop_at_step_three(tracker: Tracker, step: int, metrics: Any) -> None:
        log(tracker, step, metrics)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Tracker, "log", stop_at_step_three)
    with pytest.raises(
        StopRequested, match=r"^stopped by SIGTERM; the model as it was is saved in '.*stopped'$"
    ) as stop:
        sft.run(SFTConfig.model_validate(told))
    folder = Path(re.findall("'(.*)'", str(stop.value))[0])
    AutoModelForCausalLM.from_pretrained(folder)
    assert 3 <= json.loads((folder / "state.json").read_text())["step"] < 600


class Endless:
    """Stands for Ray Train that is never done."""

    done = False
    error = None

    def join(self, timeout_s: float) -> None:
        pass


@pytest.mark.real
def test_silence_ends_in_an_error_that_says_what_was_waited_for(ray_session: None, policy: str, tmp_path: Path) -> None:
    import ray

    feed = ray.remote(Feed).options(num_cpus=0).remote()
    config = SFTConfig.model_validate(settings(policy, "none", tmp_path, deadline_s=1.0))
    worker = ray.remote(Feed).options(num_cpus=0).remote()
    ray.get(feed.tell.remote(Joined(0, worker)), timeout=30)
    with Tracker(config, "sft") as tracker:
        run = supervised.Run(Job(config, _Nothing(4), np.arange(4), np.arange(0), ""), feed, tracker)
        before = time.monotonic()
        with pytest.raises(
            DeadlineError, match=r"no word from the training workers for 1 s while starting.*deadline_s"
        ):
            run._listen(Endless())  # type: ignore[arg-type]
        assert time.monotonic() - before < 30
        run._end(Endless())  # type: ignore[arg-type]
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(worker.tell.remote(Failed(0, "")), timeout=30)


@pytest.mark.real
def test_no_word_is_lost_and_none_comes_twice(ray_session: None) -> None:
    import ray

    feed = ray.remote(Feed).options(num_cpus=0).remote()
    for step in range(3):
        assert ray.get(feed.tell.remote(Logged(step, {}))) is False
    first = ray.get(feed.hear.remote(0, 1.0))
    assert [word.step for word in first] == [0, 1, 2]
    assert ray.get(feed.hear.remote(1, 1.0)) == first[1:]  # as after a read that was cut short
    waiting = feed.hear.remote(3, 30.0)
    ray.get(feed.ask_stop.remote())
    assert ray.get(feed.tell.remote(Logged(3, {}))) is True
    assert [word.step for word in ray.get(waiting, timeout=30)] == [3]
    assert ray.get(feed.hear.remote(4, 0.1)) == []
