import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rlhf_ray.algorithms.logprobs import TokenStatistics, chunked, log_softmax, logprobs_and_entropy
from rlhf_ray.algorithms.vocabulary_kl import FullReference, TopKReference, exact, top_k

HIDDEN, VOCABULARY = 5, 11
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


class Head(nn.Linear):
    """An output head that counts the rows of each call."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(HIDDEN, VOCABULARY, bias=False, dtype=dtype)
        nn.init.normal_(self.weight, generator=torch.Generator().manual_seed(0))
        self.rows: list[int] = []

    def forward(self, hidden: Tensor) -> Tensor:
        self.rows.append(len(hidden))
        return super().forward(hidden)


def inputs(tokens: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, HIDDEN, generator=generator, dtype=dtype, requires_grad=True)
    return hidden, torch.randint(VOCABULARY, (tokens,), generator=generator)


def gradients(measure: Callable[[Tensor, Head], TokenStatistics], tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """What is measured, and the gradients of hidden and weight of a loss that takes tokens unequally."""
    head = Head(dtype)
    hidden, _ = inputs(tokens, dtype)
    logp, entropy, kl = measure(hidden, head)
    weights = torch.linspace(-1, 2, tokens, dtype=dtype)
    loss = (weights * logp).sum() - (weights.square() * entropy).sum()
    if kl is not None:
        loss = loss + (weights.exp() * kl).sum()
    loss.backward()
    assert hidden.grad is not None
    assert head.weight.grad is not None
    measured = [logp, entropy] if kl is None else [logp, entropy, kl]
    return [*(value.detach() for value in measured), hidden.grad, head.weight.grad]


def references(tokens: int, dtype: torch.dtype = torch.float64) -> list[FullReference | TopKReference]:
    """Of a model of its own width, head and dtype, as another actor would send its rows."""
    generator = torch.Generator().manual_seed(tokens + 100)
    head = nn.Linear(3, VOCABULARY, bias=False, dtype=dtype)
    nn.init.normal_(head.weight, generator=generator)
    hidden = torch.randn(tokens, 3, generator=generator, dtype=dtype)
    ids = torch.stack(
        [torch.randperm(VOCABULARY, generator=generator)[:4] for _ in range(tokens)] or [torch.empty(0, 4)]
    )
    ids = ids[:tokens].to(torch.int32)
    logprobs = log_softmax(head(hidden), 0.7).gather(-1, ids.long()).detach()
    return [FullReference(hidden, head), TopKReference(ids, logprobs)]


def test_logprobs_and_entropy_match_numbers_worked_by_hand() -> None:
    # Odds 1 : 3, and at temperature 2 they are 1 : sqrt 3.
    logits = torch.tensor([[0.0, math.log(3.0)]] * 2)
    logp, entropy = logprobs_and_entropy(logits, torch.tensor([0, 1]), 1.0)
    assert logp.tolist() == pytest.approx([math.log(0.25), math.log(0.75)])
    assert entropy.tolist() == pytest.approx([-0.25 * math.log(0.25) - 0.75 * math.log(0.75)] * 2)
    logp, _ = logprobs_and_entropy(logits, torch.tensor([0, 1]), 2.0)
    assert logp.exp().tolist() == pytest.approx([1 / (1 + math.sqrt(3)), math.sqrt(3) / (1 + math.sqrt(3))])


@given(st.integers(0, 2**31), st.floats(0.2, 3))
def test_values_equal_a_loop_over_tokens(seed: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(6, VOCABULARY, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCABULARY, (6,), generator=generator)
    logp, entropy = logprobs_and_entropy(logits, targets, temperature)
    for row in range(6):
        weights = [math.exp(value / temperature) for value in logits[row].tolist()]
        p = [weight / sum(weights) for weight in weights]
        assert logp[row].item() == pytest.approx(math.log(p[targets[row]]))
        assert entropy[row].item() == pytest.approx(-sum(q * math.log(q) for q in p))


def test_equal_logits_have_the_entropy_of_the_uniform_distribution() -> None:
    _, entropy = logprobs_and_entropy(torch.full((1, VOCABULARY), 1e4), torch.tensor([0]), 1.0)
    assert entropy.item() == pytest.approx(math.log(VOCABULARY))


@pytest.mark.parametrize(
    ("given_dtype", "computed"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_the_softmax_is_in_float32_at_least(given_dtype: torch.dtype, computed: torch.dtype) -> None:
    logits = torch.linspace(-3, 3, VOCABULARY).to(given_dtype).repeat(2, 1)
    targets = torch.tensor([1, 2], dtype=torch.int32)
    logp, entropy = logprobs_and_entropy(logits, targets, 0.7)
    assert logp.dtype == entropy.dtype == computed
    assert torch.equal(logp, logprobs_and_entropy(logits.to(computed), targets, 0.7)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(tokens=st.integers(0, 9), chunk=st.integers(1, 10), calls=st.integers(1, 4))
def test_chunks_change_neither_values_nor_gradients(dtype: torch.dtype, tokens: int, chunk: int, calls: int) -> None:
    _, targets = inputs(tokens, dtype)
    whole = gradients(
        lambda hidden, head: TokenStatistics(*logprobs_and_entropy(head(hidden), targets, 0.7)), tokens, dtype
    )
    parts = gradients(lambda hidden, head: chunked(hidden, head, targets, 0.7, chunk, calls), tokens, dtype)
    for part, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(part, expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("form", [0, 1])
@given(tokens=st.integers(0, 9), chunk=st.integers(1, 10), calls=st.integers(1, 4))
def test_chunks_change_neither_the_kl_nor_its_gradients(form: int, tokens: int, chunk: int, calls: int) -> None:
    _, targets = inputs(tokens)
    reference = references(tokens)[form]

    def whole(hidden: Tensor, head: Head) -> TokenStatistics:
        logits = head(hidden)
        logp = log_softmax(logits, 0.7)
        if isinstance(reference, TopKReference):
            kl = top_k(logp, reference.ids, reference.logprobs)
        else:
            kl = exact(logp, log_softmax(reference.head(reference.hidden), 0.7).detach())
        return TokenStatistics(*logprobs_and_entropy(logits, targets, 0.7), kl)

    expected = gradients(whole, tokens, torch.float64)
    parts = gradients(
        lambda hidden, head: chunked(hidden, head, targets, 0.7, chunk, calls, reference), tokens, torch.float64
    )
    for part, value in zip(parts, expected, strict=True):
        torch.testing.assert_close(part, value, rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", [0, 1])
def test_the_kl_follows_its_token_when_tokens_change_places(form: int) -> None:
    head = Head()
    hidden, targets = inputs(9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    reference = references(9)[form]
    if isinstance(reference, FullReference):
        moved = FullReference(reference.hidden[order], reference.head)
    else:
        moved = TopKReference(reference.ids[order], reference.logprobs[order])
    there = chunked(hidden, head, targets, 0.7, chunk=4, reference=reference)
    back = chunked(hidden[order], head, targets[order], 0.7, chunk=4, reference=moved)
    for left, right in zip(there, back, strict=True):
        torch.testing.assert_close(left[order], right, rtol=0, atol=1e-12)


def test_there_is_no_kl_without_a_reference() -> None:
    hidden, targets = inputs(4)
    assert chunked(hidden, Head(), targets, 1.0, chunk=2).kl is None


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_a_reference_of_other_tokens_is_refused(rows: int) -> None:
    # One row would broadcast without an error.
    hidden, targets = inputs(4)
    with pytest.raises(ValueError, match=rf"columns of \[4, 4, {rows}\] tokens"):
        chunked(hidden, Head(), targets, 1.0, chunk=8, reference=references(rows)[0])


def test_the_reference_gets_no_gradient() -> None:
    head, frozen = Head(), Head()
    hidden, targets = inputs(10)
    sent = torch.ones(10, HIDDEN, dtype=torch.float64, requires_grad=True)
    full = chunked(hidden, head, targets, 1.0, chunk=3, reference=FullReference(sent, frozen))
    ids = torch.arange(3).repeat(10, 1)
    some = torch.full((10, 3), -3.0, dtype=torch.float64, requires_grad=True)
    few = chunked(hidden, head, targets, 1.0, chunk=3, reference=TopKReference(ids, some))
    (full.kl + few.kl).sum().backward()
    assert frozen.weight.grad is None
    assert sent.grad is None
    assert some.grad is None
    assert head.weight.grad.abs().sum() > 0


def test_the_reference_is_taken_at_the_temperature_of_the_policy() -> None:
    head = Head()
    hidden, targets = inputs(4)
    statistics = chunked(hidden, head, targets, 0.5, chunk=4, reference=FullReference(hidden, head))
    assert statistics.kl.eq(0).all()
    other = FullReference(hidden + 1, head)
    logp, ref = (log_softmax(head(rows), 0.5) for rows in (hidden, hidden + 1))
    kl = chunked(hidden, head, targets, 0.5, chunk=4, reference=other).kl
    torch.testing.assert_close(kl, (logp.exp() * (logp - ref)).sum(-1), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("tokens", "expected"), [(0, [0, 0, 0]), (4, [3, 1, 0]), (9, [3, 3, 3])])
def test_the_references_head_is_called_as_often_as_other_ranks_need(tokens: int, expected: list[int]) -> None:
    head, frozen = Head(), Head()
    hidden, targets = inputs(tokens)
    reference = FullReference(torch.ones(tokens, HIDDEN, dtype=torch.float64), frozen)
    statistics = chunked(hidden, head, targets, 1.0, chunk=3, calls=3, reference=reference)
    assert head.rows == frozen.rows == expected
    head.rows.clear()
    frozen.rows.clear()
    (statistics.logprobs + statistics.kl).sum().backward()
    assert sorted(head.rows) == sorted(frozen.rows) == sorted(expected)


@pytest.mark.parametrize("tokens", [0, 1, 4, 10])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_head_never_sees_more_than_a_chunk_of_rows(tokens: int, with_gradients: bool) -> None:
    head = Head()
    hidden, targets = inputs(tokens)
    with torch.set_grad_enabled(with_gradients):
        logp, entropy, _ = chunked(hidden, head, targets, 1.0, chunk=4)
    if with_gradients:
        (logp + entropy).sum().backward()
    assert max(head.rows) <= 4
    assert logp.shape == entropy.shape == (tokens,)


def test_the_forward_pass_keeps_no_logits_for_the_backward_pass() -> None:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    head = Head()
    hidden, targets = inputs(10)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        chunked(hidden, head, targets, 1.0, chunk=3, reference=FullReference(hidden.detach(), Head()))
        assert all(tensor.shape[-1] != VOCABULARY for tensor in kept)
        logprobs_and_entropy(head(hidden), targets, 1.0)
        assert any(tensor.shape[-1] == VOCABULARY for tensor in kept)


def test_a_weight_shared_with_the_embedding_gets_its_whole_gradient_at_once() -> None:
    # Sharded optimisers reduce a gradient when its hook fires, and refuse a second one in the same backward pass.
    head = Head()
    ids = torch.arange(10)
    fired: list[Tensor] = []
    head.weight.register_post_accumulate_grad_hook(lambda weight: fired.append(weight.grad.clone()))
    logp, entropy, _ = chunked(head.weight[ids], head, ids.flip(0), 1.0, chunk=3)
    (logp + entropy).sum().backward()
    assert len(fired) == 1

    head.weight.grad = None
    logp, entropy = logprobs_and_entropy(head(head.weight[ids]), ids.flip(0), 1.0)
    (logp + entropy).sum().backward()
    torch.testing.assert_close(fired[0], head.weight.grad, rtol=0, atol=1e-10)


def test_a_head_over_a_frozen_body_still_learns() -> None:
    head = Head()
    hidden, targets = inputs(10)
    chunked(hidden.detach(), head, targets, 1.0, chunk=3)[0].sum().backward()
    chunks = head.weight.grad
    head.weight.grad = None
    logprobs_and_entropy(head(hidden.detach()), targets, 1.0)[0].sum().backward()
    torch.testing.assert_close(chunks, head.weight.grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("tokens", "expected"), [(0, [0, 0, 0]), (4, [3, 1, 0]), (9, [3, 3, 3]), (10, [3, 3, 3, 1])])
def test_head_is_called_as_often_as_other_ranks_need(tokens: int, expected: list[int]) -> None:
    head = Head()
    hidden, targets = inputs(tokens)
    logp = chunked(hidden, head, targets, 1.0, chunk=3, calls=3).logprobs
    assert head.rows == expected
    head.rows.clear()
    logp.sum().backward()
    assert sorted(head.rows) == sorted(expected), "the backward pass gathers as often as the forward pass"


def test_a_single_chunk_is_not_computed_twice() -> None:
    head = Head()
    hidden, targets = inputs(4)
    chunked(hidden, head, targets, 1.0, chunk=4)[0].sum().backward()
    assert head.rows == [4]


def test_two_chunks_are_enough_to_be_computed_again() -> None:
    head = Head()
    hidden, targets = inputs(4)
    logp = chunked(hidden, head, targets, 1.0, chunk=3).logprobs
    assert head.rows == [3, 1]
    logp.sum().backward()
    assert sorted(head.rows) == [1, 1, 3, 3]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_targets_may_be_of_any_integer_type(dtype: torch.dtype) -> None:
    logits = torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 3, 3, 10])
    narrow, _ = logprobs_and_entropy(logits, targets.to(dtype), 1.0)
    assert torch.equal(narrow, logprobs_and_entropy(logits, targets, 1.0)[0])
