"""The least time in which hardware can do each phase of a PPO update: arithmetic on shapes, lengths and devices.

Every formula is a bound at the device's peaks. What programs reach of them comes in by `Device.at` alone, never in a
formula, so that a bound can be compared with a measurement. Nothing here is measured, and nothing counts what does not
scale with the work: launches of kernels, Python, waits for other ranks. For small models those are most of the time.

Letters below: n GPUs, each of F FLOP/s, B byte/s and C bytes of memory, and beta byte/s of links; S answers;
p prompt tokens, r answer tokens, r_max those of the longest, s = p + r; W bytes of weights; P_m parameters in matrix
products; L layers; H heads of queries, K of keys, d_h their dimension; b bytes of a number; g GPUs of an engine.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rlhf_ray.config.model_size import ModelShape

FILL = 0.9
"""Share of a GPU's memory that may be planned with."""
ADAM_BYTES = 30
"""Read and written for each parameter of a step: bf16 weight and gradient, fp32 master weight and both moments."""
CACHE_BLOCK = 16
"""Tokens of an engine's block of KV cache: all answers share a prompt's whole blocks and compute the rest each."""
WHOLE, ADAPTERS = 3, 2
"""A training pass in forward passes: backward is two more, or one where weights have no gradients."""


@dataclass(frozen=True)
class Shares:
    """What programs are taken to reach of the peaks."""

    compute: float = 0.4
    """Of FLOP/s (MFU), in training, scoring and prefill. Good RL trainers reach 0.4, pre-training 0.55."""
    memory: float = 0.5
    """Of memory bandwidth, in decoding and the optimiser's step. A single answer decodes at up to 0.77."""
    link: float = 0.35
    """Of a link's bandwidth, in publication."""


@dataclass(frozen=True)
class Device:
    """One GPU, or a CPU whose peaks were measured."""

    flops: float
    """Dense FLOP/s in the precision of training."""
    bandwidth: float
    """Byte/s of memory."""
    memory: float
    """Bytes."""
    link: float
    """Byte/s to others of its node, one way."""

    def at(self, shares: Shares) -> "Device":
        """The device as programs find it."""
        return replace(
            self,
            flops=self.flops * shares.compute,
            bandwidth=self.bandwidth * shares.memory,
            link=self.link * shares.link,
        )


GPUS = {
    "a100": Device(312e12, 2.04e12, 80e9, 300e9),
    "h100": Device(989e12, 3.35e12, 80e9, 450e9),
    "h200": Device(989e12, 4.8e12, 141e9, 450e9),
    "gb200": Device(2500e12, 8.0e12, 186e9, 900e9),
}
"""Public figures of the maker: dense bf16, memory of the 80 GB A100 and of the SXM H100, NVLink."""
NETWORK = 50e9
"""Byte/s of a GPU to other nodes, one way: a port of 400 Gbit/s for each."""


def gpu_of(device_name: str) -> Device | None:
    """By what its driver calls it, such as `NVIDIA H100 80GB HBM3`; None: its peaks are not known here."""
    words = device_name.lower().replace("-", " ").split()
    # A PCIe card, an NVL or one of 40 GB has the same name and other peaks.
    if "pcie" in words or "nvl" in words or "40gb" in words:
        return None
    return next((device for name, device in GPUS.items() if name in words), None)


@dataclass(frozen=True)
class Work:
    """One update."""

    prompts: int
    """G"""
    answers: int
    """S"""
    prompt_tokens: float
    """p, the mean."""
    answer_tokens: float
    """r, the mean."""
    longest: int
    """r_max"""
    epochs: int = 1

    @property
    def length(self) -> float:
        """s"""
        return self.prompt_tokens + self.answer_tokens

    @property
    def tokens(self) -> float:
        """S s"""
        return self.answers * self.length


@dataclass(frozen=True)
class Engines:
    """Equal engines."""

    count: float
    gpus: float
    """g of each."""
    cache: float
    """Bytes of each one's KV cache."""


@dataclass(frozen=True)
class Models:
    """Every model that an update computes with."""

    policy: ModelShape
    reference: tuple[ModelShape, ...]
    """None where the learner is the reference itself."""
    reward: tuple[ModelShape, ...]
    """As many as there are, none where a function or a server scores."""
    critic: tuple[ModelShape, ...]
    """One, or none."""
    width: int = 2
    """b, bytes of a weight and of a cached number."""

    @property
    def trained(self) -> tuple[ModelShape, ...]:
        return (self.policy, *self.critic)

    @property
    def weights(self) -> int:
        """W of the policy."""
        return self.policy.parameters * self.width


def kv_bytes(shape: ModelShape, width: int) -> int:
    """k = 2 L K d_h b: bytes of KV cache that a token takes."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dimension * width


def forward_flops(shape: ModelShape, length: float) -> float:
    """f(s) = 2 P_m + 2 L H d_h s: FLOP for each token of a causal sequence, which sees half of it on average."""
    return 2 * (shape.body + shape.head) + 2 * shape.layers * shape.heads * shape.head_dimension * length


def decode_flops(shape: ModelShape, context: float) -> float:
    """f_dec(c) = 2 P_m + 4 L H d_h c: FLOP for one more token after c others."""
    return 2 * (shape.body + shape.head) + 4 * shape.layers * shape.heads * shape.head_dimension * context


def cache_bytes(device: Device, gpus: float, weights: float) -> float:
    """0.9 C g - W: what an engine alone on its GPUs has for its KV cache; below zero the model does not fit."""
    return FILL * device.memory * gpus - weights


def waves(models: Models, work: Work, engines: Engines) -> float:
    """w = max(1, S s k / all caches): how often the engines fill up. Needs a cache above zero."""
    return max(1.0, work.tokens * kv_bytes(models.policy, models.width) / (engines.count * engines.cache))


def generate_s(models: Models, work: Work, engines: Engines, device: Device) -> float:
    """T_gen: prompts at the speed of arithmetic, then answers at that of memory or of arithmetic, whichever is slower.

    q f(p) / (n F) + max(bytes / (n B), S r f_dec(p + r/2) / (n F)), where q = G (p - 16) + 16 S prompt tokens are
    computed (S p if p is below 16), and decoding reads the cache and, at each of w r steps, every engine its weights:
    bytes = S k (r p + r^2/2) + (n/g) w r W.
    """
    gpus, p, r = engines.count * engines.gpus, work.prompt_tokens, work.answer_tokens
    apart = min(p, CACHE_BLOCK)
    prefill = (work.prompts * (p - apart) + work.answers * apart) * forward_flops(models.policy, p)
    decoding = work.answers * r * decode_flops(models.policy, p + r / 2)
    cache = work.answers * kv_bytes(models.policy, models.width) * (r * p + r * r / 2)
    weights = engines.count * waves(models, work, engines) * r * models.weights
    return prefill / (gpus * device.flops) + max(
        (cache + weights) / (gpus * device.bandwidth), decoding / (gpus * device.flops)
    )


def tail_s(models: Models, work: Work, engines: Engines, device: Device) -> float:
    """T_tail = max(T_gen, r_max W / (g B)): where the longest answer is waited for, all of its tokens are."""
    alone = work.longest * models.weights / (engines.gpus * device.bandwidth)
    return max(generate_s(models, work, engines, device), alone)


def score_s(shapes: Sequence[ModelShape], work: Work, device: Device, gpus: float) -> float:
    """T_score: the sum of S s f(s) / (n F) over models, one forward pass each over whole sequences."""
    return sum(work.tokens * forward_flops(shape, work.length) for shape in shapes) / (gpus * device.flops)


def learn_s(shapes: Sequence[ModelShape], work: Work, device: Device, gpus: float, passes: int = WHOLE) -> float:
    """T_learn = E times 3 S s f(s) / (n F), summed over models. A forward pass recomputed for memory is not counted."""
    return work.epochs * passes * score_s(shapes, work, device, gpus)


def optimizer_s(parameters: int, device: Device, gpus: float) -> float:
    """T_opt = 30 P / (n B) of one step of Adam, its state divided by n."""
    return ADAM_BYTES * parameters / (gpus * device.bandwidth)


def publish_s(
    weights: float, link_in: float, link_out: float, copies: float = 1, gpus: float = 1, senders: int = 1
) -> float:
    """T_sync = max(W / (g beta_in), copies W / (senders beta_out)), by links of an engine and of the senders."""
    return max(weights / (gpus * link_in), copies * weights / (senders * link_out))


def performance(
    models: Models,
    work: Work,
    metrics: Mapping[str, float],
    device: Device,
    gpus: float,
    learner_gpus: float,
    engine_gpus: float = 1,
    passes: int = WHOLE,
) -> dict[str, float]:
    """`perf/phi` and `perf/mfu` of an update from its metrics, `device` at its peaks.

    phi = (T_gen + T_score + T_learn) / time/update, each bound on all of the run's GPUs: 1 would be an update in which
    no GPU idles or misses a FLOP. MFU is what the learner computes by what its GPUs could while it trained. T_score has
    the learner's old log-probabilities and values in it. Where phases overlap, `time/learn` is only what the controller
    waited, and `busy/learner` knows how long the learner trained or published.
    """
    old = score_s(models.trained, work, device, learner_gpus)
    learned = old + learn_s(models.trained, work, device, learner_gpus, passes)
    engines = Engines(gpus / engine_gpus, engine_gpus, cache_bytes(device, engine_gpus, models.weights))
    scored = score_s((*models.reference, *models.reward), work, device, gpus)
    bound = generate_s(models, work, engines, device) + scored + learned * learner_gpus / gpus
    busy = metrics.get("busy/learner", 0.0) * metrics["time/update"] - metrics["time/publish"]
    return {
        "perf/phi": bound / metrics["time/update"],
        "perf/mfu": learned / max(metrics["time/learn"], busy),
    }


def work_of(metrics: Mapping[str, float], samples_per_prompt: int, longest: int, epochs: int) -> Work:
    """What an update did, by its metrics: those of the answers that it trained on."""
    answers = round(metrics["tokens/trained"] / metrics["tokens/response_length"])
    prompts = max(1, answers // samples_per_prompt)
    return Work(
        prompts=prompts,
        answers=answers,
        prompt_tokens=metrics["tokens/prompt"] / prompts,
        answer_tokens=metrics["tokens/response_length"],
        longest=longest,
        epochs=epochs,
    )
