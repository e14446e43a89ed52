"""vLLM decodes with ILQL's values: it draws, reports and scores by the distribution that plain PyTorch computes."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import tiny
import torch
from real_engines import generate, learner_model, oracle_of
from safetensors.torch import save_file

from rlhf_ray.actors.rollout import RolloutEngine, RolloutSettings, environment
from rlhf_ray.actors.weight_transfer import make_sender
from rlhf_ray.config.common import StageConfig
from rlhf_ray.config.evaluation import EvaluateConfig
from rlhf_ray.config.feedback import EnginesConfig
from rlhf_ray.errors import ModelError
from rlhf_ray.models.q_heads import FILE, SETTINGS, Decoder, value_head
from rlhf_ray.records import Ragged, Trajectories
from rlhf_ray.stages.engines import Engines, Reader

TEMPERATURE, STARTED_WITH = 0.7, 4.0
PROMPTS = Ragged.of(np.random.default_rng(0).integers(6, 43, (5, 12)), np.int32)
PUBLISHED = ("v", "target_q1", "target_q2")


def write_heads(folder: Path, seed: int) -> None:
    """Random heads as the stage leaves them, whose advantages are as large as the logits."""
    torch.manual_seed(seed)
    tensors = {}
    for name in ("v", "q1", "q2", "target_q1", "target_q2"):
        head = value_head(64, 1 if name == "v" else 64, torch.empty(0))
        torch.nn.init.normal_(head[2].weight, std=0.1)
        torch.nn.init.normal_(head[2].bias, std=0.1)
        tensors |= {f"{name}.{key}": weight.detach() for key, weight in head.state_dict().items()}
    (folder / FILE).parent.mkdir(exist_ok=True)
    save_file(tensors, folder / FILE)


def write_checkpoint(folder: Path, seed: int) -> Path:
    tiny.write_policy(folder, seed)
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), SETTINGS: {"decode_beta": 1.0}}))
    write_heads(folder, seed)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("ilql"), seed=0)


def settings_of(model: Path | str, decode_beta: float | None) -> RolloutSettings:
    """As a stage makes them, from the section of its configuration."""
    section = EnginesConfig.model_validate(
        {"model": str(model), "max_tokens": 48, "max_new_tokens": 16, "decode_beta": decode_beta}
    )
    reader = Reader(section, "policy", trust_remote_code=False)
    made = Engines(section, reader, StageConfig(name="run"), 60)._settings()
    return replace(made, temperature=TEMPERATURE, samples_per_prompt=3, transfer_backend="shm")


@pytest.fixture(scope="module")
def engine(ray_session: None, checkpoint: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    variables = environment("cpu", request.config.cache.mkdir("vllm"))  # type: ignore[union-attr]
    kind = ray.remote(RolloutEngine).options(num_cpus=1, runtime_env={"env_vars": variables})
    handle = kind.remote(settings_of(checkpoint, STARTED_WITH))
    ray.get(handle.ready.remote(), timeout=300)
    yield handle
    ray.get(handle.shutdown.remote(), timeout=60)
    ray.kill(handle)


def inside(engine: Any, do: Callable[[Any], Any]) -> Any:
    """What `do` returns of the engine, in the engine's process."""
    return ray.get(engine.__ray_call__.remote(do), timeout=60)


def steer(engine: Any, decode_beta: float) -> None:
    ray.get(engine.set_decode_beta.remote(decode_beta), timeout=60)


def tables(folder: Path, answers: Trajectories, decode_beta: float) -> np.ndarray:
    """[N, V] log-probabilities at TEMPERATURE at each place of the answers: a pass over each beginning, no cache."""
    decoder, found = Decoder(folder, learner_model(folder)), []
    for row in range(len(answers)):
        ids, length = torch.from_numpy(answers.sequence(row).astype(np.int64)), len(answers.prompt(row))
        found += [decoder.scores(ids[None, :place], decode_beta)[0] for place in range(length, len(ids))]
    return (torch.stack(found) / TEMPERATURE).log_softmax(-1).numpy()


def of_tokens(tables: np.ndarray, answers: Trajectories) -> np.ndarray:
    return tables[np.arange(len(tables)), answers.responses.values]


@pytest.mark.real
def test_what_is_drawn_reported_and_scored_is_one_distribution_which_is_plain_pytorch_s(
    engine: Any, checkpoint: Path
) -> None:
    steer(engine, STARTED_WITH)
    answers = generate(engine, PROMPTS, np.arange(5) * 3)
    expected = tables(checkpoint, answers, STARTED_WITH)
    np.testing.assert_allclose(answers.sampler_logprobs, of_tokens(expected, answers), atol=1e-4)

    sequences = Ragged.of([answers.sequence(row) for row in range(len(answers))], np.int32)
    scored = ray.get(engine.logprobs.remote(sequences, answers.prompt_lengths), timeout=60)
    np.testing.assert_allclose(scored, of_tokens(expected, answers), atol=1e-4)

    # On average over draws a log-probability is minus the entropy; of draws from the policy alone it would be far off.
    mean = (np.exp(expected) * expected).sum(1)
    deviation = np.sqrt(((np.exp(expected) * expected**2).sum(1) - mean**2).sum())
    assert abs((of_tokens(expected, answers) - mean).sum()) < 4 * deviation
    alone = tables(checkpoint, answers, 0.0)
    assert abs(((np.exp(alone) * expected).sum(1) - mean).sum()) > 10 * deviation


@pytest.mark.real
def test_a_single_option_is_scored_by_the_steered_policy_too(engine: Any, checkpoint: Path) -> None:
    steer(engine, STARTED_WITH)
    options = Ragged.of([[7], [8]], np.int32)
    found = ray.get(engine.option_logprobs.remote(PROMPTS, options), timeout=60)
    decoder = Decoder(checkpoint, learner_model(checkpoint))
    scores = decoder.scores(torch.tensor(np.stack(list(PROMPTS)), dtype=torch.int64), STARTED_WITH)
    np.testing.assert_allclose(found, scores.log_softmax(-1)[:, [7, 8]].numpy(), atol=1e-4)


@pytest.mark.real
def test_greedy_answers_are_plain_pytorch_s_token_for_token_at_every_beta(engine: Any, checkpoint: Path) -> None:
    def temperature(value: float) -> Callable[[Any], None]:
        def set_it(self: Any) -> None:
            self.settings = replace(self.settings, temperature=value, samples_per_prompt=1 if value == 0 else 3)

        return set_it

    decoder = Decoder(checkpoint, learner_model(checkpoint))
    [eos] = settings_of(checkpoint, None).eos_token_ids
    seen = []
    inside(engine, temperature(0))
    try:
        for decode_beta in (0.0, 1.0, 4.0, 16.0):
            steer(engine, decode_beta)
            answers = generate(engine, PROMPTS, np.arange(5))
            for row in range(len(answers)):
                ids, length = answers.prompt(row).tolist(), len(answers.prompt(row))
                while len(ids) < length + 16 and eos not in ids[length:]:
                    ids.append(int(decoder.scores(torch.tensor([ids]), decode_beta).argmax()))
                assert answers.responses[row].tolist() == ids[length:], (decode_beta, row)
            seen.append({int(id): answers.responses[row].tolist() for row, id in enumerate(answers.sample_ids)})
    finally:
        inside(engine, temperature(TEMPERATURE))
    assert all(one != other for one, other in pairwise(seen)), "a beta that changes nothing"


@pytest.mark.real
def test_beta_0_is_the_policy_alone(engine: Any, checkpoint: Path) -> None:
    steer(engine, 0.0)
    answers = generate(engine, PROMPTS, np.arange(5) * 3)
    expected = oracle_of(learner_model(checkpoint), answers, TEMPERATURE)
    np.testing.assert_allclose(answers.sampler_logprobs, expected, atol=1e-4)


@pytest.mark.real
def test_other_causal_models_are_wrapped_and_no_way_round_the_values_is_left(engine: Any) -> None:
    def classes(self: Any) -> tuple[list[list[str]], bool]:
        from vllm.model_executor.models import ModelRegistry

        names = ("LlamaForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM")
        made = [ModelRegistry.models[f"ILQL{name}"].load_model_cls() for name in names]
        [local] = self._engine.collective_rpc(lambda worker: hasattr(worker.get_model(), "compute_logits_local"))
        return [[kind.__name__ for kind in each.mro()[:3]] for each in made], local

    found, local = inside(engine, classes)
    assert found == [
        [f"ILQL{name}ForCausalLM", "Steered", f"{name}ForCausalLM"] for name in ("Llama", "Qwen3", "Gemma2")
    ]
    assert not local, "a rank's own logits are the policy's alone"


def published(folder: Path) -> list[tuple[str, torch.Tensor]]:
    from safetensors.torch import load_file

    heads = {f"ilql.{name}": weight for name, weight in load_file(folder / FILE).items() if name.startswith(PUBLISHED)}
    return [*learner_model(folder).named_parameters(), *heads.items()]


@pytest.mark.real
def test_policy_and_values_are_published_together_or_not_at_all(engine: Any, checkpoint: Path, tmp_path: Path) -> None:
    sent = published(write_checkpoint(tmp_path / "next", seed=1))
    metadata = [(name, weight.dtype, tuple(weight.shape)) for name, weight in sent]
    with pytest.raises(ModelError, match=r"'ilql\.v\.0\.weight' is missing"):
        make_sender("shm", [engine], [entry for entry in metadata if not entry[0].startswith("ilql.")], 30)
    sender = make_sender("shm", [engine], metadata, 30, bucket_bytes=10_000)
    steer(engine, STARTED_WITH)
    for version, folder in enumerate((tmp_path / "next", checkpoint), 1):  # and back, for the other tests
        sender.send(published(folder), version)
        answers = generate(engine, PROMPTS, np.arange(5) * 3)
        expected = tables(folder, answers, STARTED_WITH)
        np.testing.assert_allclose(answers.sampler_logprobs, of_tokens(expected, answers), atol=1e-4)


# Configuration


def test_only_the_policy_that_is_examined_is_steered() -> None:
    told = {
        "name": "run",
        "policy": {"model": "ilql", "decode_beta": 4},
        "reference": "other",
        "duel": {"opponent": "ilql", "judge": {"model": "judge"}},
        "answers": {"all": {"path": "rows.jsonl", "duel": True}},
    }
    engines = EvaluateConfig.model_validate(told).engines
    assert {name: each.decode_beta for name, each in engines.items()} == {
        "policy": 4,
        "reference": None,
        "duel.opponent": None,
        "duel.judge": None,
    }


# Refused before an engine starts


def without_heads(checkpoint: Path, folder: Path) -> Path:
    """As further training leaves it: the settings came along, the values did not."""
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("ilql"))
    return folder


def test_a_folder_without_values_is_refused_where_it_is_asked_to_steer(
    checkpoint: Path, policy: str, tmp_path: Path
) -> None:
    with pytest.raises(
        ModelError, match=r"policy\.model: decode_beta needs values .* no rlhf_ray_ilql .* and no ilql/"
    ):
        settings_of(policy, 4.0)
    bare = without_heads(checkpoint, tmp_path / "bare")
    with pytest.raises(ModelError, match=r"has no ilql/heads\.safetensors; expected a folder that `rlhf-ray ilql`"):
        settings_of(bare, 4.0)
    assert settings_of(bare, None).decode_beta is None
    # An engine that is made by hand refuses as well, before vLLM is imported.
    with pytest.raises(ModelError, match="decode_beta needs values"):
        RolloutEngine(replace(settings_of(bare, None), decode_beta=0.0))


def test_an_engine_without_values_cannot_be_steered_later(checkpoint: Path) -> None:
    plain = RolloutEngine.__new__(RolloutEngine)
    plain.settings = settings_of(checkpoint, None)
    with pytest.raises(ModelError, match="start it with a decode_beta"):
        plain.set_decode_beta(1.0)
