import re
import subprocess
import sys

import numpy as np
import pytest
import ray
from real_engines import EOS, chunks, generate, learner_model, logprob_tables, oracle, oracle_of, prompts_of

from rlhf_ray.actors.rollout import _stream, environment
from rlhf_ray.records import Finish, Ragged

UNTIED, TIED = 0, 1


def by_sample(answers):
    return {int(answers.sample_ids[row]): answers.responses[row].tolist() for row in range(len(answers))}


def test_environment_is_known_without_importing_torch_vllm_or_ray():
    code = (
        "import sys; from rlhf_ray.actors.rollout import environment; environment('cpu', '/c'); "
        "print(sorted({'torch', 'vllm', 'ray', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_gpu_engines_keep_the_compiler_and_their_threads():
    assert "TORCH_COMPILE_DISABLE" not in environment("gpu", "/c")
    assert environment("cpu", "/c")["TORCH_COMPILE_DISABLE"] == "1"


def test_seeds_of_different_updates_start_far_apart_even_in_the_32_bits_that_torch_heeds():
    starts = sorted(_stream(seed) % 2**32 for seed in range(200))
    assert np.diff(starts).min() > 4096


@pytest.mark.real
@pytest.mark.parametrize(("index", "folder", "temperature"), [(UNTIED, "untied", 0.7), (TIED, "tied", 1.0)])
def test_sampler_log_probabilities_are_the_model_s_at_the_sampling_temperature(
    engines, rollout_models, index, folder, temperature
):
    answers = generate(engines[index], prompts_of(6, 20), np.arange(6) * 3)
    expected = oracle_of(learner_model(rollout_models[folder]), answers, temperature)
    assert answers.sampler_logprobs.dtype == np.float32
    np.testing.assert_allclose(answers.sampler_logprobs, expected, atol=1e-4)


@pytest.mark.real
def test_the_likeliest_tokens_of_each_place_are_noted_by_the_model_s_own_order(engines, rollout_models):
    answers = generate(engines[UNTIED], prompts_of(6, 20), np.arange(6) * 3)
    assert answers.top_ids.shape == (answers.tokens, 4) and answers.top_ids.dtype == np.uint16
    tables = logprob_tables(learner_model(rollout_models["untied"]), answers)
    for place, table in enumerate(tables):
        # By their probabilities: two that are all but equal may come in either order.
        noted, likeliest = np.sort(table[answers.top_ids[place]]), np.sort(table)[-4:]
        np.testing.assert_allclose(noted, likeliest, atol=1e-4)
        assert len(set(answers.top_ids[place].tolist())) == 4
    assert generate(engines[TIED], prompts_of(1, 5), [0]).top_ids.shape[1] == 0


@pytest.mark.real
def test_ids_of_a_small_vocabulary_travel_in_two_bytes(engines):
    answers = generate(engines[TIED], prompts_of(2, 5), [0, 3])
    assert answers.responses.values.dtype == answers.prompts.values.dtype == np.uint16


@pytest.mark.real
@pytest.mark.parametrize(("index", "folder", "temperature"), [(UNTIED, "untied", 0.7), (TIED, "tied", 1.0)])
def test_scored_log_probabilities_are_the_model_s_at_the_sampling_temperature(
    engines, rollout_models, index, folder, temperature
):
    lengths = [
        (384, 100),
        (40, 39),
        (2, 1),
        (200, 130),
        (10, 10),
    ]  # full length; one token; no context; long; no answer
    sequences = Ragged.of([prompts_of(1, length, length)[0] for length, _ in lengths], np.int32)
    prompt_lengths = np.array([prompt for _, prompt in lengths], dtype=np.int32)
    model = learner_model(rollout_models[folder])
    expected = oracle(model, [sequences[row] for row in range(len(lengths))], prompt_lengths.tolist(), temperature)
    for _ in range(2):  # the second time around with a full prefix cache
        found = ray.get(engines[index].logprobs.remote(sequences, prompt_lengths))
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.real
def test_scoring_leaves_the_sampler_as_it_was(engines, rollout_models):
    prompts = prompts_of(2, 20)
    ray.get(engines[UNTIED].logprobs.remote(prompts, np.array([5, 5], dtype=np.int32)))
    answers = generate(engines[UNTIED], prompts, [0, 3])
    expected = oracle_of(learner_model(rollout_models["untied"]), answers, 0.7)
    np.testing.assert_allclose(answers.sampler_logprobs, expected, atol=1e-4)


@pytest.mark.real
def test_another_temperature_than_the_sampler_s_can_be_asked_for(engines, rollout_models):
    sequences, lengths = prompts_of(3, 30), np.array([10, 29, 1], np.int32)
    found = ray.get(engines[UNTIED].logprobs.remote(sequences, lengths, 1.0))
    model = learner_model(rollout_models["untied"])
    expected = oracle(model, [sequences[row] for row in range(3)], lengths.tolist(), 1.0)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.real
@pytest.mark.parametrize(
    "options",
    [[[17], [90]], [[17, 30, 9], [17, 31, 9]], [[40], [8, 9, 10, 11], [40, 12]]],
    ids=["one token", "several tokens", "of different lengths"],
)
@pytest.mark.parametrize(("index", "folder"), [(UNTIED, "untied"), (TIED, "tied")])
def test_options_have_the_summed_log_probabilities_of_a_plain_forward_pass_at_temperature_1(
    engines, rollout_models, index, folder, options
):
    contexts = [prompts_of(1, length, length)[0] for length in (40, 1, 200, 7)]
    model = learner_model(rollout_models[folder])
    expected = [
        [oracle(model, [np.concatenate([context, option])], [len(context)], 1.0).sum() for option in options]
        for context in contexts
    ]
    for _ in range(2):  # the second time around with a full prefix cache
        found = ray.get(engines[index].option_logprobs.remote(Ragged.of(contexts, np.int32), Ragged.of(options, int)))
        assert found.dtype == np.float32 and found.shape == (4, len(options))
        np.testing.assert_allclose(found, expected, atol=3e-4)


@pytest.mark.real
def test_options_are_scored_up_to_the_longest_sequence_and_leave_the_sampler_as_it_was(engines, rollout_models):
    model = learner_model(rollout_models["untied"])
    context = prompts_of(1, 383)[0]
    for options in ([[9], [10]], [[9, 9], [9, 10]]):
        contexts = Ragged.of([context[: 384 - len(options[0])]], np.int32)
        found = ray.get(engines[UNTIED].option_logprobs.remote(contexts, Ragged.of(options, int)))
        rows = [np.concatenate([contexts[0], option]) for option in options]
        expected = [oracle(model, [row], [len(contexts[0])], 1.0).sum() for row in rows]
        np.testing.assert_allclose(found[0], expected, atol=3e-4)
    answers = generate(engines[UNTIED], prompts_of(2, 20), [0, 3])
    np.testing.assert_allclose(answers.sampler_logprobs, oracle_of(model, answers, 0.7), atol=1e-4)


@pytest.mark.real
def test_a_context_that_cannot_be_scored_is_an_error_and_harms_no_later_one(engines):
    options = Ragged.of([[9], [10]], np.int32)
    with pytest.raises(Exception, match="vLLM refused a prompt of 400 tokens"):
        ray.get(engines[UNTIED].option_logprobs.remote(Ragged.of([[9, 9], np.full(400, 9)], np.int32), options))
    assert np.isfinite(ray.get(engines[UNTIED].option_logprobs.remote(prompts_of(2, 5), options))).all()


@pytest.mark.real
def test_each_prompt_has_its_own_samples_and_ids(engines):
    prompts = prompts_of(5, 12)
    answers = generate(engines[UNTIED], prompts, [100, 103, 106, 109, 112])
    assert sorted(answers.sample_ids) == list(range(100, 115))
    assert (answers.weight_version == 0).all()
    for row in range(len(answers)):
        asked = (answers.sample_ids[row] - 100) // 3
        np.testing.assert_array_equal(answers.prompt(row), prompts[asked])


@pytest.mark.real
def test_equal_prompts_with_one_seed_are_answered_differently(engines):
    same = Ragged.of([prompts_of(1, 12)[0]] * 8, np.int32)
    answers = by_sample(generate(engines[UNTIED], same, np.arange(8) * 3))
    assert len({tuple(answer) for answer in answers.values()}) == 24


@pytest.mark.real
def test_another_seed_gives_other_answers(engines):
    prompts = prompts_of(1, 12)
    first, second = (by_sample(generate(engines[UNTIED], prompts, [0], seed)) for seed in (1, 2))
    assert all(first[sample] != second[sample] for sample in first)


@pytest.mark.real
def test_seed_and_sample_id_alone_decide_an_answer_whatever_else_is_in_the_batch_or_the_engine(engines):
    prompts = prompts_of(6, 15)
    together = by_sample(generate(engines[1], prompts, np.arange(6) * 3, seed=9))
    alone = by_sample(generate(engines[2], Ragged.of([prompts[4]], np.int32), [12], seed=9))
    assert alone == {sample: together[sample] for sample in (12, 13, 14)}


@pytest.mark.real
def test_an_end_of_sequence_token_is_part_of_the_answer_and_only_there(engines):
    answers = generate(engines[UNTIED], prompts_of(60, 12), np.arange(60) * 3)
    ended = [answers.responses[row] for row in range(len(answers)) if answers.finish[row] == Finish.EOS]
    cut = [answers.responses[row] for row in range(len(answers)) if answers.finish[row] == Finish.LENGTH]
    assert ended and cut and len(ended) + len(cut) == 180
    assert all(answer[-1] == EOS and EOS not in answer[:-1] for answer in ended)
    assert all(len(answer) == 24 and EOS not in answer for answer in cut)


@pytest.mark.real
def test_chunks_come_as_answers_finish_and_lose_nothing(engines):
    prompts = prompts_of(600, 12)  # more than the engine runs at once
    parts = chunks(engines[UNTIED], prompts, np.arange(600) * 3, chunk_tokens=2000)
    assert len(parts) > 5
    assert all(part.tokens >= 2000 for part in parts[:-1])
    assert sorted(np.concatenate([part.sample_ids for part in parts])) == list(range(1800))
    assert all(len(part) == 3 * len(part.prompts) for part in parts)


@pytest.mark.real
def test_the_first_chunk_is_there_before_the_last_answer_is_begun(engines):
    prompts = prompts_of(600, 12)
    stream = engines[UNTIED].generate.remote(prompts, np.arange(600, dtype=np.int64) * 3, 0, 500)
    first = next(stream)
    ray.get(first, timeout=60)
    assert not ray.wait([stream.completed()], timeout=0)[0]
    list(stream)


@pytest.mark.real
def test_more_prompt_tokens_than_one_step_takes_do_not_crash_seeded_sampling(engines):
    """4096 tokens are prefilled in a step; the CPU sampler crashes on a seeded prompt prefilled in part."""
    prompts = prompts_of(40, 350)
    together = by_sample(generate(engines[UNTIED], prompts, np.arange(40) * 3))
    alone = by_sample(generate(engines[UNTIED], Ragged.of([prompts[37]], np.int32), [111]))
    assert len(together) == 120
    assert alone == {sample: together[sample] for sample in (111, 112, 113)}


@pytest.mark.real
@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (np.full(361, 9), "prompt of sample 30 has 361 tokens, expected 1 to 360"),
        (np.array([]), "prompt of sample 30 has 0 tokens"),
        (np.array([9, 128]), "prompt of sample 30 has token id 128, but the vocabulary has 128 tokens"),
    ],
)
def test_a_prompt_that_cannot_be_served_is_named_and_harms_no_later_one(engines, prompt, message):
    prompts = Ragged.of([np.array([9, 9]), prompt], np.int32)
    with pytest.raises(Exception, match=re.escape(message)):
        generate(engines[UNTIED], prompts, [0, 30])
    assert len(generate(engines[UNTIED], prompts_of(1, 4), [0])) == 3


@pytest.mark.real
def test_an_engine_says_how_it_stands(engines):
    state = ray.get(engines[UNTIED].ready.remote())
    assert state["weight_version"] == 0
    assert state["kv_tokens"] >= 384
    assert state["pid"] > 0 and state["start_s"] > 0
