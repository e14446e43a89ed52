"""Packed sequences against Hugging Face's plain forward pass with torch's own attention, one sequence at a time."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

from rlhf_ray.models import load
from rlhf_ray.models.heads import HEAD_CHUNK, Scores, TokenLogprobs, Values, checksum
from rlhf_ray.models.packed import Packed, _attention

CPU = torch.device("cpu")
LENGTHS = [5, 17, 2, 30]


def sequences(seed: int = 0) -> list[np.ndarray]:
    numbers = np.random.default_rng(seed)
    return [numbers.integers(6, 42, length, dtype=np.int32) for length in LENGTHS]


def alone(model: torch.nn.Module, sequence: np.ndarray) -> torch.Tensor:
    """[T, V] logits."""
    with torch.no_grad():
        return model(torch.from_numpy(sequence.astype(np.int64))[None]).logits[0].double()


@pytest.mark.parametrize("which", ["policy", "tied_policy"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_logprobs_and_entropies_are_those_of_each_sequence_alone(
    which: str, temperature: float, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(which)
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    prompts = [1, 6, 1, 29]
    with torch.no_grad():
        packed = Packed.of(sequences(), prompts, CPU)
        logprobs, entropies, _ = TokenLogprobs(load.causal_lm(folder, "cpu"), temperature)(packed)
    expected, expected_entropies = [], []
    for sequence, prompt in zip(sequences(), prompts, strict=True):
        table = (alone(plain, sequence) / temperature).log_softmax(-1)[prompt - 1 : -1]
        expected.append(table.gather(1, torch.from_numpy(sequence[prompt:].astype(np.int64))[:, None])[:, 0])
        expected_entropies.append(-(table.exp() * table).sum(-1))
    torch.testing.assert_close(logprobs.double(), torch.cat(expected), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropies.double(), torch.cat(expected_entropies), atol=1e-5, rtol=1e-5)


def test_gradients_of_a_packed_pass_are_the_sum_of_those_of_each_sequence_alone(policy: str) -> None:
    packed_model = TokenLogprobs(load.causal_lm(policy, "cpu"), 1.0)
    packed_model(Packed.of(sequences(), [1] * 4, CPU))[0].sum().backward()
    plain = AutoModelForCausalLM.from_pretrained(policy, attn_implementation="sdpa")
    for sequence in sequences():
        ids = torch.from_numpy(sequence.astype(np.int64))
        plain(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None]).sum().backward()
    of_plain = dict(plain.named_parameters())
    for name, parameter in packed_model.model.named_parameters():
        torch.testing.assert_close(parameter.grad, of_plain[name].grad, atol=2e-4, rtol=1e-4, msg=name)


def test_no_sequence_sees_another(policy: str) -> None:
    model = TokenLogprobs(load.causal_lm(policy, "cpu"), 1.0)
    rows = sequences()
    with torch.no_grad():
        before = model(Packed.of(rows, [1] * 4, CPU)).logprobs
        rows[1] = rows[1][::-1].copy()
        after = model(Packed.of(rows, [1] * 4, CPU)).logprobs
    changed = slice(LENGTHS[0] - 1, LENGTHS[0] - 1 + LENGTHS[1] - 1)
    assert not torch.equal(before[changed], after[changed])
    before[changed] = after[changed]
    assert torch.equal(before, after)


def test_logits_are_made_in_chunks_and_change_nothing(policy: str) -> None:
    model = TokenLogprobs(load.causal_lm(policy, "cpu"), 1.0)
    one = np.resize(sequences()[3], 200)
    rows = [one] * (HEAD_CHUNK // 199 + 2)
    with torch.no_grad():
        many = model(Packed.of(rows, [1] * len(rows), CPU)).logprobs
        single = model(Packed.of([one], [1], CPU)).logprobs
    assert len(many) > HEAD_CHUNK
    torch.testing.assert_close(many, single.repeat(len(rows)), atol=1e-5, rtol=1e-5)


def test_masks_name_the_answers_of_several_turns() -> None:
    ids = np.array([10, 11, 12, 13, 14], np.int32)
    mask = np.array([True, False, True, False, True])
    packed = Packed.masked([ids, ids], [mask, ~mask], CPU)
    # Token 0 of the first is masked as an answer, but nothing predicts it; the last of the second is not learnt.
    assert packed.predictors.tolist() == [1, 3, 5 + 0, 5 + 2]
    assert packed.targets.tolist() == [12, 14, 11, 13]


def test_prompt_lengths_are_masks_of_one_answer() -> None:
    rows = sequences()
    masks = [np.arange(len(row)) >= 2 for row in rows]
    by_length, by_mask = Packed.of(rows, [2] * 4, CPU), Packed.masked(rows, masks, CPU)
    assert torch.equal(by_length.predictors, by_mask.predictors)
    assert by_length.offsets == by_mask.offsets == [0, 5, 22, 24, 54]


def test_score_is_read_at_the_last_token_of_each_sequence(reward_model: str) -> None:
    plain = AutoModelForSequenceClassification.from_pretrained(reward_model, attn_implementation="sdpa")
    with torch.no_grad():
        scores = Scores(load.classifier(reward_model, "cpu"))(Packed.of(sequences(), LENGTHS, CPU))
    expected = torch.cat([alone(plain, sequence) for sequence in sequences()])
    torch.testing.assert_close(scores.double(), expected, atol=1e-5, rtol=1e-5)


def test_padding_in_transformers_own_batches_gives_the_same_scores(reward_model: str) -> None:
    plain = AutoModelForSequenceClassification.from_pretrained(reward_model, attn_implementation="sdpa")
    padded = torch.zeros(4, max(LENGTHS), dtype=torch.long)
    for row, sequence in zip(padded, sequences(), strict=True):
        row[: len(sequence)] = torch.from_numpy(sequence)
    with torch.no_grad():
        expected = plain(padded, attention_mask=(padded != 0).long()).logits[:, 0]
        scores = Scores(load.classifier(reward_model, "cpu"))(Packed.of(sequences(), LENGTHS, CPU))
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)


def test_values_of_a_new_critic_are_exactly_zero_and_its_head_learns(policy: str) -> None:
    critic = Values(load.causal_lm(policy, "cpu").base_model)
    values = critic(Packed.of(sequences(), [1] * 4, CPU))
    assert torch.equal(values, torch.zeros(sum(LENGTHS) - 4))
    values.sum().backward()
    assert critic.head.weight.grad is not None and critic.head.weight.grad.abs().sum() > 0


def test_sequences_longer_than_a_sliding_window_are_refused() -> None:
    q = torch.zeros(1, 2, 30, 16)
    with pytest.raises(NotImplementedError, match="exceed this model's sliding window 20"):
        _attention(torch.nn.Module(), q, q, q, None, packed_offsets=[0, 30], sliding_window=20)
    _attention(torch.nn.Module(), q, q, q, None, packed_offsets=[0, 15, 30], sliding_window=20)


def test_dropout_of_a_model_is_switched_off_when_it_is_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=64, embd_pdrop=0.5, resid_pdrop=0.5)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = TokenLogprobs(load.causal_lm(str(tmp_path), "cpu").train(), 1.0)
    packed = Packed.of(sequences(), [1] * 4, CPU)
    with torch.no_grad():
        assert torch.equal(model(packed)[0], model(packed)[0])


def test_checksum_is_of_names_and_bytes(policy: str, tied_policy: str) -> None:
    model = load.causal_lm(policy, "cpu")
    before = checksum(model)
    assert before == checksum(load.causal_lm(policy, "cpu"))
    assert before != checksum(load.causal_lm(tied_policy, "cpu"))
    with torch.no_grad():
        model.lm_head.weight[-1, -1] += 1e-6
    assert checksum(model) != before
