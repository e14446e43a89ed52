"""Losses of tokens against numbers worked by hand, and that no minibatch's weights depend on how it is shared out."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from batches import TWO, batch, config, made, policy

from rlhf_ray.actors.experience import Experience
from rlhf_ray.actors.objective import Rows, policy_tokens, reference_rows, token_weights
from rlhf_ray.algorithms.logprobs import TokenStatistics
from rlhf_ray.algorithms.vocabulary_kl import FullReference, TopKReference
from rlhf_ray.records import ReferenceColumns

EVERYTHING = np.arange(2)


def old(**columns: list[float]) -> Experience:
    """Of three tokens: old log-probabilities -1, advantages 1, -1, 2, weights 1, unless said otherwise."""
    usual = {
        "old_logprobs": [-1.0] * 3,
        "reference_logprobs": [-1.5] * 3,
        "advantages": [1.0, -1.0, 2.0],
        "weights": [1.0] * 3,
    }
    tensors = {name: torch.tensor(values) for name, values in (usual | columns).items()}
    return Experience(**tensors, values=None, returns=None, metrics={}, sequence_kl=torch.zeros(2))


def losses(says: TokenStatistics, before: Experience, beta: float = 0.5, **ppo: Any) -> list[float]:
    some = Rows(batch([0.0, 0.0], TWO, [-1.5] * 3), EVERYTHING)
    return policy_tokens(says, before, some, config(samples=2, **ppo), beta).total.tolist()


def test_the_surrogate_is_clipped_on_either_side_by_its_own_bound() -> None:
    # Ratios e^0.5 = 1.65, e^0.5 and e^-0.5 = 0.61; advantages 1, -1, 2; clip 0.2 below, 0.28 above.
    says = policy([-0.5, -0.5, -1.5])
    expected = [-1.28, math.exp(0.5), -2 * math.exp(-0.5)]
    assert losses(says, old(), algorithm="dapo") == pytest.approx(expected)


def test_the_engines_weight_multiplies_the_loss_and_a_masked_token_has_none_whatever_its_ratio() -> None:
    says = policy([-1.0, 800.0, -1.0])  # the second ratio is infinite, its advantage negative
    assert losses(says, old(weights=[0.5, 0.0, 2.0]), algorithm="dapo") == pytest.approx([-0.5, 0.0, -4.0])


def test_a_masked_token_has_no_gradient_either() -> None:
    logprobs = torch.tensor([-1.0, 800.0, -1.0], requires_grad=True)
    some = Rows(batch([0.0, 0.0], TWO, [-1.5] * 3), EVERYTHING)
    says = TokenStatistics(logprobs, torch.zeros(3))
    before = old(weights=[1.0, 0.0, 1.0])
    policy_tokens(says, before, some, config(samples=2, algorithm="grpo"), 0.0).total.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([-1.0, 0.0, -2.0])


def test_one_ratio_an_answer_is_the_geometric_mean_of_its_tokens() -> None:
    # First answer: log ratios 0.02 and 0.04, mean 0.03 at both tokens; second: 0.01 alone.
    says = policy([-0.98, -0.96, -0.99])
    clip = {"name": "gspo", "clip_ratio": 0.5}
    expected = [-math.exp(0.03), math.exp(0.03), -2 * math.exp(0.01)]
    assert losses(says, old(), algorithm=clip) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({"estimator": {"name": "k2", "placement": "loss"}}, [0.5 * 0.5**2 / 2] * 3),
        ({"estimator": {"name": "full", "placement": "loss"}}, [0.5 * 0.3, 0.5 * 0.2, 0.5 * 0.1]),
        ({"estimator": {"name": "full", "placement": "both"}}, [0.5 * 0.3, 0.5 * 0.2, 0.5 * 0.1]),
        ({"estimator": "k1"}, [0.0] * 3),
    ],
)
def test_the_kl_is_added_where_it_is_a_loss(form: dict[str, str], expected: list[float]) -> None:
    says = policy([-1.0] * 3, kl=[0.3, 0.2, 0.1])
    before = old(advantages=[0.0] * 3)
    assert losses(says, before, kl=form) == pytest.approx(expected)


def test_the_entropy_bonus_is_taken_off() -> None:
    assert losses(policy([-1.0] * 3, entropy=2.0), old(advantages=[0.0] * 3), entropy_bonus=0.1) == pytest.approx(
        [-0.2] * 3
    )


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [("ppo", [1 / 3, 1 / 3]), ("grpo", [1 / 4, 1 / 2]), ("dr_grpo", [1 / 16, 1 / 16])],
)
def test_a_token_weighs_by_its_minibatch_alone(algorithm: str, expected: list[float]) -> None:
    """Answers of two tokens and one, at most eight."""
    chosen, some = config(samples=2, algorithm=algorithm), batch([0.0, 0.0], TWO, [-1.5] * 3)
    assert token_weights(some, EVERYTHING, chosen).tolist() == pytest.approx(expected)
    alone = {"ppo": 1.0, "grpo": 1.0, "dr_grpo": 1 / 8}[algorithm]
    assert token_weights(some, np.array([1]), chosen).tolist() == pytest.approx([0.0, alone])


def test_a_vocabulary_kl_is_computed_from_the_rows_asked_for() -> None:
    some = batch([0.0, 0.0], TWO, [-1.5] * 3)
    columns = ReferenceColumns(
        some.reference.logprobs, np.arange(6, dtype=np.float32).reshape(3, 2), np.arange(12.0).reshape(3, 4)
    )
    some = replace(some, reference=columns)
    second = Rows(some, np.array([1]))
    device = torch.device("cpu")
    assert reference_rows(second, config(), None, device) is None
    top = reference_rows(second, config(kl={"estimator": {"name": "full", "top_k": 2}}), None, device)
    assert isinstance(top, TopKReference)
    assert (top.ids.tolist(), top.logprobs.tolist()) == ([[4, 5]], [[4.0, 5.0]])
    full = reference_rows(second, config(kl={"estimator": "full"}), lambda hidden: hidden, device)
    assert isinstance(full, FullReference)
    assert full.hidden.tolist() == [[8.0, 9.0, 10.0, 11.0]]


def test_an_update_on_what_the_policy_itself_sampled_starts_at_ratio_one() -> None:
    some = batch([1.0, 2.0], TWO, [-1.5, -2.0, -2.0])
    says = policy([-1.0, -2.0, -3.0])
    experience = made(some, says, correction="none")
    found = policy_tokens(says, experience, Rows(some, EVERYTHING), config(correction="none"), 0.1)
    assert found.surrogate.ratio.eq(1).all()
    assert found.total.tolist() == pytest.approx((-experience.advantages).tolist())
