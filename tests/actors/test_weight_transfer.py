import math
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from real_engines import generate, learner_model, oracle, oracle_of, prompts_of

from rlhf_ray.actors.weight_transfer import Engines, call_all, choose_backend, groups, make_sender, senders
from rlhf_ray.actors.weight_transfer.buckets import ALIGNMENT, Parameter, checksum, exhaust, pack
from rlhf_ray.errors import DeadlineError, ModelError, PublicationError, ResourceError
from rlhf_ray.records import Ragged

SMALL = 10_000
"""Bytes of a bucket so small that the projections of one attention layer come in different buckets."""


def shuffled(model, seed):
    """The learner after an update that changed every weight."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
    return model


def metadata_of(model, dtype=torch.float32):
    return [(name, dtype, tuple(parameter.shape)) for name, parameter in model.named_parameters()]


class Publisher:
    """A learner: its model, the engines that should follow it, and versions that go up."""

    version = 0

    def __init__(self, backend, handles, folder, temperature):
        self.backend, self.handles, self.folder, self.temperature = backend, handles, folder, temperature
        self.model = learner_model(folder)

    def sender(self, call=call_all, metadata=None):
        announced = metadata or metadata_of(self.model)
        return make_sender(self.backend, self.handles, announced, 30, bucket_bytes=SMALL, call=call)

    def publish(self, sender):
        Publisher.version += 1
        shuffled(self.model, Publisher.version)
        sender.send(self.model.named_parameters(), Publisher.version)

    def assert_followed(self, prompt_tokens=20):
        for handle in self.handles:
            answers = generate(handle, prompts_of(2, prompt_tokens), [0, 3])
            assert (answers.weight_version == Publisher.version).all()
            np.testing.assert_allclose(
                answers.sampler_logprobs, oracle_of(self.model, answers, self.temperature), atol=1e-4
            )


@pytest.fixture
def untied(engines, rollout_models):
    return Publisher("shm", engines[:1], rollout_models["untied"], 0.7)


@pytest.fixture
def tied_twice(engines, rollout_models):
    return Publisher("gloo", engines[1:], rollout_models["tied"], 1.0)


@pytest.fixture(params=["untied", "tied_twice"])
def publisher(request):
    return request.getfixturevalue(request.param)


def test_the_learner_s_side_does_not_import_vllm():
    code = "import sys, rlhf_ray.actors.weight_transfer; print('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize(
    ("device", "same_node", "shared_gpu", "backend"),
    [
        ("cpu", True, False, "shm"),
        ("cpu", False, False, "gloo"),
        ("gpu", True, True, "ipc"),
        ("gpu", True, False, "nccl"),
        ("gpu", False, False, "nccl"),
    ],
)
def test_auto_chooses_by_device_and_place(device, same_node, shared_gpu, backend):
    assert choose_backend(device, same_node, shared_gpu) == backend


def test_parameters_are_packed_in_order_at_aligned_places():
    a = Parameter("a", torch.bfloat16, (3,))  # 6 bytes, takes 64
    b = Parameter("b", torch.float32, (20,))  # 80 bytes, takes 128
    c = Parameter("c", torch.float32, (1,))
    buckets = pack([a, b, c], 200)
    assert [(bucket.parameters, bucket.offsets, bucket.nbytes) for bucket in buckets] == [
        ((a, b), (0, 64), 192),
        ((c,), (0,), 64),
    ]
    assert str(buckets[0]) == "bucket 1 (a to b, 192 bytes)"


dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
shapes = st.lists(st.integers(1, 9), max_size=3).map(tuple)


@given(st.lists(st.tuples(dtypes, shapes), min_size=1, max_size=12), st.integers(1, 2000))
def test_what_is_filled_in_on_one_side_is_read_on_the_other(kinds, bucket_bytes):
    weights = [(f"w{place}", torch.randn(shape).to(dtype)) for place, (dtype, shape) in enumerate(kinds)]
    parameters = [Parameter(name, weight.dtype, tuple(weight.shape)) for name, weight in weights]
    arrived = [Parameter.from_wire(*parameter.to_wire()) for parameter in parameters]
    assert arrived == parameters
    stream, read = iter(weights), []
    for bucket in pack(arrived, bucket_bytes):
        assert bucket.nbytes % ALIGNMENT == 0
        assert bucket.nbytes <= bucket_bytes or len(bucket.parameters) == 1
        buffer = torch.empty(bucket.nbytes, dtype=torch.uint8)
        bucket.fill(buffer, stream)
        read += list(bucket.views(buffer))
    exhaust(stream)
    assert [name for name, _ in read] == [name for name, _ in weights]
    assert all(torch.equal(got, sent) for (_, got), (_, sent) in zip(read, weights, strict=True))


def test_one_flipped_bit_changes_the_checksum():
    buffer = torch.zeros(1 << 16, dtype=torch.uint8)
    before = checksum(buffer)
    buffer[12345] ^= 1
    assert checksum(buffer) != before


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([("b", torch.zeros(2)), ("a", torch.zeros(2))], r"announced 'a' \(2,\).*sends 'b' \(2,\)"),
        ([("a", torch.zeros(1))], r"announced 'a' \(2,\).*sends 'a' \(1,\)"),
        ([("a", torch.zeros(2))], "weights end before 'b'"),
        ([("a", torch.zeros(2)), ("b", torch.zeros(2)), ("c", torch.zeros(2))], "'c', which it did not announce"),
    ],
)
def test_weights_other_than_announced_are_not_sent(weights, message):
    calls = []

    def call(handles, method, arguments, deadline_s):
        calls.append(method)
        return [1]

    metadata = [("a", torch.float32, (2,)), ("b", torch.float32, (2,))]
    sender = make_sender("shm", ["engine"], metadata, 1, call=call)
    with pytest.raises(PublicationError, match=message):
        sender.send(weights, 1)
    assert calls == ["check_parameters", "init_weight_transfer_engine"]


def test_every_worker_of_every_engine_has_its_own_rank():
    told = {}

    def call(handles, method, arguments, deadline_s):
        told[method] = arguments
        return [2, 1, 4]

    engines = Engines(["a", "b", "c"], 1, call)
    engines.check([])
    engines.init_weight_transfer_engine({"rank_offset": 1, "port": 7})
    assert [info["rank_offset"] for (info,) in told["init_weight_transfer_engine"]] == [1, 3, 4]


def test_shared_memory_that_is_too_small_is_an_error_and_not_a_crash():
    with pytest.raises(ResourceError, match="/dev/shm has no room for"):
        senders._map(Path("/dev/shm/rlhf-ray-test"), 1 << 45)
    Path("/dev/shm/rlhf-ray-test").unlink()


def test_a_group_that_does_not_meet_gives_up_at_its_deadline():
    deadline = timedelta(seconds=1)
    store = groups.rendezvous("127.0.0.1", 2, deadline)
    with pytest.raises(DeadlineError, match=r"rank 0 .* could not meet the other 1 within 1 s"):
        groups.enter(store, 0, 2, deadline)


@pytest.mark.real
def test_an_engine_that_does_not_answer_is_waited_for_until_the_deadline(ray_cluster):
    import ray

    @ray.remote
    class Stuck:
        def start_weight_update(self):
            import time

            time.sleep(600)

    stuck = Stuck.remote()
    with pytest.raises(DeadlineError, match=r"waited 0\.5 s for rollout engines to answer start_weight_update; 0 of 1"):
        call_all([stuck], "start_weight_update", [()], 0.5)
    ray.kill(stuck)


@pytest.mark.real
def test_engines_follow_every_publication(publisher):
    sender = publisher.sender()
    for _ in range(3):
        publisher.publish(sender)
        publisher.assert_followed()


@pytest.mark.real
def test_scores_follow_too_and_leave_no_trace_in_a_later_publication(publisher):
    import ray

    sequences = prompts_of(3, 50)
    lengths = np.array([10, 20, 30], dtype=np.int32)
    sender = publisher.sender()
    publisher.publish(sender)
    expected = oracle(publisher.model, [sequences[row] for row in range(3)], lengths.tolist(), publisher.temperature)
    for handle in publisher.handles:
        found = ray.get(handle.logprobs.remote(sequences, lengths))
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.real
def test_a_long_prompt_in_the_prefix_cache_is_computed_anew_after_a_publication(publisher):
    """The cache holds whole blocks of 128 tokens: short prompts would pass with stale keys."""
    prompts = Ragged.of([prompts_of(1, 300)[0]] * 2, np.int32)
    sender = publisher.sender()
    for handle in publisher.handles:
        generate(handle, prompts, [0, 3])
    publisher.publish(sender)
    for handle in publisher.handles:
        answers = generate(handle, prompts, [0, 3])
        expected = oracle_of(publisher.model, answers, publisher.temperature)
        np.testing.assert_allclose(answers.sampler_logprobs, expected, atol=1e-4)


@pytest.mark.real
def test_bf16_on_the_wire_arrives_rounded_to_bf16(untied):
    sender = untied.sender(metadata=metadata_of(untied.model, torch.bfloat16))
    untied.publish(sender)
    assert sender.nbytes < sum(4 * parameter.numel() for parameter in untied.model.parameters())
    with torch.no_grad():
        for parameter in untied.model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    untied.assert_followed()


@pytest.mark.real
def test_a_damaged_bucket_is_refused_and_nothing_is_generated_until_a_good_publication(untied):
    def damaging(handles, method, arguments, deadline_s):
        if method == "update_weights":
            sender.memory[sender.buckets[0].nbytes + 3000] ^= 1
        return call_all(handles, method, arguments, deadline_s)

    sender = untied.sender(damaging)
    with pytest.raises(PublicationError, match=r"bucket 2 \(model.*arrived damaged"):
        untied.publish(sender)
    with pytest.raises(PublicationError, match=r"refuses to generate: the last publication failed: bucket 2"):
        generate(untied.handles[0], prompts_of(1, 20), [0])
    untied.publish(untied.sender())
    untied.assert_followed()


@pytest.mark.real
def test_a_broadcast_damaged_half_way_is_refused_by_all_and_the_next_good_one_is_exact(tied_twice, monkeypatch):
    count = 0

    def wrong_in_the_middle_of_a_layer(buffer):
        nonlocal count
        count += 1
        return b"8 bytes." if count == 3 else checksum(buffer)  # keys; the queries beside them have come

    sender = tied_twice.sender()
    with monkeypatch.context() as patch:
        patch.setattr(senders, "checksum", wrong_in_the_middle_of_a_layer)
        with pytest.raises(PublicationError, match=r"bucket 3 \(model.layers.0.self_attn.k_proj.*arrived damaged"):
            tied_twice.publish(sender)
    for handle in tied_twice.handles:
        with pytest.raises(PublicationError, match="refuses to generate"):
            generate(handle, prompts_of(1, 20), [0])
    tied_twice.publish(tied_twice.sender())
    tied_twice.assert_followed()


@pytest.mark.real
def test_weights_that_do_not_fit_are_refused_before_the_update_and_the_next_publication_works(publisher):
    publisher.publish(publisher.sender())
    name, dtype, shape = metadata_of(publisher.model)[3]
    rest = [kind for kind in metadata_of(publisher.model) if kind[0] != name]
    wrong = {
        rf"'{name}' has shape": [*rest, (name, dtype, (shape[0] + 1, *shape[1:]))],
        rf"'{name}' is missing": rest,
        "'value_head.weight' is not a parameter": [
            *metadata_of(publisher.model),
            ("value_head.weight", dtype, (1, 64)),
        ],
    }
    for message, metadata in wrong.items():
        with pytest.raises(ModelError, match=message):
            publisher.sender(metadata=metadata)
    publisher.assert_followed()  # still the old ones, still served
    publisher.publish(publisher.sender())
    publisher.assert_followed()


@pytest.mark.real
def test_an_engine_left_in_the_middle_of_a_publication_serves_nothing_and_takes_the_next(untied):
    import ray

    ray.get(untied.handles[0].start_weight_update.remote())  # and the learner dies here
    with pytest.raises(PublicationError, match="refuses to generate: a publication of weights began"):
        generate(untied.handles[0], prompts_of(1, 20), [0])
    untied.publish(untied.sender())
    untied.assert_followed()


@pytest.mark.real
def test_no_file_is_left_in_shared_memory(untied):
    def failing(handles, method, arguments, deadline_s):
        if method == "init_weight_transfer_engine":
            raise DeadlineError("no answer")
        return call_all(handles, method, arguments, deadline_s)

    sender = untied.sender()
    assert not list(Path("/dev/shm").glob("rlhf-ray-*"))
    assert sender.nbytes >= sum(4 * math.prod(shape) for _, _, shape in metadata_of(untied.model))
    with pytest.raises(DeadlineError):
        untied.sender(failing)
    assert not list(Path("/dev/shm").glob("rlhf-ray-*"))
