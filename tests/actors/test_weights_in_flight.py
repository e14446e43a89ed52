"""Weights change in the middle of answers: which token is of which weights, and that nothing is lost by it."""

import copy

import numpy as np
import pytest
import ray
from real_engines import generate, oracle, oracle_of, prompts_of
from test_weight_transfer import Publisher

from rlhf_ray.errors import GenerationError
from rlhf_ray.records import Arrived, Trajectories

PROMPTS = 240


class Learner(Publisher):
    """Remembers the weights of the version before."""

    def publish(self, sender):
        self.before = copy.deepcopy(self.model)
        super().publish(sender)


@pytest.fixture
def learner(engines, rollout_models):
    found = Learner("shm", engines[:1], rollout_models["untied"], 0.7)
    found.publish(found.sender())
    return found


def streamed(engine, prompts, chunk_tokens=200, first=0):
    ids = (first + np.arange(len(prompts), dtype=np.int64)) * 3
    return engine.stream.remote(prompts, ids, 0, chunk_tokens)


def rest_of(stream):
    found = [ray.get(ref, timeout=60) for ref in stream]
    return found[::2], found[1::2]


@pytest.fixture
def mixed(learner):
    """Everything that comes of a stream in whose middle weights are published."""
    sender = learner.sender()
    stream = streamed(learner.handles[0], prompts_of(PROMPTS, 20))
    first = [ray.get(next(stream), timeout=60) for _ in range(2)]
    learner.publish(sender)
    notes, chunks = rest_of(stream)
    return learner, [first[0], *notes], Trajectories.concatenate([first[1], *chunks])


@pytest.mark.real
def test_answers_under_way_go_on_with_new_weights_from_the_token_they_have_and_none_is_lost(mixed):
    learner, _, answers = mixed
    assert sorted(answers.sample_ids) == list(range(3 * PROMPTS))
    old, new = (oracle_of(model, answers, 0.7) for model in (learner.before, learner.model))
    of_old = np.abs(answers.sampler_logprobs - old) < 1e-4
    of_new = np.abs(answers.sampler_logprobs - new) < 1e-4
    assert (of_old | of_new).all()
    assert not (of_old & of_new).all()
    both = 0
    starts = answers.responses.offsets
    for row in range(len(answers)):
        mine = slice(starts[row], starts[row + 1])
        switch = int(np.argmin(of_old[mine])) if not of_old[mine].all() else len(of_old[mine])
        assert of_new[mine][switch:].all(), "a token of the old weights after one of the new"
        both += 0 < switch < len(of_old[mine])
    assert both > 5


@pytest.mark.real
def test_the_engine_says_of_each_prompt_which_weights_its_oldest_and_newest_token_have(mixed):
    learner, notes, answers = mixed
    version = Publisher.version
    old, new = (oracle_of(model, answers, 0.7) for model in (learner.before, learner.model))
    is_old = np.abs(answers.sampler_logprobs - old) < np.abs(answers.sampler_logprobs - new)
    by_group: dict[int, list[np.ndarray]] = {}
    for row in range(len(answers)):
        start, stop = answers.responses.offsets[row : row + 2]
        by_group.setdefault(int(answers.sample_ids[row]) // 3, []).append(is_old[start:stop])
    said = {}
    for note in notes:
        assert isinstance(note, Arrived)
        columns = zip(note.groups, note.oldest, note.newest, note.tokens, strict=True)
        said |= {int(group): (int(oldest), int(newest), int(tokens)) for group, oldest, newest, tokens in columns}
    found = {
        group: (
            version - any(part.any() for part in parts),
            version - all(part.all() for part in parts),
            sum(map(len, parts)),
        )
        for group, parts in by_group.items()
    }
    assert said == found
    assert len({versions[:2] for versions in said.values()}) == 3  # old alone, new alone, and both
    oldest = {int(answers.sample_ids[row]): int(answers.weight_version[row]) for row in range(len(answers))}
    assert min(oldest.values()) == version - 1 and max(oldest.values()) == version


@pytest.mark.real
def test_two_calls_share_an_engine_and_each_gets_its_own_answers_word_for_word(learner):
    engine = learner.handles[0]
    one, other = prompts_of(30, 20, seed=1), prompts_of(30, 20, seed=2)
    alone = [generate(engine, prompts, np.arange(30) * 3 + 90 * place) for place, prompts in enumerate((one, other))]
    streams = [streamed(engine, one), streamed(engine, other, first=30)]
    together = [Trajectories.concatenate(rest_of(stream)[1]) for stream in streams]
    for expected, found in zip(alone, together, strict=True):
        answers = [
            {int(some.sample_ids[row]): some.responses[row].tolist() for row in range(len(some))}
            for some in (expected, found)
        ]
        assert answers[0] == answers[1] and len(answers[0]) == 90


@pytest.mark.real
def test_what_is_aborted_ends_its_stream_with_what_there_is(learner):
    engine = learner.handles[0]
    stream = streamed(engine, prompts_of(PROMPTS, 20))
    first = ray.get(next(stream), timeout=60)
    ray.get(engine.abort.remote(), timeout=60)
    chunks, notes = rest_of(stream)
    groups = [int(group) for note in [first, *notes] for group in note.groups]
    assert 0 < len(groups) < PROMPTS and len(groups) == len(set(groups))
    assert sum(map(len, chunks)) == 3 * len(groups)
    answers = generate(engine, prompts_of(2, 20), [0, 3])
    np.testing.assert_allclose(answers.sampler_logprobs, oracle_of(learner.model, answers, 0.7), atol=1e-4)


@pytest.mark.real
def test_a_canary_beside_answers_under_way_changes_none_and_other_scoring_is_refused(learner):
    engine = learner.handles[0]
    sequences = prompts_of(3, 50, seed=4)
    prompts = prompts_of(60, 20)
    expected = generate(engine, prompts, np.arange(60) * 3)
    stream = streamed(engine, prompts)
    first = ray.get(next(stream), timeout=60)
    found = ray.get(engine.context_logprobs.remote(sequences), timeout=60)
    with pytest.raises(GenerationError, match="would change what is being generated"):
        ray.get(engine.logprobs.remote(sequences, np.array([5, 5, 5], np.int32)), timeout=60)
    chunks, notes = rest_of(stream)
    assert len(first.groups) + sum(len(note.groups) for note in notes) == 60
    beside = Trajectories.concatenate(chunks)
    for some in (expected, beside):
        np.testing.assert_allclose(some.sampler_logprobs, oracle_of(learner.model, some, 0.7), atol=1e-4)
    answers = [
        {int(some.sample_ids[row]): some.responses[row].tolist() for row in range(len(some))}
        for some in (expected, beside)
    ]
    assert answers[0] == answers[1]
    of_model = oracle(learner.model, [sequences[row] for row in range(3)], [1, 1, 1], 1.0)
    np.testing.assert_allclose(found, of_model, atol=1e-4)
