"""The learner against a plain PyTorch oracle, and against itself under other ranks, shards and micro-batches."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_ranks import ANSWERS, BETA, Ranks, config

from rlhf_ray.actors.invariants import Found, of_experience, of_first_minibatch
from rlhf_ray.actors.reference import Reference
from rlhf_ray.config.common import OptimizerConfig
from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.config.rewards import RewardSection
from rlhf_ray.errors import DataError
from rlhf_ray.models import load
from rlhf_ray.models.heads import HEAD_CHUNK, TokenLogprobs
from rlhf_ray.records import Finish, ReferenceColumns
from rlhf_ray.stages.replay import replay

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def whole(one: Ranks, policy: str, columns: tuple) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """One rank, one micro-batch."""
    return one.run(config(policy), columns)


@pytest.mark.parametrize(("ranks", "stage", "budget"), [(1, 0, 24), (1, 3, 24), (2, 1, 24), (2, 2, 48), (2, 3, 24)])
def test_ranks_shards_and_micro_batches_change_neither_weights_nor_metrics(
    one: Ranks, two: Ranks, policy: str, columns: tuple, whole: tuple, ranks: int, stage: int, budget: int
) -> None:
    metrics, weights = (one if ranks == 1 else two).run(config(policy, ranks, stage, budget), columns)
    expected_metrics, expected_weights = whole
    assert set(metrics) == set(expected_metrics)
    for name, value in expected_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=2e-3, abs=2e-4), name
    assert set(weights) == set(expected_weights)
    start = {name: p.detach().numpy() for name, p in _fresh(policy).named_parameters()}
    moved = max(float(np.abs(weights[name] - start[name]).max()) for name in weights)
    apart = max(float(np.abs(weights[name] - expected_weights[name]).max()) for name in weights)
    assert moved > 1e-2
    # Adam divides by the root of a gradient's square: where a gradient is nearly zero, rounding shows.
    assert apart < 0.02 * moved
    mean = np.mean([float(np.abs(weights[name] - expected_weights[name]).mean()) for name in weights])
    assert mean < 1e-5


def test_one_update_is_what_plain_pytorch_computes(one: Ranks, policy: str, columns: tuple) -> None:
    """One epoch, one minibatch: loops over tokens, no packing, torch's own Adam and clipping."""
    metrics, weights = one.run(config(policy, epochs=1, minibatches=1, entropy_bonus=0.01), columns)
    trajectories, sent, scores = columns
    reference = sent.logprobs
    model = _fresh(policy)
    temperature, penalty, tokens = 0.7, 1.0, trajectories.tokens
    logprobs, entropies, advantages, kl_total = [], [], [], 0.0
    place = 0
    for row in range(ANSWERS):
        ids = torch.from_numpy(trajectories.sequence(row).astype(np.int64))
        prompt = len(trajectories.prompt(row))
        table = (model(ids[None]).logits[0] / temperature).log_softmax(-1)
        length = len(ids) - prompt
        own = [table[prompt - 1 + t, ids[prompt + t]] for t in range(length)]
        entropies += [-(table[prompt - 1 + t].exp() * table[prompt - 1 + t]).sum() for t in range(length)]
        rewards = [-BETA * (own[t].item() - reference[place + t]) for t in range(length)]
        kl_total += sum(own[t].item() - reference[place + t] for t in range(length))
        rewards[-1] += -penalty if trajectories.finish[row] == Finish.LENGTH else float(scores[row])
        # values are zero at the start, gamma 1, lambda 0.95
        advantages += [sum(0.95 ** (s - t) * rewards[s] for s in range(t, length)) for t in range(length)]
        logprobs += own
        place += length
    mean = sum(advantages) / tokens
    deviation = math.sqrt(sum((a - mean) ** 2 for a in advantages) / tokens + 1e-8)
    loss = torch.zeros(())
    for logprob, advantage, entropy in zip(logprobs, advantages, entropies, strict=True):
        ratio = (logprob - logprob.detach()).exp()
        loss = loss - ratio * (advantage - mean) / deviation / tokens - 0.01 * entropy / tokens
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item()
    torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0).step()

    assert metrics["policy/grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert metrics["objective/kl"] == pytest.approx(kl_total / ANSWERS, rel=1e-4)
    assert metrics["objective/entropy"] == pytest.approx(sum(e.item() for e in entropies) / tokens, rel=1e-5)
    assert metrics["val/ratio_max_first"] < 1e-5
    assert metrics["policy/clipfrac_avg"] == 0
    for name, parameter in model.named_parameters():
        assert np.abs(parameter.detach().numpy() - weights[name]).max() < 2e-4, name


@pytest.mark.parametrize("stage", [0, 1])
def test_a_loss_that_is_not_finite_stops_the_run_with_the_weights_as_they_were(
    one: Ranks, policy: str, columns: tuple, stage: int
) -> None:
    trajectories, reference, scores = columns
    broken = reference.logprobs.copy()
    broken[5] = np.nan
    with pytest.raises(Exception, match="the loss at update 0, epoch 0 is not finite"):
        one.run(config(policy, stage=stage), (trajectories, ReferenceColumns.sampled(broken), scores))
    after = one.weights()
    for name, parameter in _fresh(policy).named_parameters():
        assert np.array_equal(after[name], parameter.detach().numpy())


# Other algorithms, and the KL over the whole vocabulary

GROUPED = {"samples_per_prompt": 7}  # all answers are of one group: sample ids count from zero
FORMS = {
    "grpo": {"algorithm": {"name": "grpo", "clip_ratio": 0.05}},
    "gspo": {
        "algorithm": {"name": "gspo", "clip_ratio": 0.001},
        "kl": {"estimator": {"name": "k2", "placement": "loss"}},
    },
    "rloo": {"algorithm": "rloo", "correction": {"name": "truncate", "level": "geometric"}},
    "full KL as a loss": {"kl": {"estimator": {"name": "full", "placement": "loss"}}},
    "top-k KL in the reward": {"kl": {"estimator": {"name": "full", "top_k": 5}}},
}


@pytest.mark.parametrize("form", FORMS)
def test_whatever_the_algorithm_ranks_and_micro_batches_change_nothing(
    one: Ranks, two: Ranks, policy: str, columns: tuple, form: str
) -> None:
    chosen = {"rollout": GROUPED, "missing_eos_penalty": None, **FORMS[form]}
    sent = as_sent(columns, chosen.get("kl", {}), policy)
    metrics, weights = one.run(config(policy, **chosen), sent)
    split_metrics, split_weights = two.run(config(policy, 2, 1, 24, **chosen), sent)
    assert set(metrics) == set(split_metrics)
    assert all(math.isfinite(value) for value in metrics.values())
    for name, value in metrics.items():
        assert split_metrics[name] == pytest.approx(value, rel=2e-3, abs=2e-4), name
    start = {name: p.detach().numpy() for name, p in _fresh(policy).named_parameters()}
    moved = max(float(np.abs(weights[name] - start[name]).max()) for name in weights)
    apart = max(float(np.abs(weights[name] - split_weights[name]).max()) for name in weights)
    assert moved > 1e-2
    assert apart < 0.02 * moved


def as_sent(columns: tuple, kl: dict[str, Any], policy: str) -> tuple:
    """With what the reference, the policy with its weights moved, sends for this form of the KL."""
    trajectories, _, scores = columns
    estimator = kl.get("estimator", {})
    if "full" not in estimator.values():
        return columns
    top = np.argsort(-np.random.default_rng(3).random((trajectories.tokens, 64)))[:, : estimator.get("top_k", 0)]
    trajectories = replace(trajectories, top_ids=top.astype(np.uint16))
    form = "top_k" if "top_k" in estimator else "hidden"
    return trajectories, Reference(policy, 0.7, 64, form, "cpu", False).score(trajectories), scores


def test_the_full_kl_to_the_policy_itself_is_zero_and_to_another_what_plain_logits_say(
    one: Ranks, policy: str, other_policy: str, columns: tuple
) -> None:
    trajectories, _, scores = columns
    form = {"kl": {"estimator": {"name": "full", "placement": "loss"}}, "epochs": 1, "minibatches": 1}
    itself, _ = one.run(config(policy, **form), as_sent(columns, form["kl"], policy))
    assert itself["objective/kl_full"] == pytest.approx(0, abs=1e-5)
    assert itself["loss/kl_avg"] == pytest.approx(0, abs=1e-6)

    # Another reference's hidden states through this head: what a learner that has only this one makes of them.
    sent = Reference(other_policy, 0.7, 64, "hidden", "cpu", False).score(trajectories)
    found, _ = one.run(config(policy, **form), (trajectories, sent, scores))
    mine, head = _fresh(policy), _fresh(policy).lm_head
    other, total = _fresh(other_policy), 0.0
    for row in range(ANSWERS):
        ids, prompt = torch.from_numpy(trajectories.sequence(row).astype(np.int64)), len(trajectories.prompt(row))
        with torch.no_grad():
            p = (mine(ids[None]).logits[0, prompt - 1 : -1].double() / 0.7).log_softmax(-1)
            q = (head(other.model(ids[None]).last_hidden_state[0, prompt - 1 : -1]).double() / 0.7).log_softmax(-1)
        total += (p.exp() * (p - q)).sum().item()
    assert found["objective/kl_full"] == pytest.approx(total / ANSWERS, rel=1e-4)
    assert found["loss/kl_avg"] == pytest.approx(total / trajectories.tokens, rel=1e-4)


def test_prompts_whose_answers_are_paid_alike_are_found_and_left_out(one: Ranks, policy: str, columns: tuple) -> None:
    import ray

    trajectories, reference, _ = columns
    scores = np.array([1, 1, 2, 2, 2, 3, 0], np.float32)
    chosen = config(policy, rollout={"samples_per_prompt": 2}, missing_eos_penalty=None)
    sent = (trajectories, reference, scores)
    everything = one.update(chosen, sent, kept=np.arange(3))
    # Prompt 0: 1, 1; prompt 1: 2, 2; prompt 2: 2, 3; prompt 3: 0 alone.
    dull = ray.get(one.hosts[0].without_signal.remote(trajectories, scores[:, None]), timeout=60)
    assert dull == [0, 1, 3]
    kept = one.update(chosen, sent, kept=np.array([2]))
    assert kept.metrics["tokens/trained"] == 6 + 11
    assert everything.metrics["tokens/trained"] == trajectories.responses.lengths[:6].sum()
    assert kept.metrics["objective/scores"] == 2.5


# Adapters

ADAPTERS = {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "down_proj"]}


@pytest.mark.parametrize("stage", [1, 3])
def test_adapters_alone_train_and_whoever_loads_the_policy_gets_them_added(
    one: Ranks, two: Ranks, policy: str, columns: tuple, tmp_path: Path, stage: int
) -> None:
    import ray

    metrics, weights = two.run(config(policy, 2, stage, 24, lora=ADAPTERS), columns)
    alone_metrics, alone = one.run(config(policy, lora=ADAPTERS), columns)
    start = {name: p.detach().numpy() for name, p in _fresh(policy).named_parameters()}
    assert list(weights) == list(start)
    moved = {name for name in start if not np.array_equal(weights[name], start[name])}
    assert {name.rsplit(".", 2)[1] for name in moved} == {"q_proj", "down_proj"}
    for name, value in alone_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=2e-3, abs=2e-4), name
    assert max(float(np.abs(weights[name] - alone[name]).max()) for name in weights) < 1e-3

    (tmp_path / "saved").mkdir()
    ray.get([host.save.remote(str(tmp_path / "saved")) for host in two.hosts], timeout=60)
    saved = {name: p.detach().numpy() for name, p in _fresh(str(tmp_path / "saved/policy")).named_parameters()}
    assert all(np.array_equal(saved[name], weights[name]) for name in start)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize(
    "kl", [{}, {"estimator": {"name": "full", "placement": "both"}}, {"estimator": {"name": "full", "top_k": 5}}]
)
def test_a_learner_without_its_adapters_is_the_reference(
    one: Ranks, two: Ranks, policy: str, columns: tuple, kl: dict[str, Any], stage: int
) -> None:
    """What it says of itself is what an actor with the same weights says."""
    sent = as_sent(columns, kl, policy)
    if not kl:
        reference = Reference(policy, 0.7, 64, "sampled", "cpu", False).score(sent[0])
        sent = (sent[0], reference, sent[2])
    apart, _ = one.run(config(policy, lora=ADAPTERS, kl=kl), sent)
    shared = config(policy, 2, stage, 24, lora={**ADAPTERS, "share_reference": True}, kl=kl)
    itself, _ = two.run(shared, (sent[0], sent[2]))
    assert itself["objective/kl"] == pytest.approx(0, abs=1e-5)
    for name, value in apart.items():
        if not name.startswith("wire/"):  # nothing comes from a reference
            assert itself[name] == pytest.approx(value, rel=2e-3, abs=2e-4), name


@pytest.mark.parametrize(("ranks", "stage"), [(1, 1), (1, 3), (2, 1), (2, 2)])
def test_fewer_answers_than_ranks_and_minibatches_are_trained_all_the_same(
    one: Ranks, two: Ranks, policy: str, columns: tuple, ranks: int, stage: int
) -> None:
    """One prompt with two answers is kept: three minibatches become two, of one answer, on one or two ranks."""
    chosen = config(policy, ranks, stage, rollout={"samples_per_prompt": 2}, minibatches=3, missing_eos_penalty=None)
    update = (one if ranks == 1 else two).update(chosen, columns, kept=np.array([1]))
    assert update.metrics["tokens/trained"] == 1 + 14
    assert all(math.isfinite(value) for value in update.metrics.values())
    assert update.metrics["critic/grad_norm"] > 0


def test_ranks_call_a_sharded_head_equally_often_for_the_likeliest_tokens_too(policy: str) -> None:
    calls = []
    model = TokenLogprobs(load.causal_lm(policy, "cpu"), 1.0)
    model.model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    model.keep_in_step(5 * HEAD_CHUNK)
    found = model.logprobs_at(torch.randn(3, 64), torch.zeros(3, 2, dtype=torch.long))
    assert found.shape == (3, 2)
    assert len(calls) == 5


# Invariants


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_breach_stops_before_any_step_and_what_broke_it_can_be_replayed(
    one: Ranks, two: Ranks, policy: str, columns: tuple, tmp_path: Path, ranks: int
) -> None:
    evidence = tmp_path / "evidence"
    hosts = one if ranks == 1 else two
    with pytest.raises(Exception, match="before anything is learned, policy and reference differ by") as caught:
        hosts.update(config(policy, ranks, on_breach="stop"), columns, evidence)
    folder = evidence / "update_000000"
    assert f"rlhf-ray replay {folder}" in str(caught.value)
    after = hosts.weights()
    assert all(np.array_equal(after[name], p.detach().numpy()) for name, p in _fresh(policy).named_parameters())

    said = replay(folder)
    assert "policy and reference differ by" in said.splitlines()[0]
    assert "7 answers, 46 tokens, beta 0.1" in said
    # One process reads what the ranks read: the same log-probabilities, to rounding.
    line = next(line for line in said.splitlines() if "the run's own before the update" in line)
    assert float(line.split("largest ")[1].split()[0]) < 1e-5
    assert "worst tokens" in said


@pytest.mark.parametrize("lora", [None, ADAPTERS])
def test_the_critic_is_kept_as_it_was(one: Ranks, policy: str, columns: tuple, tmp_path: Path, lora: Any) -> None:
    with pytest.raises(Exception, match="rlhf-ray replay"):
        one.update(config(policy, on_breach="stop", lora=lora), columns, tmp_path)
    said = replay(tmp_path / "update_000000")
    values = next(line for line in said.splitlines() if "critic's values" in line)
    assert values.split()[-3:] == ["0", "0", "0"]  # its head begins at zero


def test_evidence_that_cannot_be_written_does_not_hide_what_went_wrong(
    one: Ranks, two: Ranks, policy: str, columns: tuple, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Exception, match="policy and reference differ") as caught:
        two.update(config(policy, 2, 3, on_breach="stop"), columns, tmp_path / "file")
    assert "The batch could not be kept in" in str(caught.value)


def test_secrets_do_not_reach_the_evidence(one: Ranks, policy: str, columns: tuple, tmp_path: Path) -> None:
    told = config(policy, on_breach="stop")
    told = told.model_copy(
        update={"reward": RewardSection(parts={"judge": {"url": "http://user:hunter22@127.0.0.1/score"}})}
    )
    trajectories, reference, scores = columns
    with pytest.raises(Exception, match="rlhf-ray replay"):
        one.update(told, (trajectories, reference, np.stack([scores, scores], 1)), tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file() and b"hunter22" in path.read_bytes()] == []
    said = replay(tmp_path / "update_000000")
    assert "7 answers" in said and "scores/judge" in said


def test_a_full_kl_that_is_not_zero_at_the_start_is_a_breach_though_that_of_the_tokens_is_zero(policy: str) -> None:
    metrics = {
        "objective/kl_per_token": 0.0,
        "objective/kl_full": 500.0,
        "tokens/response_length": 10.0,
        "rollout/logprob_gap_mean": 0.0,
        "rollout/logprob_gap_max": 0.0,
    }
    [said] = of_experience(metrics, 0, config(policy)).breaches
    assert "policy and reference differ by 50 nats a token" in said
    assert of_experience(metrics, 1, config(policy)) == Found()


@pytest.mark.parametrize(("gap", "warned", "stopped"), [(5e-4, 0, 0), (5e-3, 1, 0), (5e-2, 0, 1), (math.nan, 0, 2)])
def test_engine_and_learner_far_apart_are_warned_of_and_then_stopped(
    policy: str, gap: float, warned: int, stopped: int
) -> None:
    metrics = {
        "objective/kl_per_token": 0.0,
        "tokens/response_length": 10.0,
        "rollout/logprob_gap_mean": gap,
        "rollout/logprob_gap_max": 1.0,
    }
    found = of_experience(metrics, 3, config(policy))
    assert (len(found.warnings), len(found.breaches)) == (warned, stopped)


@pytest.mark.parametrize(("deviation", "breaches"), [(0.0, 0), (1e-2, 1), (math.nan, 1), (math.inf, 1)])
def test_a_first_ratio_that_is_not_one_is_a_breach_unless_it_is_to_the_engine(
    policy: str, deviation: float, breaches: int
) -> None:
    assert len(of_first_minibatch(deviation, config(policy)).breaches) == breaches
    assert of_first_minibatch(deviation, config(policy, correction="coupled")) == Found()


def test_a_breach_only_warns_when_asked_to(one: Ranks, policy: str, columns: tuple) -> None:
    update = one.update(config(policy, on_breach="warn"), columns)
    [_] = [text for text in update.warnings if "policy and reference differ" in text]
    assert "engine and learner differ by" in " ".join(update.warnings)
    assert update.metrics["policy/grad_norm"] > 0


def test_a_replay_of_something_else_says_what_it_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no batch.safetensors, config.yaml.*expected a folder that a run leaves"):
        replay(tmp_path)


def test_a_lost_answer_is_noticed(one: Ranks, policy: str, columns: tuple) -> None:
    trajectories, reference, scores = columns
    fewer = trajectories.take(np.arange(ANSWERS - 1))
    with pytest.raises(Exception, match="7 answers were asked for; 6 arrived, 6 of them distinct"):
        one.run(config(policy), (fewer, reference.take(np.arange(fewer.tokens)), scores[:-1]))


def _fresh(policy: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(Path(policy), dtype=torch.float32)


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (1, 1), (1, 3), (2, 2)])
def test_a_learner_that_takes_up_what_another_saved_goes_on_as_it_would_have(
    one: Ranks, two: Ranks, policy: str, columns: tuple, tmp_path: Path, ranks: int, stage: int
) -> None:
    """Weights, Adam's moments and steps, the schedule: on one rank to the last bit, on two by other orders of sums."""
    import ray

    def falling(ranks: int) -> PPOConfig:
        plain = config(policy, ranks, stage)
        optimizer = OptimizerConfig(learning_rate=1e-2, schedule="linear", warmup_share=0.25, max_grad_norm=0.5)
        return plain.model_copy(update={"learner": plain.learner.model_copy(update={"optimizer": optimizer})})

    chunk = [ray.put(column) for column in columns]
    [host] = one.hosts
    one.update(falling(1), columns)
    told, expected = ray.get(host.save_and_go_on.remote([chunk], str(tmp_path)), timeout=120)
    weights = one.weights()
    other = one if ranks == 1 else two
    refs = [
        host.go_on.remote(falling(ranks), rank, [chunk], str(tmp_path), told) for rank, host in enumerate(other.hosts)
    ]
    found = ray.get(refs, timeout=120)[0]
    close = {"rel": 0, "abs": 0} if ranks == 1 else {"rel": 2e-3, "abs": 2e-5}
    for name, value in expected.metrics.items():
        assert found.metrics[name] == pytest.approx(value, **close), name
    for name, weight in other.weights().items():
        np.testing.assert_allclose(
            weight, weights[name], rtol=0 if ranks == 1 else 1e-3, atol=0 if ranks == 1 else 1e-5
        )
    assert 0 < found.metrics["lr/policy"] < 1e-2
