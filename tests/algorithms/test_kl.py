import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragged import batches, join, offsets_of, rows
from torch import Tensor

from rlhf_ray.algorithms.advantages import gae
from rlhf_ray.algorithms.kl import ESTIMATORS, AdaptiveKL, FixedKL, k1, k2, k3, token_rewards


def distributions(vocabulary: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities of a policy and of a reference near it, float64."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(vocabulary, generator=generator, dtype=torch.float64)
    moved = logits + 0.7 * torch.randn(vocabulary, generator=generator, dtype=torch.float64)
    return moved.log_softmax(-1), logits.log_softmax(-1)


def test_estimators_match_numbers_worked_by_hand() -> None:
    logp, ref = torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -1.0])
    assert k1(logp, ref).tolist() == [1.0, -1.0]
    assert k2(logp, ref).tolist() == [0.5, 0.5]
    assert k3(logp, ref).tolist() == pytest.approx([math.exp(-1), math.e - 2])


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_is_exactly_zero_where_the_models_agree(name: str) -> None:
    logp = torch.linspace(-30, 0, 50)
    assert ESTIMATORS[name](logp, logp.clone()).eq(0).all()


@given(batches(columns=2))
def test_k2_and_k3_are_never_negative(batch: tuple[list[Tensor], Tensor]) -> None:
    (logp, ref), _ = batch
    assert (k2(logp, ref) >= 0).all()
    assert (k3(logp, ref) >= 0).all()


def test_k3_keeps_its_digits_for_models_that_hardly_differ() -> None:
    # x^2 / 2 = 5e-9 is below the rounding of exp(-x) - 1 in float32 when the two are formed apart.
    assert k3(torch.tensor([1e-4]), torch.tensor([0.0])).item() == pytest.approx(5e-9, rel=0.02)


def test_k1_and_k3_have_the_exact_kl_as_expectation_and_k2_has_not() -> None:
    logp, ref = distributions(50)
    exact = (logp.exp() * (logp - ref)).sum().item()
    mean = {name: (logp.exp() * estimate(logp, ref)).sum().item() for name, estimate in ESTIMATORS.items()}
    assert mean["k1"] == pytest.approx(exact, rel=1e-12)
    assert mean["k3"] == pytest.approx(exact, rel=1e-12)
    assert abs(mean["k2"] - exact) > 0.02 * exact


@pytest.mark.parametrize("estimate", [k1, k3])
def test_the_mean_over_samples_lies_within_its_interval_of_the_exact_kl(estimate) -> None:
    logp, ref = distributions(50)
    generator = torch.Generator().manual_seed(1)
    sampled = torch.multinomial(logp.exp(), 100_000, replacement=True, generator=generator)
    values = estimate(logp[sampled], ref[sampled])
    exact = (logp.exp() * (logp - ref)).sum()
    assert (values.mean() - exact).abs() < 2.58 * values.std() / len(values) ** 0.5


class TabularPolicy:
    """Three tokens, at most two a sequence; token 0 ends it. A row of logits a state: begin, after 1, after 2."""

    sequences = ([0], [1, 0], [1, 1], [1, 2], [2, 0], [2, 1], [2, 2])
    offsets = offsets_of([len(sequence) for sequence in sequences])
    states = torch.tensor([state for sequence in sequences for state in [0, *sequence[:-1]]])
    tokens = torch.tensor([token for sequence in sequences for token in sequence])

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(3, 3, generator=generator, dtype=torch.float64)

    def token_logprobs(self, logits: Tensor) -> Tensor:
        """[N] over the tokens of all sequences there are."""
        return logits.log_softmax(-1)[self.states, self.tokens]

    def sequence_logprobs(self, logits: Tensor) -> Tensor:
        return torch.stack([row.sum() for row in rows(self.token_logprobs(logits), self.offsets)])

    def exact_kl(self, logits: Tensor, reference: Tensor) -> float:
        logp = self.sequence_logprobs(logits)
        return (logp.exp() * (logp - self.sequence_logprobs(reference))).sum().item()

    def exact_kl_gradient(self, reference: Tensor, step: float = 1e-6) -> Tensor:
        """Central differences."""
        gradient = torch.zeros_like(self.logits)
        for place in range(self.logits.numel()):
            nudge = torch.zeros_like(self.logits).flatten()
            nudge[place] = step
            nudge = nudge.view_as(self.logits)
            up, down = self.exact_kl(self.logits + nudge, reference), self.exact_kl(self.logits - nudge, reference)
            gradient.view(-1)[place] = (up - down) / (2 * step)
        return gradient

    def expectation(self, per_token: Tensor) -> Tensor:
        """Over all sequences, weighed by the policy as it stands."""
        weights = self.sequence_logprobs(self.logits).exp()
        return (weights.repeat_interleave(self.offsets.diff()) * per_token).sum()

    def penalty_gradient(self, name: str, reference: Tensor) -> Tensor:
        """Policy gradient with -1 times the estimator as the only reward, in expectation."""
        logits = self.logits.clone().requires_grad_()
        logp = self.token_logprobs(logits)
        penalty = ESTIMATORS[name](logp.detach(), self.token_logprobs(reference))
        rewards = token_rewards(penalty, torch.zeros(len(self.sequences)), self.offsets, beta=1.0)
        advantages, _ = gae(rewards, torch.zeros_like(rewards), self.offsets, gamma=1.0, lam=1.0)
        self.expectation(logp * advantages).backward()
        assert logits.grad is not None
        return logits.grad


def test_k1_in_the_reward_descends_the_exact_kl_of_sequences_and_k3_does_not() -> None:
    policy, reference = TabularPolicy(0), TabularPolicy(1).logits
    exact = policy.exact_kl_gradient(reference)
    torch.testing.assert_close(policy.penalty_gradient("k1", reference), -exact, rtol=0, atol=1e-8)
    assert (policy.penalty_gradient("k3", reference) + exact).abs().max() > 0.05


def test_k1_as_a_loss_has_no_gradient_in_expectation() -> None:
    policy, reference = TabularPolicy(0), TabularPolicy(1).logits
    logits = policy.logits.clone().requires_grad_()
    policy.expectation(k1(policy.token_logprobs(logits), policy.token_logprobs(reference))).backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-12


def test_score_is_added_at_the_eos_token_itself() -> None:
    # Lengths 3, 1 and 2; every kl 1, beta 0.5.
    rewards = token_rewards(torch.ones(6), torch.tensor([10.0, 20.0, 30.0]), torch.tensor([0, 3, 4, 6]), beta=0.5)
    assert rewards.tolist() == [-0.5, -0.5, 9.5, 19.5, -0.5, 29.5]


def test_a_sequence_without_tokens_is_refused_rather_than_scored_on_its_neighbour() -> None:
    with pytest.raises(ValueError, match=r"sequences \[1\] have no tokens"):
        token_rewards(torch.ones(3), torch.ones(3), torch.tensor([0, 2, 2, 3]), beta=0.5)


@given(batches(columns=1, shortest=1), st.floats(0, 2))
def test_rewards_equal_a_loop_over_tokens(batch: tuple[list[Tensor], Tensor], beta: float) -> None:
    (kl,), offsets = batch
    scores = torch.arange(len(offsets) - 1, dtype=torch.float32)
    expected = []
    for row, score in zip(rows(kl, offsets), scores, strict=False):
        part = [-beta * value.item() for value in row]
        part[-1] += score.item()
        expected.append(torch.tensor(part, dtype=torch.float64))
    torch.testing.assert_close(token_rewards(kl, scores, offsets, beta), join(expected))


def test_fixed_coefficient_stays() -> None:
    controller = FixedKL(0.05)
    controller.update(kl=100.0, samples=64)
    assert controller.coefficient == 0.05
    controller.restore({"coefficient": 0.2})
    assert controller.state() == {"coefficient": 0.2}


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.1),  # on target
        (6.6, 0.101),  # error 0.1, times 100 / 1000
        (60.0, 0.102),  # error clipped to 0.2
        (5.4, 0.099),  # error -0.1
        (-1.0, 0.098),  # error clipped to -0.2; a mean of k1 can be negative
    ],
)
def test_adaptive_coefficient_follows_the_clipped_relative_error(kl: float, expected: float) -> None:
    controller = AdaptiveKL(0.1, target=6.0, horizon=1000)
    controller.update(kl, samples=100)
    assert controller.coefficient == pytest.approx(expected)


def test_a_restored_controller_goes_on_as_the_saved_one() -> None:
    saved, restored = AdaptiveKL(0.1, 6.0, 1000), AdaptiveKL(0.7, 6.0, 1000)
    saved.update(9.0, 100)
    restored.restore(saved.state())
    for controller in (saved, restored):
        controller.update(3.0, 50)
    assert restored.coefficient == saved.coefficient != 0.1


@pytest.mark.parametrize("kl", [math.nan, math.inf, -math.inf])
def test_a_kl_that_is_not_finite_is_refused(kl: float) -> None:
    controller = AdaptiveKL(0.1, 6.0, 1000)
    with pytest.raises(ValueError, match="was given a KL of"):
        controller.update(kl, 10)
    assert controller.coefficient == 0.1


def test_a_horizon_that_could_turn_the_coefficient_negative_is_refused() -> None:
    with pytest.raises(ValueError, match="set the horizon above 20"):
        AdaptiveKL(0.1, 6.0, horizon=20).update(0.0, samples=100)


def test_a_process_that_only_holds_a_controller_does_not_load_torch() -> None:
    code = "import sys; import rlhf_ray.algorithms.kl; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
