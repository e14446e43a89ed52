"""What the frozen policy says, in each form, against plain logits of a plain model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_ray.actors.reference import Form, Reference, to_numpy, to_torch
from rlhf_ray.records import Finish, Ragged, ReferenceColumns, Trajectories, no_columns

TEMPERATURE, BUDGET = 0.7, 20


@pytest.fixture(scope="module")
def answers() -> Trajectories:
    """Of unequal lengths, so that passes of few tokens take them in another order."""
    random = np.random.default_rng(0)
    responses = Ragged.of([random.integers(6, 40, length) for length in (3, 9, 1, 6)], np.uint16)
    tokens = len(responses.values)
    return Trajectories(
        prompts=Ragged.of([random.integers(6, 40, length) for length in (4, 2)], np.uint16),
        prompt_of=np.array([0, 0, 1, 1], np.int32),
        responses=responses,
        sampler_logprobs=np.zeros(tokens, np.float32),
        finish=np.full(4, Finish.EOS, np.uint8),
        sample_ids=np.arange(4, dtype=np.int64),
        weight_version=np.zeros(4, np.int32),
        top_ids=random.integers(0, 64, (tokens, 3)).astype(np.uint16),
    )


@pytest.fixture(scope="module")
def tables(policy: str, answers: Trajectories) -> torch.Tensor:
    """[N, V] log-probabilities, one plain pass an answer."""
    model = AutoModelForCausalLM.from_pretrained(Path(policy), dtype=torch.float32)
    found = []
    with torch.no_grad():
        for row in range(len(answers)):
            ids, length = torch.from_numpy(answers.sequence(row).astype(np.int64)), len(answers.prompt(row))
            found.append((model(ids[None]).logits[0, length - 1 : -1] / TEMPERATURE).log_softmax(-1))
    return torch.cat(found)


def says(policy: str, form: Form, answers: Trajectories) -> ReferenceColumns:
    return Reference(policy, TEMPERATURE, BUDGET, form, "cpu", False).score(answers)


@pytest.mark.parametrize("form", ["sampled", "top_k", "hidden"])
def test_every_form_has_the_sampled_tokens_log_probabilities(
    policy: str, answers: Trajectories, tables: torch.Tensor, form: Form
) -> None:
    sampled = torch.from_numpy(answers.responses.values.astype(np.int64))
    expected = tables.gather(1, sampled[:, None])[:, 0].numpy()
    columns = says(policy, form, answers)
    assert columns.logprobs.dtype == np.float32
    np.testing.assert_allclose(columns.logprobs, expected, atol=1e-5)
    widths = {"sampled": (0, 0), "top_k": (3, 0), "hidden": (0, 64)}[form]
    assert (columns.top_logprobs.shape[1], columns.hidden.shape[1]) == widths


def test_the_samplers_likeliest_tokens_get_the_references_log_probabilities(
    policy: str, answers: Trajectories, tables: torch.Tensor
) -> None:
    expected = tables.gather(1, torch.from_numpy(answers.top_ids.astype(np.int64))).numpy()
    np.testing.assert_allclose(says(policy, "top_k", answers).top_logprobs, expected, atol=1e-5)


def test_hidden_states_through_the_output_head_are_the_references_logits(
    policy: str, answers: Trajectories, tables: torch.Tensor
) -> None:
    head = AutoModelForCausalLM.from_pretrained(Path(policy), dtype=torch.float32).lm_head
    with torch.no_grad():
        again = (head(to_torch(says(policy, "hidden", answers).hidden)) / TEMPERATURE).log_softmax(-1)
    torch.testing.assert_close(again, tables, atol=1e-5, rtol=0)


def test_hidden_states_of_bf16_come_back_bit_for_bit() -> None:
    hidden = torch.randn(5, 8).bfloat16()
    assert to_numpy(hidden).dtype == np.uint16
    assert torch.equal(to_torch(to_numpy(hidden)), hidden)
    assert torch.equal(to_torch(to_numpy(hidden.float())), hidden.float())


def test_the_checksum_is_that_of_the_weights(policy: str, tied_policy: str) -> None:
    first, again, other = (
        Reference(place, TEMPERATURE, BUDGET, "sampled", "cpu", False) for place in (policy, policy, tied_policy)
    )
    assert first.checksum() == again.checksum() != other.checksum()
    with torch.no_grad():
        next(again.model.parameters())[0] += 1e-3
    assert first.checksum() != again.checksum()


def test_nothing_that_nobody_asks_for_takes_a_byte() -> None:
    assert no_columns(1000).nbytes == 0
