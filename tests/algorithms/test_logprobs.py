import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rlhf_ray.algorithms.logprobs import chunked, logprobs_and_entropy

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


def gradients(
    measure: Callable[[Tensor, Head], tuple[Tensor, Tensor]], tokens: int, dtype: torch.dtype
) -> list[Tensor]:
    """Both results, and the gradients of hidden and weight of a loss that takes tokens unequally."""
    head = Head(dtype)
    hidden, _ = inputs(tokens, dtype)
    logp, entropy = measure(hidden, head)
    weights = torch.linspace(-1, 2, tokens, dtype=dtype)
    ((weights * logp).sum() - (weights.square() * entropy).sum()).backward()
    assert hidden.grad is not None
    assert head.weight.grad is not None
    return [logp.detach(), entropy.detach(), hidden.grad, head.weight.grad]


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
    whole = gradients(lambda hidden, head: logprobs_and_entropy(head(hidden), targets, 0.7), tokens, dtype)
    parts = gradients(lambda hidden, head: chunked(hidden, head, targets, 0.7, chunk, calls), tokens, dtype)
    for part, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(part, expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("tokens", [0, 1, 4, 10])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_head_never_sees_more_than_a_chunk_of_rows(tokens: int, with_gradients: bool) -> None:
    head = Head()
    hidden, targets = inputs(tokens)
    with torch.set_grad_enabled(with_gradients):
        logp, entropy = chunked(hidden, head, targets, 1.0, chunk=4)
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
        chunked(hidden, head, targets, 1.0, chunk=3)
        assert all(tensor.shape[-1] != VOCABULARY for tensor in kept)
        logprobs_and_entropy(head(hidden), targets, 1.0)
        assert any(tensor.shape[-1] == VOCABULARY for tensor in kept)


def test_a_weight_shared_with_the_embedding_gets_its_whole_gradient_at_once() -> None:
    # Sharded optimisers reduce a gradient when its hook fires, and refuse a second one in the same backward pass.
    head = Head()
    ids = torch.arange(10)
    fired: list[Tensor] = []
    head.weight.register_post_accumulate_grad_hook(lambda weight: fired.append(weight.grad.clone()))
    logp, entropy = chunked(head.weight[ids], head, ids.flip(0), 1.0, chunk=3)
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
    logp, _ = chunked(hidden, head, targets, 1.0, chunk=3, calls=3)
    assert head.rows == expected
    head.rows.clear()
    logp.sum().backward()
    assert sorted(head.rows) == sorted(expected), "the backward pass gathers as often as the forward pass"


def test_a_single_chunk_is_not_computed_twice() -> None:
    head = Head()
    hidden, targets = inputs(4)
    chunked(hidden, head, targets, 1.0, chunk=4)[0].sum().backward()
    assert head.rows == [4]
