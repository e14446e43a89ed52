import math
from typing import Any

import numpy as np
import pytest
import torch
from batches import FOUR, GAE, TWO, batch, config, made, policy, sampled

from rlhf_ray.actors.experience import ADVANTAGES, Batch, build, final_scores
from rlhf_ray.config.ppo import AnyAlgorithm, PPOConfig
from rlhf_ray.errors import RewardError, TrainingError
from rlhf_ray.records import Finish
from rlhf_ray.telemetry import catalogue
from tests.test_records import trajectories


def test_rewards_advantages_and_metrics_match_numbers_worked_by_hand() -> None:
    # Answers of two tokens and one. Log-probabilities -1, -2 | -3 against the reference's -1.5, -2 | -2:
    # kl = 0.5, 0 | -1. With beta 0.1 and scores 1 | 2: rewards -0.05, 1 | 2.1.
    # Values zero, gamma = lambda = 1: advantages (= returns) 0.95, 1 | 2.1.
    experience = made(batch([1.0, 2.0], TWO, [-1.5, -2.0, -2.0]), policy([-1.0, -2.0, -3.0], 0.6), algorithm=GAE)
    assert experience.returns is not None
    assert experience.returns.tolist() == pytest.approx([0.95, 1.0, 2.1])
    assert experience.advantages.mean().item() == pytest.approx(0, abs=1e-6)
    assert experience.advantages.std(unbiased=False).item() == pytest.approx(1, abs=1e-4)
    assert experience.sequence_kl.tolist() == pytest.approx([0.5, -1.0])
    metrics = experience.metrics
    assert metrics["objective/kl"] == pytest.approx(-0.25)
    assert metrics["objective/kl_per_token"] == pytest.approx(-0.5 / 3)
    assert metrics["objective/scores"] == pytest.approx(1.5)
    assert metrics["objective/rlhf_reward"] == pytest.approx(1.5 + 0.025)
    assert metrics["objective/entropy"] == pytest.approx(0.6)
    assert metrics["tokens/trained"] == 3
    # sampler's log-probabilities are -1, -1.5 | -2
    assert metrics["rollout/logprob_gap_max"] == pytest.approx(1.0)
    assert metrics["rollout/logprob_gap_mean"] == pytest.approx(0.5)
    # weights 1, exp(-0.5) | exp(-1), none above the cap
    weights = [1.0, math.exp(-0.5), math.exp(-1)]
    assert experience.weights.tolist() == pytest.approx(weights)
    assert metrics["correction/weight_mean"] == pytest.approx(sum(weights) / 3)
    assert metrics["correction/effective_sample_share"] == pytest.approx(
        sum(weights) ** 2 / (3 * sum(weight**2 for weight in weights))
    )


def test_a_cut_off_answer_is_paid_the_penalty_instead_of_its_score_unless_it_keeps_it() -> None:
    some = batch([5.0, 2.0], TWO, [0.0, 0.0, 0.0], [Finish.LENGTH, Finish.EOS])
    says = policy([0.0, 0.0, 0.0])
    experience = made(some, says, algorithm=GAE, missing_eos_penalty=1.5)
    assert experience.returns is not None
    assert experience.returns.tolist() == pytest.approx([-1.5, -1.5, 2.0])
    assert experience.metrics["rollout/eos_share"] == 0.5
    assert experience.metrics["objective/scores"] == pytest.approx(3.5)
    assert experience.metrics["objective/rlhf_reward"] == pytest.approx(0.25)
    kept = made(some, says, algorithm=GAE, missing_eos_penalty=None)
    assert kept.returns is not None and kept.returns.tolist() == pytest.approx([5.0, 5.0, 2.0])


def test_the_price_of_length_grows_over_the_last_tokens_before_the_limit() -> None:
    # At most 6 tokens, the last 4 of them priced: lengths 2, 3 and 6 cost 0, 1/4 and 1.
    answers = [(0, [5, 5]), (0, [5, 5, 5]), (1, [5] * 6), (1, [5])]
    some = batch([1.0, 1.0, 1.0, 1.0], answers, [0.0] * 12)
    chosen = config(samples=2, longest=6, algorithm={"name": "dapo", "overlong_buffer": 4})
    assert final_scores(some.trajectories, some.scores, chosen).tolist() == [1.0, 0.75, 0.0, 1.0]


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        # Two groups: 3 and 1, sum over tokens included; 2 and 2. Means 2 and 2; deviations 1 (population) and 0.
        ("dr_grpo", [1, 1, -1, 0, 0, 0]),
        ("rloo", [2, 2, -2, 0, 0, 0]),
        ({"name": "dapo", "overlong_buffer": 0}, "scaled"),
        ("gspo", "scaled"),
        ("grpo", "scaled"),
    ],
)
def test_groups_of_answers_stand_in_for_a_critic(algorithm: Any, expected: Any) -> None:
    some = batch([3.0, 1.0, 2.0, 2.0], FOUR, [-1.0] * 6)
    experience = build(some, policy([-1.0] * 6), None, config(samples=2, algorithm=algorithm), 0.1)
    assert experience.values is None and experience.returns is None
    if expected == "scaled":
        found = experience.advantages
        assert found[0] == found[1] == -found[2] and 0.5 < found[0] < 1.01
        assert found[3:].eq(0).all()
    else:
        assert experience.advantages.tolist() == pytest.approx(expected)


def test_a_penalty_in_the_reward_counts_in_a_groups_returns_and_one_in_the_loss_does_not() -> None:
    # kl 0.5 at each token of the first answer (two tokens), beta 1: returns 3 - 1 and 1 | 2, 2.
    some, says = batch([3.0, 1.0, 2.0, 2.0], FOUR, [-1.5, -1.5, -1, -1, -1, -1]), policy([-1.0] * 6)
    rewarded = build(some, says, None, config(samples=2, algorithm="dr_grpo"), 1.0)
    assert rewarded.advantages.tolist() == pytest.approx([0.5, 0.5, -0.5, 0, 0, 0])
    in_loss = {"estimator": {"name": "k2", "placement": "loss"}}
    lost = build(some, says, None, config(samples=2, algorithm="dr_grpo", kl=in_loss), 1.0)
    assert lost.advantages.tolist() == pytest.approx([1, 1, -1, 0, 0, 0])


def test_reinforce_whitens_rewards_to_go_with_or_without_its_groups_mean() -> None:
    some, says = batch([3.0, 1.0, 6.0, 2.0], FOUR, [-1.0] * 6), policy([-1.0] * 6)
    plain = build(some, says, None, config(samples=2, algorithm="reinforce_pp"), 0.1).advantages
    based = build(
        some, says, None, config(samples=2, algorithm={"name": "reinforce_pp", "baseline": True}), 0.1
    ).advantages

    def white(values: list[float]) -> list[float]:
        mean = sum(values) / len(values)
        return [(v - mean) / math.sqrt(sum((w - mean) ** 2 for w in values) / len(values)) for v in values]

    assert plain.tolist() == pytest.approx(white([3, 3, 1, 6, 2, 2]), abs=1e-6)
    assert based.tolist() == pytest.approx(white([1, 1, -1, 2, -2, -2]), abs=1e-6)


def test_every_algorithm_of_the_configuration_has_its_advantages() -> None:
    options = AnyAlgorithm.__origin__.__args__  # type: ignore[attr-defined]
    assert {option.model_fields["name"].default for option in options} == set(ADVANTAGES)


def test_the_full_kl_stands_in_the_reward_and_among_the_metrics() -> None:
    some, says = batch([1.0, 2.0], TWO, [-1.5, -2.0, -2.0]), policy([-1.0, -2.0, -3.0], kl=[0.2, 0.4, 0.8])
    experience = made(some, says, algorithm=GAE, kl={"estimator": "full"})
    assert experience.returns is not None
    assert experience.returns.tolist() == pytest.approx([1 - 0.02 - 0.04, 1 - 0.04, 2 - 0.08])
    assert experience.metrics["objective/kl_full"] == pytest.approx((0.6 + 0.8) / 2)
    assert experience.metrics["objective/kl"] == pytest.approx(-0.25)  # still that of the sampled tokens
    assert experience.metrics["objective/rlhf_reward"] == pytest.approx(1.5 - 0.07)


def test_a_coupled_ratio_is_taken_to_what_the_engine_said() -> None:
    some = batch([1.0, 2.0], TWO, [-1.0, -1.5, -2.0])
    coupled = made(some, policy([-1.1, -1.6, -2.1]), algorithm=GAE, correction="coupled")
    assert coupled.old_logprobs.tolist() == [-1.0, -1.5, -2.0]
    assert coupled.weights.eq(1).all()
    decoupled = made(some, policy([-1.1, -1.6, -2.1]), algorithm=GAE)
    assert decoupled.old_logprobs.tolist() == pytest.approx([-1.1, -1.6, -2.1])
    assert decoupled.weights.tolist() == pytest.approx([math.exp(-0.1)] * 3)


def test_tokens_far_from_what_the_engine_said_are_masked_when_asked() -> None:
    some = batch([1.0, 2.0], TWO, [-1.0, -1.5, -2.0])
    experience = made(some, policy([-3.0, -1.6, -2.1]), algorithm=GAE, correction="mask")
    assert experience.weights.tolist() == pytest.approx([0, math.exp(-0.1), math.exp(-0.1)])
    assert experience.metrics["correction/clipped_share"] == pytest.approx(1 / 3)


def test_details_of_a_score_keep_to_their_answers_and_are_means_by_their_names() -> None:
    told = config()
    parts = {"a": {"ensemble": {"models": ["m", "n"]}}, "b": {"function": "f:g"}}
    told = PPOConfig.model_validate(told.model_dump() | {"reward": {"parts": parts}})
    chunk = trajectories([[1], [2]], TWO)
    table = np.array([[3.0, 1.0, 2.0, 0.5], [30.0, 10.0, 20.0, 1.5]], np.float32)
    some = Batch.gather([(chunk, sampled([-1.0, -1.5, -2.0]), table)]).take(np.array([1, 0]))
    assert some.scores.tolist() == [30, 3] and some.details.tolist() == table[::-1, 1:].tolist()
    metrics = build(some, policy([-1.0, -1.5, -2.0]), torch.zeros(3), told, 0.1).metrics
    assert metrics["objective/scores"] == 16.5
    named = {name: metrics[name] for name in ("scores/a", "scores/b", "disagreement/a")}
    assert named == {"scores/a": 5.5, "scores/b": 11.0, "disagreement/a": 1.0}
    catalogue.check(metrics)


def test_the_order_in_which_chunks_arrive_changes_nothing() -> None:
    first = trajectories([[1], [2]], [(0, [10, 11]), (1, [12])])
    second = trajectories([[3]], [(0, [20, 21, 22])], first_id=2)
    columns = [
        (first, sampled([1.0, 2.0, 3.0]), np.array([0.1, 0.2], np.float32)),
        (second, sampled([4.0, 5.0, 6.0]), np.array([0.3], np.float32)),
    ]
    there, back = Batch.gather(columns), Batch.gather(columns[::-1])
    assert there.trajectories.sample_ids.tolist() == back.trajectories.sample_ids.tolist() == [0, 1, 2]
    assert there.reference.logprobs.tolist() == back.reference.logprobs.tolist() == [1, 2, 3, 4, 5, 6]
    assert torch.equal(there.scores, back.scores)
    assert there.offsets.tolist() == back.offsets.tolist() == [0, 2, 3, 6]


def test_a_chunk_with_a_column_of_the_wrong_length_is_refused() -> None:
    chunk = trajectories([[1]], [(0, [2, 3])])
    with pytest.raises(RewardError, match="1 answers and 2 tokens came with 2 scores and 2 reference"):
        Batch.gather([(chunk, sampled([0.0, 0.0]), np.zeros(2, np.float32))])


def test_an_update_takes_the_answers_to_its_prompts_and_leaves_the_others_of_their_chunks() -> None:
    answers = [(0, [2]), (0, [3, 4]), (1, [5]), (1, [6]), (2, [7, 8]), (2, [9])]
    some = batch([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], answers, [0.0] * 8)
    mine = some.of_prompts(np.array([2, 0]), 2)
    assert mine.scores.tolist() == [1.0, 2.0, 5.0, 6.0]
    assert mine.trajectories.responses.values.tolist() == [2, 3, 4, 7, 8, 9]


def test_a_lost_answer_and_one_that_came_twice_are_noticed() -> None:
    some = batch([1.0, 2.0], TWO, [0.0, 0.0, 0.0])
    assert len(some.of_prompts(np.array([0, 1]), 1)) == 2
    with pytest.raises(TrainingError, match="3 answers were asked for; 2 arrived, 2 of them distinct"):
        some.of_prompts(np.array([0, 1, 2]), 1)
    with pytest.raises(TrainingError, match="2 answers were asked for; 2 arrived, 1 of them distinct"):
        some.take(np.array([1, 1])).of_prompts(np.array([0, 1]), 1)
