import numpy as np
import pytest
import torch

from rlhf_ray.actors.experience import Batch, build
from rlhf_ray.config.ppo import PPOAlgorithm
from rlhf_ray.errors import RewardError
from rlhf_ray.records import Finish
from tests.test_records import trajectories


def batch(scores: list[float], finish: list[Finish], reference: list[float]) -> Batch:
    chunk = trajectories([[1]], [(0, [2, 3]), (0, [4])])
    chunk.finish[:] = finish
    return Batch.gather([(chunk, np.array(reference, np.float32), np.array(scores, np.float32))])


def test_rewards_advantages_and_metrics_match_numbers_worked_by_hand() -> None:
    # Answers of two tokens and one. Log-probabilities -1, -2 | -3 against the reference's -1.5, -2 | -2:
    # kl = 0.5, 0 | -1. With beta 0.1 and scores 1 | 2: rewards -0.05, 1 | 2.1.
    # Values zero, gamma = lambda = 1: advantages (= returns) 0.95, 1 | 2.1.
    experience = build(
        batch([1.0, 2.0], [Finish.EOS, Finish.EOS], [-1.5, -2.0, -2.0]),
        torch.tensor([-1.0, -2.0, -3.0]),
        torch.zeros(3),
        torch.tensor([0.3, 0.6, 0.9]),
        PPOAlgorithm(gae_lambda=1.0),
        0.1,
    )
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
    assert metrics["tokens/generated"] == 3
    # sampler's log-probabilities are -1, -1.5 | -2
    assert metrics["rollout/logprob_gap_max"] == pytest.approx(1.0)
    assert metrics["rollout/logprob_gap_mean"] == pytest.approx(0.5)


def test_a_cut_off_answer_is_paid_the_penalty_instead_of_its_score() -> None:
    experience = build(
        batch([5.0, 2.0], [Finish.LENGTH, Finish.EOS], [0.0, 0.0, 0.0]),
        torch.zeros(3),
        torch.zeros(3),
        torch.zeros(3),
        PPOAlgorithm(gae_lambda=1.0, missing_eos_penalty=1.5),
        0.1,
    )
    assert experience.returns.tolist() == pytest.approx([-1.5, -1.5, 2.0])
    assert experience.metrics["rollout/eos_share"] == 0.5
    assert experience.metrics["objective/scores"] == pytest.approx(3.5)
    assert experience.metrics["objective/rlhf_reward"] == pytest.approx(0.25)


def test_the_order_in_which_chunks_arrive_changes_nothing() -> None:
    first = trajectories([[1], [2]], [(0, [10, 11]), (1, [12])])
    second = trajectories([[3]], [(0, [20, 21, 22])], first_id=2)
    columns = [
        (first, np.array([1.0, 2.0, 3.0], np.float32), np.array([0.1, 0.2], np.float32)),
        (second, np.array([4.0, 5.0, 6.0], np.float32), np.array([0.3], np.float32)),
    ]
    there, back = Batch.gather(columns), Batch.gather(columns[::-1])
    for one, other in ((there, back),):
        assert one.trajectories.sample_ids.tolist() == other.trajectories.sample_ids.tolist() == [0, 1, 2]
        assert one.reference_logprobs.tolist() == other.reference_logprobs.tolist() == [1, 2, 3, 4, 5, 6]
        assert torch.equal(one.scores, other.scores)
        assert one.lengths.tolist() == other.lengths.tolist() == [3, 2, 4]


def test_a_chunk_with_a_column_of_the_wrong_length_is_refused() -> None:
    chunk = trajectories([[1]], [(0, [2, 3])])
    with pytest.raises(RewardError, match="1 answers and 2 tokens came with 2 scores and 2 reference"):
        Batch.gather([(chunk, np.zeros(2, np.float32), np.zeros(2, np.float32))])
