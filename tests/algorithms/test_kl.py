import math
import subprocess
import sys
from collections.abc import Callable
from itertools import combinations, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragged import batches, join, offsets_of, rows
from torch import Tensor

from rlhf_ray.algorithms import vocabulary_kl
from rlhf_ray.algorithms.advantages import gae
from rlhf_ray.algorithms.kl import ESTIMATORS, AdaptiveKL, BudgetKL, Controller, FixedKL, k1, k2, k3, token_rewards


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

    def estimates(self, name: str, logits: Tensor, reference: Tensor) -> Tensor:
        """[N], differentiable in logits. `top_k` has one id a state, so that two tokens are in its bucket."""
        if name in ESTIMATORS:
            return ESTIMATORS[name](self.token_logprobs(logits), self.token_logprobs(reference))
        logp, ref = logits.log_softmax(-1), reference.log_softmax(-1)
        if name == "exact":
            return vocabulary_kl.exact(logp, ref)[self.states]
        ids = self.logits.argmax(-1, keepdim=True)
        return vocabulary_kl.top_k(logp, ids, ref.gather(-1, ids))[self.states]

    def expectation(self, per_token: Tensor, logits: Tensor | None = None) -> Tensor:
        """Of a sequence's sum, over all sequences, weighed by these logits or else by the policy as it stands."""
        weights = self.sequence_logprobs(self.logits if logits is None else logits).exp()
        return (weights.repeat_interleave(self.offsets.diff()) * per_token).sum()

    def in_the_reward(self, name: str, reference: Tensor, gamma: float = 1.0) -> Tensor:
        """Gradient, in expectation, of a policy that is charged the detached estimates token by token."""
        logits = self.logits.clone().requires_grad_()
        penalty = self.estimates(name, self.logits, reference)
        rewards = token_rewards(penalty, torch.zeros(len(self.sequences)), self.offsets, beta=1.0)
        returns, _ = gae(rewards, torch.zeros_like(rewards), self.offsets, gamma=gamma, lam=1.0)
        return gradient_of(self.expectation(-returns * self.token_logprobs(logits)), logits)

    def as_a_loss(self, name: str, reference: Tensor) -> Tensor:
        """Gradient of the estimates on sequences sampled from the policy, in expectation."""
        logits = self.logits.clone().requires_grad_()
        return gradient_of(self.expectation(self.estimates(name, logits, reference)), logits)


def gradient_of(value: Tensor, logits: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(value, logits)
    return gradient


def differences(function: Callable[[Tensor], float], logits: Tensor, step: float = 1e-5) -> Tensor:
    """Central differences, as an oracle of gradients that knows nothing of autograd, detaching or sampling."""
    gradient = torch.zeros_like(logits)
    for place in product(*map(range, logits.shape)):
        nudge = torch.zeros_like(logits)
        nudge[place] = step
        gradient[place] = (function(logits + nudge) - function(logits - nudge)) / (2 * step)
    return gradient


class Gradients:
    """What there is to find for a policy of three states, from plain sums and differences."""

    def __init__(self, policy: TabularPolicy, reference: Tensor) -> None:
        self.policy, self.reference = policy, reference
        self.whole = differences(self.sequence_kl, policy.logits)
        """Of KL(pi || pi_ref) of sequences."""
        self.position = differences(lambda logits: self.state_kl(logits, reference), policy.logits)
        """Each state's own KL(pi || pi_ref), how often it is visited held fixed."""
        self.reverse = differences(lambda logits: self.state_kl(reference, logits), policy.logits)
        """The same of KL(pi_ref || pi), the states still those that pi visits."""
        self.future = self.whole - self.position
        """What a token does to the KL of states after it."""
        self.nothing = torch.zeros_like(policy.logits)

    def sequence_kl(self, logits: Tensor) -> float:
        logps, refs = self.policy.sequence_logprobs(logits), self.policy.sequence_logprobs(self.reference)
        return sum(math.exp(p) * (p - r) for p, r in zip(logps.tolist(), refs.tolist(), strict=True))

    def state_kl(self, left: Tensor, right: Tensor) -> float:
        """sum_s d(s) KL(left(.|s) || right(.|s)), d(s) how often the unmoved policy visits s."""
        first = self.policy.logits[0].softmax(-1).tolist()
        visits = [1.0, first[1], first[2]]
        divergences = [
            sum(math.exp(p) * (p - r) for p, r in zip(*state, strict=True))
            for state in zip(left.log_softmax(-1).tolist(), right.log_softmax(-1).tolist(), strict=True)
        ]
        return sum(visit * divergence for visit, divergence in zip(visits, divergences, strict=True))

    def of_the_mean(self, name: str) -> Tensor:
        """Of the estimates' expectation, as the policy that both samples and is measured moves."""
        return differences(
            lambda logits: self.policy.expectation(self.policy.estimates(name, logits, self.reference), logits).item(),
            self.policy.logits,
        )


def gradients() -> Gradients:
    return Gradients(TabularPolicy(0), TabularPolicy(7).logits)


def assert_equal(gradient: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-8)


def test_the_parts_of_the_gradient_are_different_ones() -> None:
    # Otherwise the table below could confuse one with another.
    known = gradients()
    parts = [known.nothing, known.whole, known.position, known.future, known.reverse, known.whole - known.reverse]
    assert min((left - right).abs().max().item() for left, right in combinations(parts, 2)) > 0.05


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("k1", lambda known: known.whole),
        ("k2", lambda known: known.of_the_mean("k2") - known.position),
        ("k3", lambda known: known.whole - known.reverse),
        ("exact", lambda known: known.future),  # a state's own KL is no consequence of the token chosen there
    ],
)
def test_gradient_of_each_estimator_in_the_reward(name: str, expected: Callable[[Gradients], Tensor]) -> None:
    known = gradients()
    assert_equal(known.policy.in_the_reward(name, known.reference), expected(known))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("k1", lambda known: known.nothing),
        ("k2", lambda known: known.position),
        ("k3", lambda known: known.reverse),
        ("exact", lambda known: known.position),
    ],
)
def test_gradient_of_each_estimator_as_a_loss(name: str, expected: Callable[[Gradients], Tensor]) -> None:
    known = gradients()
    assert_equal(known.policy.as_a_loss(name, known.reference), expected(known))


@pytest.mark.parametrize("name", [*ESTIMATORS, "exact", "top_k"])
def test_reward_and_loss_together_give_the_gradient_of_the_estimators_mean(name: str) -> None:
    known = gradients()
    both = known.policy.in_the_reward(name, known.reference) + known.policy.as_a_loss(name, known.reference)
    assert_equal(both, known.of_the_mean(name))
    if name in ("k1", "k3", "exact"):  # whose mean is the KL of sequences
        assert_equal(both, known.whole)


def test_k2_as_a_loss_is_k1_in_a_reward_that_forgets_the_future() -> None:
    known = gradients()
    as_a_loss = known.policy.as_a_loss("k2", known.reference)
    assert_equal(as_a_loss, known.policy.in_the_reward("k1", known.reference, gamma=0.0))
    assert (as_a_loss - known.whole).abs().max() > 0.05


def test_k2_of_a_whole_sequence_as_a_loss_has_the_exact_gradient() -> None:
    known = gradients()
    policy, logits = known.policy, known.policy.logits.clone().requires_grad_()
    squares = k2(policy.sequence_logprobs(logits), policy.sequence_logprobs(known.reference))
    assert_equal(gradient_of((policy.sequence_logprobs(policy.logits).exp() * squares).sum(), logits), known.whole)


def test_near_the_reference_k3_as_a_loss_tends_to_each_positions_own_gradient() -> None:
    policy = TabularPolicy(0)
    known = Gradients(policy, policy.logits + 1e-3 * TabularPolicy(1).logits)
    own = known.position.norm()
    assert (policy.as_a_loss("k3", known.reference) - known.position).norm() < 0.01 * own


@pytest.mark.parametrize("name", ["k2", "k3"])
def test_near_the_reference_k2_and_k3_in_the_reward_leave_out_each_positions_own_gradient(name: str) -> None:
    policy = TabularPolicy(0)
    known = Gradients(policy, policy.logits + 1e-3 * TabularPolicy(1).logits)
    assert (policy.in_the_reward(name, known.reference) - known.future).norm() < 0.01 * known.position.norm()


@pytest.mark.parametrize("name", ["k1", "k3", "exact"])
def test_the_mean_over_sampled_sequences_lies_within_its_interval_of_the_exact_kl(name: str) -> None:
    known = gradients()
    policy = known.policy
    sums = [row.sum() for row in rows(policy.estimates(name, policy.logits, known.reference), policy.offsets)]
    probabilities = policy.sequence_logprobs(policy.logits).exp()
    generator = torch.Generator().manual_seed(2)
    values = torch.stack(sums)[torch.multinomial(probabilities, 100_000, replacement=True, generator=generator)]
    assert abs(values.mean().item() - known.sequence_kl(policy.logits)) < 2.58 * values.std().item() / 100_000**0.5


def test_the_exact_kl_of_positions_varies_less_over_sequences_than_k1() -> None:
    known = gradients()
    policy = known.policy
    probabilities = policy.sequence_logprobs(policy.logits).exp()
    spread = {}
    for name in ("k1", "exact"):
        sums = [row.sum() for row in rows(policy.estimates(name, policy.logits, known.reference), policy.offsets)]
        second_moment = (probabilities * torch.stack(sums).square()).sum().item()
        spread[name] = second_moment - known.sequence_kl(policy.logits) ** 2
    assert 0 < spread["exact"] < 0.5 * spread["k1"]


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


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (10.0, 0.1),  # on the budget
        (14.0, 0.18),  # 4 nats above, times 0.02
        (7.0, 0.04),  # 3 below
        (1.0, 0.0),  # 9 below would be -0.08
    ],
)
def test_budget_coefficient_ascends_the_dual_and_stops_at_zero(kl: float, expected: float) -> None:
    controller = BudgetKL(0.1, budget=10.0, rate=0.02)
    controller.update(kl, samples=100)
    assert controller.coefficient == pytest.approx(expected)


@pytest.mark.parametrize(("slope", "kl"), [(8.0, 3.0), (2.0, 2.0)])
def test_a_budget_is_met_where_it_binds_and_costs_nothing_where_it_does_not(slope: float, kl: float) -> None:
    # max_x slope x - x^2 / 2 - beta x^2 / 2 has x = slope / (1 + beta); let KL be x, free of charge 8 or 2 nats.
    controller = BudgetKL(0.5, budget=3.0, rate=0.1)
    for _ in range(300):
        controller.update(slope / (1 + controller.coefficient), samples=1)
    assert slope / (1 + controller.coefficient) == pytest.approx(kl, rel=1e-3)


@pytest.mark.parametrize("build", [lambda beta: AdaptiveKL(beta, 6.0, 1000), lambda beta: BudgetKL(beta, 6.0, 0.01)])
def test_a_restored_controller_goes_on_as_the_saved_one(build: Callable[[float], Controller]) -> None:
    saved, restored = build(0.1), build(0.7)
    saved.update(9.0, 100)
    restored.restore(saved.state())
    for controller in (saved, restored):
        controller.update(5.0, 50)
    assert restored.coefficient == saved.coefficient != 0.1


@pytest.mark.parametrize("kl", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("controller", [AdaptiveKL(0.1, 6.0, 1000), BudgetKL(0.1, 6.0, 0.01)])
def test_a_kl_that_is_not_finite_is_refused(controller: Controller, kl: float) -> None:
    with pytest.raises(ValueError, match="was given a KL of"):
        controller.update(kl, 10)
    assert controller.coefficient == 0.1


def test_a_horizon_that_could_turn_the_coefficient_negative_is_refused() -> None:
    with pytest.raises(ValueError, match="set the horizon above 20"):
        AdaptiveKL(0.1, 6.0, horizon=20).update(0.0, samples=100)


def test_a_process_that_only_holds_a_controller_does_not_load_torch() -> None:
    code = "import sys; import rlhf_ray.algorithms.kl; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_horizon_just_long_enough_is_accepted() -> None:
    controller = AdaptiveKL(0.1, 6.0, horizon=21)
    controller.update(0.0, samples=100)
    assert controller.coefficient == pytest.approx(0.1 * (1 - 0.2 * 100 / 21))
