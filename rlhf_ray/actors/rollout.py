"""The rollout policy: vLLM's in-process engine, stepped by our own loop. Token ids in, token ids out.

Between two steps nothing runs, so answers can be handed on as they finish and weights can be exchanged there, in the
middle of answers (`serving.py`). What must never happen: an answer lost or cut short without a word; a token from
weights other than `weight_version` says; a key-value block computed with old weights served under new ones; one random
stream used for two prompts. After a publication that did not end well the engine refuses to generate until one does.

vLLM is imported inside the methods: `environment` must be in the process's environment before that.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from rlhf_ray.actors.serving import SharedEngine
from rlhf_ray.errors import DataError, GenerationError, ModelError, PublicationError, RLHFError
from rlhf_ray.records import Arrived, Finish, Float32, Int32, Ragged, Trajectories, id_type

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput, RequestOutput

EXTENSION = "rlhf_ray.actors.weight_transfer.receivers.WorkerExtension"
PREFILL_TOKENS = 4096
"""Prompt tokens of one step on CPU."""


def environment(device: str, cache_dir: str | os.PathLike) -> dict[str, str]:
    """Variables that vLLM and torch read when they are imported; for Ray's `runtime_env`.

    `cache_dir` should outlive the process: without what vLLM keeps there, an engine starts 10 s later.
    """
    common = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in the actor itself
        "VLLM_CACHE_ROOT": str(cache_dir),
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONWARNINGS": "ignore",
        "PYTHONDONTWRITEBYTECODE": "",
    }
    if device == "gpu":
        return common
    # On CPU torch.compile only costs: 12 s of C++ for one helper of the sampler.
    return {**common, "TORCH_COMPILE_DISABLE": "1", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class RolloutSettings:
    model: str
    """Folder or hub name of the policy."""
    max_model_len: int
    """Longest prompt and answer together, in tokens."""
    max_new_tokens: int
    temperature: float
    samples_per_prompt: int
    top_k: int
    """How many of the likeliest tokens are noted at each place; 0 for none."""
    kv_cache_bytes: int
    dtype: str
    """float32 or bfloat16."""
    tensor_parallel: int
    """GPUs of this engine; 1 on CPU."""
    transfer_backend: str | None
    """How weights come: shm, gloo, nccl or ipc; none: they never change."""
    eos_token_ids: tuple[int, ...]
    """Any of these ends an answer."""
    trust_remote_code: bool
    deadline_s: float = 600.0
    """Longest that a publication of weights may hold up what is being generated."""
    decode_beta: float | None = None
    """What advantages count in the policy that is served; none: it is the model's own, and no values are needed."""


class RolloutEngine:
    """An ordinary class; `ray.remote(RolloutEngine)` makes it an actor. Of its methods `generate`, `stream`, `logprobs`
    and `option_logprobs` may run beside each other and beside a publication, where the actor has threads for it."""

    def __init__(self, settings: RolloutSettings, weight_version: int = 0) -> None:
        """Loads the model; its weights are said to be `weight_version`. Raises ModelError when vLLM cannot serve it."""
        start = time.perf_counter()
        self.settings = settings
        self._engine = _build(settings)
        self._shared = SharedEngine(self._engine, str(self), settings.deadline_s)
        self._updating = False
        self._set_version(weight_version)
        self._start_s = time.perf_counter() - start

    def ready(self) -> dict[str, Any]:
        """pid, seconds to start (imports included), tokens that fit the KV cache, weight version."""
        cache = self._engine.vllm_config.cache_config
        return {
            "pid": os.getpid(),
            "start_s": self._start_s,
            "kv_tokens": cache.num_gpu_blocks * cache.block_size,
            "weight_version": self._version,
        }

    def generate(
        self, prompts: Ragged, sample_ids: NDArray[np.int64], seed: int, chunk_tokens: int
    ) -> Iterator[Trajectories]:
        """Samples `samples_per_prompt` answers to each of G prompts; yields chunks in the order in which they finish.

        A chunk goes out as soon as at least `chunk_tokens` generated tokens are in it; all answers to a prompt come in
        the same chunk. `sample_ids` [G] are the ids of each prompt's first sample; the others count on from there.

        In fp32 on CPU an answer depends on weights, prompt, seed and its sample id alone: not on what else is in the
        batch, nor on the engine. On GPUs batches round differently.

        Raises DataError for a prompt that cannot be served, PublicationError when the weights are not whole,
        GenerationError when the engine fails or an answer ends in any other way than EOS or full length.
        """
        for outputs in self._finished(prompts, sample_ids, seed, chunk_tokens):
            yield self._chunk(outputs, prompts, sample_ids)

    def stream(
        self, prompts: Ragged, sample_ids: NDArray[np.int64], seed: int, chunk_tokens: int
    ) -> Iterator[Arrived | Trajectories]:
        """As `generate`, each chunk after a note of what is in it: who routes it need not look into it."""
        for outputs in self._finished(prompts, sample_ids, seed, chunk_tokens):
            yield self._arrived(outputs, sample_ids)
            yield self._chunk(outputs, prompts, sample_ids)

    def abort(self) -> None:
        """Gives up what is being generated: streams end with what they have."""
        self._shared.abort()

    def logprobs(self, sequences: Ragged, prompt_lengths: Int32, temperature: float | None = None) -> Float32:
        """[N] log-probabilities of the tokens after each prompt by the present weights.

        At `temperature`, the one that is sampled at if none is given. One forward pass over each of B sequences, past
        the prefix cache. Raises GenerationError while anything is being generated, which this would change.
        """
        rows = [row for row in range(len(sequences)) if len(sequences[row]) > prompt_lengths[row]]
        # The engine insists on sampling a token after the prompt: the last one is scored as that token, so that a
        # sequence of full length fits.
        requests = [(sequences[row][:-1], self._scoring([int(sequences[row][-1])], context_too=True)) for row in rows]
        found: dict[int, list[float]] = {}
        with self._alone(1 / (temperature or self.settings.temperature)):
            for place, output in self._shared.serve(requests):
                row = rows[place]
                found[row] = _scores(output, int(prompt_lengths[row]), int(sequences[row][-1]))
        return np.array([value for row in rows for value in found[row]], dtype=np.float32)

    def option_logprobs(self, contexts: Ragged, options: Ragged) -> Float32:
        """[R, K] summed log-probabilities of each of K options (token sequences) after each of R contexts.

        At temperature 1. Options of one token each take one forward pass a context, through the prefix cache.
        """
        if (options.lengths > 1).any():
            rows = [(context, option) for context in range(len(contexts)) for option in range(len(options))]
            sequences = [np.concatenate([contexts[context], options[option]]) for context, option in rows]
            lengths = np.array([len(contexts[context]) for context, _ in rows], np.int32)
            flat = self.logprobs(Ragged.of(sequences, np.int32), lengths, temperature=1.0)
            parts = np.split(flat, np.cumsum([len(options[option]) for _, option in rows])[:-1])
            return np.array([part.sum() for part in parts], np.float32).reshape(len(contexts), len(options))
        found = np.full((len(contexts), len(options)), np.nan, np.float32)
        asked = options.values.tolist()
        with self._alone():
            for row, output in self._shared.serve([(context, self._scoring(asked)) for context in contexts]):
                known = output.outputs[0].logprobs
                places = [known.token_ids.index(option) for option in asked]
                found[row] = [known.logprobs[place] for place in places]
        return found

    def context_logprobs(self, sequences: Ragged) -> Float32:
        """[N - B] log-probabilities, at temperature 1, of all tokens of B sequences but the first of each.

        Past the prefix cache, and beside whatever is being generated, which stays what it is.
        """
        # Of one form with what is being generated: vLLM mixes up the columns of requests of different ones.
        params = self._sampling(0)
        params.n, params.max_tokens, params.prompt_logprobs = 1, 1, 0
        found = {}
        for row, output in self._shared.serve([(sequence, params) for sequence in sequences]):
            found[row] = list(output.prompt_logprobs.logprobs)[-(len(sequences[row]) - 1) :]
        return np.array([value for row in range(len(sequences)) for value in found[row]], dtype=np.float32)

    def weight_version(self) -> int:
        return self._version

    def set_decode_beta(self, decode_beta: float) -> None:
        """From here on advantages count `decode_beta`; 0 is the policy alone. Keys and values stay what they are.

        Raises ModelError when the engine was started without values.
        """
        if self.settings.decode_beta is None:
            raise ModelError(f"{self} has no values that could steer it; start it with a decode_beta")
        with self._shared.turn:
            self._engine.collective_rpc("set_decode_beta", args=(decode_beta,))

    def check_parameters(self, parameters: list[tuple[str, str, list[int]]]) -> int:
        """Compares (name, dtype, shape) of what the learner will send with the model; returns the number of workers.

        Raises ModelError when they differ.
        """
        own = _parameters(self.settings)
        sent = {name: tuple(shape) for name, _, shape in parameters}
        faults = [f"'{name}' is missing" for name in own if name not in sent]
        faults += [f"'{name}' is not a parameter of it" for name in sent if name not in own]
        faults += [
            f"'{name}' has shape {sent[name]}, expected {shape}"
            for name, shape in own.items()
            if name in sent and sent[name] != shape
        ]
        if faults:
            more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
            raise ModelError(
                f"{self}: the learner's weights do not fit: {'; '.join(faults[:3])}{more}. "
                "Learner and engines must load the same model"
            )
        return self._engine.vllm_config.parallel_config.world_size

    def init_weight_transfer_engine(self, info: dict[str, Any]) -> None:
        """Connects with a sender."""
        self._transfer("init_weight_transfer_engine", info)

    def start_weight_update(self) -> None:
        """From here until `finish_weight_update` no token is generated; what is under way waits."""
        self._shared.pause()
        if self._updating:  # by a sender that died
            self._transfer("finish_weight_update")
        self._transfer("start_weight_update")
        self._updating = True

    def update_weights(self, info: dict[str, Any]) -> None:
        """Receives and loads weights. Raises PublicationError when they arrive damaged."""
        try:
            self._transfer("update_weights", info)
        except RLHFError as error:
            self._updating = False  # vLLM has closed the update
            self._shared.refusal = f"the last publication failed: {error}"
            self._shared.resume()  # so that who waits is refused
            raise

    def finish_weight_update(self, version: int) -> dict[str, Any]:
        """The new weights are in place as `version`, and nothing computed with older ones is left.

        What is under way goes on from the tokens it has, their keys and values computed anew.
        """
        start = time.perf_counter()
        self._transfer("finish_weight_update")
        self._updating = False
        with self._shared.turn:
            if not self._engine.reset_prefix_cache(reset_running_requests=True):
                self._shared.refusal = "its prefix cache still holds keys of older weights"
                self._shared.resume()  # so that who waits is refused
                raise PublicationError(f"{self}: {self._shared.refusal}: vLLM did not reset it")
        self._set_version(version)
        self._shared.refusal = None
        self._shared.resume()
        verified = self.settings.transfer_backend in ("shm", "gloo")
        return {"version": version, "checksums_verified": verified, "seconds": time.perf_counter() - start}

    def shutdown(self) -> None:
        self._shared.refusal = "it was shut down"
        self._engine.engine_core.shutdown()

    def __str__(self) -> str:
        return f"rollout engine (pid {os.getpid()}, {self.settings.model})"

    def _set_version(self, version: int) -> None:
        self._version = version
        self._engine.set_weight_version(str(version))

    def _finished(
        self, prompts: Ragged, sample_ids: NDArray[np.int64], seed: int, chunk_tokens: int
    ) -> Iterator[list["RequestOutput"]]:
        """Finished prompts of at least `chunk_tokens` generated tokens at a time, named by their rows."""
        self._check(prompts, sample_ids)
        stream = _stream(seed)
        requests = [(prompts[row], self._sampling(stream + int(sample_ids[row]))) for row in range(len(prompts))]
        outputs: list[RequestOutput] = []
        tokens = 0
        for row, output in self._shared.serve(requests):
            output.request_id = str(row)
            outputs.append(output)
            tokens += sum(len(answer.token_ids) for answer in output.outputs)
            if tokens >= chunk_tokens:
                yield outputs
                outputs, tokens = [], 0
        if outputs:
            yield outputs

    @contextmanager
    def _alone(self, factor: float = 1.0) -> Iterator[None]:
        """Within it the model's logits are multiplied by `factor`, for whoever asks."""
        if self._shared.busy:
            raise GenerationError(f"{self}: scoring now would change what is being generated")
        if factor != 1:
            self._engine.collective_rpc("scale_logits", args=(factor,))
        try:
            yield
        finally:
            if factor != 1:
                self._engine.collective_rpc("scale_logits", args=(None,))

    def _check(self, prompts: Ragged, sample_ids: NDArray[np.int64]) -> None:
        """vLLM would cut long prompts' answers short, and look up ids beyond the vocabulary somewhere in memory."""
        if len(sample_ids) != len(prompts):
            raise DataError(f"{self}: {len(prompts)} prompts, but {len(sample_ids)} sample ids")
        longest = self.settings.max_model_len - self.settings.max_new_tokens
        for row in np.flatnonzero((prompts.lengths < 1) | (prompts.lengths > longest)):
            raise DataError(
                f"{self}: prompt of sample {sample_ids[row]} has {prompts.lengths[row]} tokens, expected 1 to "
                f"{longest}: of {self.settings.max_model_len}, {self.settings.max_new_tokens} are kept for the answer"
            )
        vocabulary = self._engine.model_config.get_vocab_size()
        for place in np.flatnonzero((prompts.values < 0) | (prompts.values >= vocabulary)):
            row = int(np.searchsorted(prompts.offsets, place, side="right")) - 1
            raise DataError(
                f"{self}: prompt of sample {sample_ids[row]} has token id {prompts.values[place]}, but the vocabulary "
                f"has {vocabulary} tokens"
            )

    def _sampling(self, seed: int) -> Any:
        """Plain sampling from softmax(logits / temperature); the policy that PPO's ratios assume."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        settings = self.settings
        return SamplingParams(
            n=settings.samples_per_prompt,
            temperature=settings.temperature,
            top_p=1.0,
            top_k=0,
            seed=seed,
            max_tokens=settings.max_new_tokens,
            stop_token_ids=list(settings.eos_token_ids),
            ignore_eos=True,  # the model folder's own opinion; `stop_token_ids` is ours
            logprobs=settings.top_k,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _scoring(self, options: list[int], context_too: bool = False) -> Any:
        """Log-probabilities of `options` as the next token, and those of the context's own tokens if asked for."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            max_tokens=1,
            temperature=1.0,
            prompt_logprobs=0 if context_too else None,
            logprob_token_ids=options,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _arrived(self, outputs: list["RequestOutput"], sample_ids: NDArray[np.int64]) -> Arrived:
        spans = [
            [int(span.version) for answer in output.outputs for span in answer.weight_versions] for output in outputs
        ]
        return Arrived(
            groups=sample_ids[[int(output.request_id) for output in outputs]] // self.settings.samples_per_prompt,
            oldest=np.array([min(versions) for versions in spans], np.int32),
            newest=np.array([max(versions) for versions in spans], np.int32),
            tokens=np.array([sum(len(answer.token_ids) for answer in output.outputs) for output in outputs], np.int32),
        )

    def _chunk(self, outputs: list["RequestOutput"], prompts: Ragged, sample_ids: NDArray[np.int64]) -> Trajectories:
        rows = [int(output.request_id) for output in outputs]
        count = self.settings.samples_per_prompt
        answers = [answer for output in outputs for answer in sorted(output.outputs, key=lambda answer: answer.index)]
        if len(answers) != count * len(rows):
            raise GenerationError(f"{self}: {len(answers)} answers to {len(rows)} prompts, expected {count} to each")
        ids = id_type(self._engine.model_config.get_vocab_size())
        responses = Ragged.of([answer.token_ids for answer in answers], ids)
        # vLLM's flat form: at each place the sampled token, then the k likeliest.
        width = 1 + self.settings.top_k
        noted = Ragged.of([answer.logprobs.token_ids for answer in answers], ids)
        if not np.array_equal(responses.offsets * width, noted.offsets):
            raise GenerationError(f"{self}: vLLM returned other than {width} log-probabilities for each token")
        flat = [value for answer in answers for value in answer.logprobs.logprobs]
        logprobs = np.array(flat, np.float32).reshape(-1, width)[:, 0].copy()
        if not np.isfinite(logprobs).all():
            raise GenerationError(
                f"{self}: log-probabilities of sampled tokens are not finite under weights version {self._version}"
            )
        return Trajectories(
            prompts=Ragged.of([prompts[row] for row in rows], ids),
            prompt_of=np.repeat(np.arange(len(rows), dtype=np.int32), count),
            responses=responses,
            sampler_logprobs=logprobs,
            finish=np.array([self._finish(answer) for answer in answers], dtype=np.uint8),
            sample_ids=(sample_ids[rows][:, None] + np.arange(count)).reshape(-1).astype(np.int64),
            weight_version=np.array([_oldest_version(answer) for answer in answers], dtype=np.int32),
            top_ids=noted.values.reshape(-1, width)[:, 1:].copy(),
        )

    def _finish(self, answer: "CompletionOutput") -> Finish:
        if answer.finish_reason == "stop" and answer.stop_reason in self.settings.eos_token_ids:
            return Finish.EOS
        if answer.finish_reason == "length" and len(answer.token_ids) == self.settings.max_new_tokens:
            return Finish.LENGTH
        raise GenerationError(
            f"{self}: an answer ended by '{answer.finish_reason}' ({answer.stop_reason}) after {len(answer.token_ids)} "
            f"tokens; expected an end-of-sequence token or {self.settings.max_new_tokens} tokens"
        )

    def _transfer(self, method: str, *args: Any) -> None:
        try:
            with self._shared.turn:
                self._engine.collective_rpc(method, args=args)
        except RLHFError:
            raise
        except Exception as error:
            raise PublicationError(f"{self}: {method} failed: {type(error).__name__}: {error}") from error


def _build(settings: RolloutSettings) -> Any:
    """vLLM's engine, checked to be what was asked for: some settings vLLM changes with no more than a log line."""
    from rlhf_ray.models.load import model_config

    description = model_config(settings.model, "policy", settings.trust_remote_code)
    steering: dict[str, Any] = {}
    if settings.decode_beta is not None:
        from rlhf_ray.actors.steering import overrides
        from rlhf_ray.models.q_heads import check_values

        check_values(description, settings.model, "policy")
        steering = overrides(description, settings.decode_beta)

    import torch
    from vllm import EngineArgs
    from vllm.config import WeightTransferConfig
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine

    parallel = settings.tensor_parallel > 1
    options: dict[str, Any]
    if current_platform.is_cpu():
        # A prompt must never be prefilled in parts: with a seed that crashes vLLM's CPU sampler.
        whole = max(settings.max_model_len, PREFILL_TOKENS)
        options = {"enforce_eager": True, "enable_chunked_prefill": False, "max_num_batched_tokens": whole}
    else:
        # The KV cache's size is given; the share of the GPU would only refuse to start beside other roles.
        options = {"gpu_memory_utilization": 0.01}
    arguments = EngineArgs(
        model=settings.model,
        skip_tokenizer_init=True,
        generation_config="vllm",
        trust_remote_code=settings.trust_remote_code,
        hf_overrides=steering,
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        tensor_parallel_size=settings.tensor_parallel,
        distributed_executor_backend="mp" if parallel else "uni",
        kv_cache_memory_bytes=settings.kv_cache_bytes,
        enable_prefix_caching=True,
        logprobs_mode="processed_logprobs",  # at the temperature that tokens are sampled at
        max_logprobs=max(20, settings.top_k),
        disable_log_stats=True,
        use_tqdm_on_load=False,
        worker_extension_cls=EXTENSION,
        weight_transfer_config=WeightTransferConfig(backend=settings.transfer_backend)
        if settings.transfer_backend
        else None,
        **options,
    )
    try:
        engine = LLMEngine.from_engine_args(arguments, usage_context=UsageContext.LLM_CLASS)
    except Exception as error:
        raise ModelError(f"vLLM cannot serve '{settings.model}': {type(error).__name__}: {error}") from error
    config = engine.vllm_config
    found = {
        "dtype": config.model_config.dtype == getattr(torch, settings.dtype),
        "logprobs_mode": config.model_config.logprobs_mode == "processed_logprobs",
        "whole prefill": not (current_platform.is_cpu() and config.scheduler_config.enable_chunked_prefill),
        "prefix caching": config.cache_config.enable_prefix_caching,
    }
    changed = [name for name, kept in found.items() if not kept]
    if changed:
        raise ModelError(
            f"vLLM would serve '{settings.model}' with other settings than asked for: {', '.join(changed)}"
        )
    return engine


def _parameters(settings: RolloutSettings) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the model's parameters as transformers names them, tied ones once, without allocating any."""
    import torch
    from transformers import AutoModelForCausalLM

    from rlhf_ray.models.load import model_config

    config = model_config(settings.model, "policy", settings.trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=settings.trust_remote_code)
    found = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if settings.decode_beta is not None:
        from rlhf_ray.actors.steering import parameters

        found |= parameters(config)
    return found


def _stream(seed: int) -> int:
    """Start of the range of vLLM seeds that belongs to `seed`: sample s uses the start plus s.

    vLLM gives the i-th sample of a prompt the prompt's seed plus i, which is then sample s + i's own: no two samples
    share a seed, though torch's CPU generator heeds only a seed's lower 32 bits.
    """
    return xxhash.xxh3_64_intdigest(seed.to_bytes(8, "little", signed=True)) >> 2


def _oldest_version(answer: "CompletionOutput") -> int:
    """vLLM notes with each token the version of the weights that sampled it."""
    return min(int(span.version) for span in answer.weight_versions)


def _scores(output: "RequestOutput", prompt_length: int, last: int) -> list[float]:
    """Log-probabilities of a scored sequence's tokens from `prompt_length` on."""
    known = list(output.prompt_logprobs.logprobs)[prompt_length - 1 :]
    sampled = output.outputs[0].logprobs
    return [*known, sampled.logprobs[sampled.token_ids.index(last)]]
