import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf_ray.algorithms.vocabulary_kl import exact, top_k

VOCABULARY = 50
seeds = st.integers(0, 2**31)


def distributions(seed: int, rows: int = 4, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities of a policy and of a reference near it, [n, V] float64."""
    generator = torch.Generator().manual_seed(seed)
    logits, moved = torch.randn(2, rows, VOCABULARY, generator=generator, dtype=torch.float64)
    return (2 * logits + spread * moved).log_softmax(-1), (2 * logits).log_softmax(-1)


def likeliest(logp: Tensor, reference: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k tokens likeliest to the policy, and what the reference makes of them."""
    ids = logp.topk(k, -1).indices
    return ids, reference.gather(-1, ids)


def divergence(p: list[float], q: list[float]) -> float:
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


def bucketed(p: list[float], ids: list[int]) -> list[float]:
    rest = [probability for token, probability in enumerate(p) if token not in ids]
    return [*(p[token] for token in ids), *([math.fsum(rest)] if rest else [])]


def test_values_match_numbers_worked_by_hand() -> None:
    logp = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    ref = torch.tensor([[0.25, 0.25, 0.25, 0.25]]).log()
    # log 2 / 2 + 0 - 2 log 2 / 8
    assert exact(logp, ref).item() == pytest.approx(math.log(2) / 4)
    # Token 0, and a bucket of 0.5 against 0.75.
    ids = torch.tensor([[0]])
    assert top_k(logp, ids, ref[:, :1]).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    # Tokens 0 and 2, and a bucket of 0.375 against 0.5.
    ids = torch.tensor([[2, 0]], dtype=torch.int32)
    by_hand = 0.125 * math.log(0.5) + 0.5 * math.log(2) + 0.375 * math.log(0.75)
    assert top_k(logp, ids, ref[:, :2]).item() == pytest.approx(by_hand)


@given(seeds, st.integers(1, VOCABULARY))
def test_values_equal_a_loop_over_the_vocabulary(seed: int, k: int) -> None:
    logp, ref = distributions(seed)
    ids, at_ids = likeliest(logp, ref, k)
    full, few = exact(logp, ref), top_k(logp, ids, at_ids)
    for row in range(len(logp)):
        p, q, chosen = logp[row].exp().tolist(), ref[row].exp().tolist(), ids[row].tolist()
        assert full[row].item() == pytest.approx(divergence(p, q))
        assert few[row].item() == pytest.approx(divergence(bucketed(p, chosen), bucketed(q, chosen)), abs=1e-12)


@given(seeds, st.integers(1, VOCABULARY), st.floats(0, 5))
def test_top_k_lies_between_zero_and_the_exact_kl_whichever_tokens_are_chosen(seed: int, k: int, spread: float) -> None:
    logp, ref = distributions(seed, spread=spread)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(logp.shape, generator=generator).topk(k, -1).indices
    few = top_k(logp, ids, ref.gather(-1, ids))
    assert (few >= -1e-12).all()
    assert (few <= exact(logp, ref) + 1e-12).all()


@given(seeds)
def test_more_tokens_never_tell_less_and_all_of_them_everything(seed: int) -> None:
    logp, ref = distributions(seed)
    values = torch.stack([top_k(logp, *likeliest(logp, ref, k)) for k in range(1, VOCABULARY + 1)])
    assert (values.diff(dim=0) >= -1e-12).all()
    torch.testing.assert_close(values[-1], exact(logp, ref), rtol=0, atol=1e-12)


@given(seeds)
def test_the_order_of_tokens_does_not_matter(seed: int) -> None:
    logp, ref = distributions(seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(VOCABULARY, generator=generator)
    torch.testing.assert_close(exact(logp[:, order], ref[:, order]), exact(logp, ref), rtol=0, atol=1e-12)
    ids, at_ids = likeliest(logp, ref, 7)
    order = torch.randperm(7, generator=generator)
    swapped = top_k(logp, ids[:, order], at_ids[:, order])
    torch.testing.assert_close(swapped, top_k(logp, ids, at_ids), rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [1, 7, VOCABULARY - 1, VOCABULARY])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_equal_models_are_exactly_zero_apart_with_a_vanishing_gradient(k: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (scale * torch.randn(20, VOCABULARY, generator=generator)).requires_grad_()
    logp = logits.log_softmax(-1)
    ref = logp.detach().clone()
    full, few = exact(logp, ref), top_k(logp, *likeliest(logp.detach(), ref, k))
    assert full.eq(0).all()
    assert few.eq(0).all()
    (full + few).sum().backward()
    assert logits.grad.abs().max() < 1e-6


@given(seeds, st.floats(0, 1e-3))
def test_only_rounding_makes_a_kl_negative(seed: int, spread: float) -> None:
    logp, ref = (rows.float() for rows in distributions(seed, spread=spread))
    assert (exact(logp, ref) >= -1e-6).all()
    assert (top_k(logp, *likeliest(logp, ref, 20)) >= -1e-6).all()


@given(seeds, st.integers(1, VOCABULARY))
def test_gradients_equal_differences(seed: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, VOCABULARY, generator=generator, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(1, VOCABULARY, generator=generator, dtype=torch.float64).log_softmax(-1)
    ids, at_ids = likeliest(logits.detach(), ref, k)
    assert torch.autograd.gradcheck(lambda x: exact(x.log_softmax(-1), ref), logits)
    assert torch.autograd.gradcheck(lambda x: top_k(x.log_softmax(-1), ids, at_ids), logits)


@pytest.mark.parametrize("k", [1, 2, VOCABULARY - 1, VOCABULARY])
@pytest.mark.parametrize("peak", [0.0, 20.0, 200.0])
def test_float32_extremes_agree_with_float64(k: int, peak: float) -> None:
    # The policy puts all but V exp(-peak) on token 3; the reference gives 40 nats less to it than to any other.
    logits = torch.linspace(0, 1, VOCABULARY, dtype=torch.float64)[None].clone()
    ref = logits.clone()
    logits[0, 3] += peak
    ref[0, 3] -= 40
    values, slopes = {}, {}
    for dtype in (torch.float64, torch.float32):
        moved = logits.to(dtype).requires_grad_()
        logp, reference = moved.log_softmax(-1), ref.to(dtype).log_softmax(-1)
        value = torch.cat([exact(logp, reference), top_k(logp, *likeliest(logp.detach(), reference, k))])
        (slope,) = torch.autograd.grad(value.sum(), moved)
        values[dtype], slopes[dtype] = value.detach().double(), slope.double()
    torch.testing.assert_close(values[torch.float32], values[torch.float64], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(slopes[torch.float32], slopes[torch.float64], rtol=1e-5, atol=1e-4)


def test_a_light_bucket_keeps_its_digits_in_float32() -> None:
    # All but 1e-6 on one token, against all but 3e-6; next to one, either is a handful of roundings.
    p, q = 1e-6, 3e-6
    logp = torch.tensor([[math.log1p(-p), math.log(p)]])
    value = top_k(logp, torch.tensor([[0]]), torch.tensor([[math.log1p(-q)]]))
    expected = (1 - p) * (math.log1p(-p) - math.log1p(-q)) + p * math.log(p / q)
    assert value.item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("policy_mass", [1.0, 0.5])
def test_a_reference_whose_mass_rounds_to_one_or_more_leaves_a_finite_bucket(policy_mass: float) -> None:
    logits = torch.tensor([[policy_mass / 2, policy_mass / 2, (1 - policy_mass) + 1e-12]]).log().requires_grad_()
    ids = torch.tensor([[0, 1]])
    for surplus in (-1e-7, 0.0, 1e-6):
        reference = torch.full((1, 2), math.log(0.5)) + surplus
        value = top_k(logits.log_softmax(-1), ids, reference)
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert value.isfinite().all()
        assert gradient.isfinite().all()
        # At the bound the bucket of the reference weighs 2^-23, and the value errs to the side of less.
        expected = (1 - policy_mass) * (math.log(0.5) + 23 * math.log(2)) + policy_mass * math.log(policy_mass)
        assert value.item() == pytest.approx(expected, abs=0.2)


def test_a_row_that_is_not_finite_spoils_no_other() -> None:
    logp, ref = distributions(0)
    ids, at_ids = likeliest(logp, ref, 7)
    broken = logp.clone()
    broken[1] = math.nan
    at_broken = at_ids.clone()
    at_broken[2, 3] = math.inf
    assert exact(broken, ref).isnan().tolist() == [False, True, False, False]
    values = top_k(logp, ids, at_broken)
    assert values.isfinite().tolist() == [True, True, False, True]
    assert torch.equal(values[[0, 1, 3]], top_k(logp, ids, at_ids)[[0, 1, 3]])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_ids_may_be_of_any_integer_type(dtype: torch.dtype) -> None:
    logp, ref = distributions(0)
    ids, at_ids = likeliest(logp, ref, 7)
    assert torch.equal(top_k(logp, ids.to(dtype), at_ids), top_k(logp, ids, at_ids))
