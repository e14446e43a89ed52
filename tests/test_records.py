import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.records import Ragged, ReferenceColumns, Trajectories, id_type, nbytes, token_places

rows = st.lists(st.lists(st.integers(0, 99), max_size=5), max_size=6)


def trajectories(prompts: list[list[int]], answers: list[tuple[int, list[int]]], first_id: int = 0) -> Trajectories:
    responses = Ragged.of([answer for _, answer in answers], np.int32)
    return Trajectories(
        prompts=Ragged.of(prompts, np.int32),
        prompt_of=np.array([prompt for prompt, _ in answers], np.int32),
        responses=responses,
        sampler_logprobs=-0.5 * responses.values.astype(np.float32),
        finish=np.zeros(len(answers), np.uint8),
        sample_ids=np.arange(first_id, first_id + len(answers), dtype=np.int64),
        weight_version=np.zeros(len(answers), np.int32),
        top_ids=responses.values[:, None] + np.arange(2, dtype=np.int32),
    )


@given(rows)
def test_ragged_rows_come_back_as_they_went_in(content: list[list[int]]) -> None:
    ragged = Ragged.of(content, np.int32)
    assert [ragged[row].tolist() for row in range(len(ragged))] == content
    assert ragged.lengths.tolist() == [len(row) for row in content]


@given(rows)
def test_a_ragged_array_comes_through_a_pickle_as_it_was(content: list[list[int]]) -> None:
    ragged = Ragged.of([*content, [1] * 300], np.uint16)
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(ragged, protocol=5, buffer_callback=buffers.append)
    again = pickle.loads(head, buffers=buffers)
    assert np.array_equal(again.values, ragged.values) and again.values.dtype == np.uint16
    assert np.array_equal(again.offsets, ragged.offsets) and again.offsets.dtype == np.int32
    # The values, and two bytes for each length, as one of them needs two.
    assert sum(buffer.raw().nbytes for buffer in buffers) == 2 * len(ragged.values) + 2 * len(ragged)


def test_a_sequence_is_the_prompt_and_then_the_answer() -> None:
    chunk = trajectories([[1, 2], [3]], [(1, [7, 8]), (0, [9])])
    assert chunk.sequence(0).tolist() == [3, 7, 8]
    assert chunk.sequence(1).tolist() == [1, 2, 9]
    assert chunk.prompt_lengths.tolist() == [1, 2]
    assert chunk.tokens == 3


def test_joined_chunks_keep_each_answer_with_its_own_prompt() -> None:
    first = trajectories([[1, 2], [3]], [(1, [7, 8]), (0, [9])])
    second = trajectories([[4, 5]], [(0, [6]), (0, [])], first_id=2)
    joined = Trajectories.concatenate([first, second])
    assert [joined.sequence(row).tolist() for row in range(4)] == [[3, 7, 8], [1, 2, 9], [4, 5, 6], [4, 5]]
    assert joined.sample_ids.tolist() == [0, 1, 2, 3]


def test_taken_rows_carry_their_own_columns() -> None:
    chunk = trajectories([[1], [2]], [(0, [10, 11]), (1, [20]), (0, [30, 31, 32])])
    taken = chunk.take(np.array([2, 0]))
    assert [taken.sequence(row).tolist() for row in range(2)] == [[1, 30, 31, 32], [1, 10, 11]]
    assert taken.sampler_logprobs.tolist() == [-15.0, -15.5, -16.0, -5.0, -5.5]
    assert taken.sample_ids.tolist() == [2, 0]
    assert taken.top_ids.tolist() == [[30, 31], [31, 32], [32, 33], [10, 11], [11, 12]]


@pytest.mark.parametrize(("vocabulary", "bytes_an_id"), [(768, 2), (65_536, 2), (65_537, 4), (152_064, 4)])
def test_ids_take_no_more_bytes_than_the_vocabulary_needs(vocabulary: int, bytes_an_id: int) -> None:
    kind = id_type(vocabulary)
    assert np.dtype(kind).itemsize == bytes_an_id
    assert np.array([vocabulary - 1]).astype(kind)[0] == vocabulary - 1


def test_what_the_reference_says_is_joined_and_taken_in_all_its_columns() -> None:
    first = ReferenceColumns(np.array([-1.0, -2.0], np.float32), np.ones((2, 3), np.float32), np.zeros((2, 4)))
    second = ReferenceColumns(np.array([-3.0], np.float32), 2 * np.ones((1, 3), np.float32), np.ones((1, 4)))
    taken = ReferenceColumns.concatenate([first, second]).take(np.array([2, 0]))
    assert taken.logprobs.tolist() == [-3.0, -1.0]
    assert taken.top_logprobs.tolist() == [[2.0] * 3, [1.0] * 3]
    assert taken.hidden.tolist() == [[1.0] * 4, [0.0] * 4]


@given(rows, st.randoms())
def test_token_places_pick_whole_rows(content: list[list[int]], random) -> None:
    ragged = Ragged.of(content, np.int32)
    order = list(range(len(content)))
    random.shuffle(order)
    picked = ragged.values[token_places(ragged.offsets, np.array(order, dtype=int))].tolist()
    assert picked == [token for row in order for token in content[row]]


def test_a_prompt_of_many_samples_is_counted_once() -> None:
    one = trajectories([[1] * 100], [(0, [5])])
    four = trajectories([[1] * 100], [(0, [5])] * 4)
    # three more answers: id and log-probability (8), prompt index, offset, version (12), finish (1), sample id (8),
    # two likeliest ids (8)
    assert nbytes(four) - nbytes(one) == 3 * (8 + 12 + 1 + 8 + 8)
