"""Heads of implicit Q-learning on a language model: Q1, Q2 and V, and the targets that Q's past is kept in.

All heads read the last hidden state, which they train with the policy: one body, one pass. A head is an MLP with one
hidden layer twice as wide, as in the paper, and starts at zero: every advantage is 0 and every weight of AWAC 1.

Targets are no parameters but fp32 copies, whole on every rank: no optimiser, no sharding and no cast to bf16 must ever
touch them. A target is only asked for the token that was taken, one row of its last weight, and never for a vocabulary.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from rlhf_ray.algorithms.logprobs import in_chunks, logprobs_and_entropy
from rlhf_ray.algorithms.q_learning import conservative_loss, decode_scores, polyak
from rlhf_ray.errors import ModelError
from rlhf_ray.models.heads import HEAD_CHUNK, TokenLogprobs
from rlhf_ray.models.packed import Packed

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FILE = "ilql/heads.safetensors"
"""In a model's folder; one deeper, because vLLM reads every *.safetensors beside the model's own."""
SETTINGS = "rlhf_ray_ilql"
"""Key in the model's config.json: with what the heads were trained, and `decode_beta`."""
TARGET = "target_"
"""Before a Q head's name stands for its target."""


class ActionValues(NamedTuple):
    """Of the R answer tokens, each the action a_t in state s_t, float32."""

    logprobs: Tensor
    """[R] log pi(a_t | s_t), nats."""
    values: Tensor
    """[R] V(s_t)"""
    q: Tensor
    """[2, R] Q_i(s_t, a_t)"""
    conservative: Tensor
    """[R] log sum_a exp Q_i(s_t, a) - Q_i(s_t, a_t), summed over both heads."""
    target_q: Tensor
    """[R] Qhat(s_t, a_t), the smaller of the targets', without gradient."""


class QLearner(TokenLogprobs):
    """A language model with its heads. It has no target until `follow` was called."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, temperature=1.0)
        config: Any = model.config
        like = next(model.parameters())
        self.v = value_head(config.hidden_size, 1, like)
        self.q1 = value_head(config.hidden_size, config.vocab_size, like)
        self.q2 = value_head(config.hidden_size, config.vocab_size, like)
        self.targets: dict[str, Tensor] = {}
        """By name in the module, such as `q1.0.weight`."""

    def forward(self, packed: Packed) -> ActionValues:  # type: ignore[override]
        hidden = self.hidden(packed)
        head = self.model.get_output_embeddings()  # type: ignore[operator]

        def measure(rows: Tensor, actions: Tensor) -> tuple[Tensor, ...]:
            tables = [q(rows).float() for q in (self.q1, self.q2)]
            taken = [table.gather(-1, actions[:, None])[:, 0] for table in tables]
            conservative = sum(conservative_loss(table, actions) for table in tables)
            return logprobs_and_entropy(head(rows), actions, 1.0)[0], *taken, conservative

        actions = packed.targets
        logprobs, q1, q2, conservative = in_chunks(measure, (hidden, actions), HEAD_CHUNK, self.head_calls)
        values = self.v(hidden)[:, 0].float()
        return ActionValues(logprobs, values, torch.stack([q1, q2]), conservative, self._target_q(hidden, actions))

    @property
    def q_names(self) -> list[str]:
        """Of the parameters that targets follow."""
        return [name for name, _ in self.named_parameters() if name.startswith(("q1.", "q2."))]

    @property
    def targets_by_name(self) -> dict[str, Tensor]:
        """As they are saved: `target_q1.0.weight` and so on."""
        return {TARGET + name: target for name, target in self.targets.items()}

    @torch.no_grad()
    def follow(self, weights: Iterable[tuple[str, Tensor]], alpha: float) -> float:
        """Targets move by `alpha` towards whole `weights` of the Q heads, by name; the first time, they are copied.

        Returns the root mean square of what they then lag behind.
        """
        squares, count = 0.0, 0
        for name, weight in weights:
            target = polyak(self.targets.get(name, weight).float(), weight, alpha)
            self.targets[name] = target
            squares += float((weight.float() - target).square().sum())
            count += target.numel()
        return (squares / count) ** 0.5

    @torch.no_grad()
    def _target_q(self, hidden: Tensor, actions: Tensor) -> Tensor:
        found = []
        for q in ("q1", "q2"):
            inner, inner_bias, outer, outer_bias = (
                self.targets[f"{q}.{place}"] for place in ("0.weight", "0.bias", "2.weight", "2.bias")
            )
            features = relu(hidden.float() @ inner.T + inner_bias)
            found.append((features * outer[actions]).sum(-1) + outer_bias[actions])
        return torch.minimum(*found)


def value_head(hidden: int, outputs: int, like: Tensor) -> nn.Sequential:
    """[n, hidden] to [n, outputs], zero at first; dtype and device of `like`."""
    place: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
    last = nn.Linear(2 * hidden, outputs, **place)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(hidden, 2 * hidden, **place), nn.ReLU(), last)


def decoding_heads(vocabulary: int, head: Callable[[int], nn.Module]) -> nn.ModuleDict:
    """V and both targets of Q, which are all that decoding asks, by name; `head` makes one of so many outputs."""
    return nn.ModuleDict({"v": head(1), f"{TARGET}q1": head(vocabulary), f"{TARGET}q2": head(vocabulary)})


def steered(logits: Tensor, hidden: Tensor, heads: nn.ModuleDict, decode_beta: float) -> Tensor:
    """[R, V] float32, logits of the policy that the values steer; of its own logits [R, V] and hidden [R, hidden]."""
    target_q = torch.stack([heads[f"{TARGET}q{i}"](hidden) for i in (1, 2)]).float()
    return decode_scores(logits.float(), target_q, heads["v"](hidden)[:, 0].float(), decode_beta)


def check_values(config: "PretrainedConfig", path: str, role: str) -> None:
    """Raises ModelError unless there are values beside the model; of a hub's model the settings alone are seen."""
    folder = Path(path)
    missing = [] if hasattr(config, SETTINGS) else [f"no {SETTINGS} in its config.json"]
    missing += [f"no {FILE}"] if folder.is_dir() and not (folder / FILE).is_file() else []
    if missing:
        raise ModelError(
            f"{role}: decode_beta needs values of next tokens, but '{path}' has {' and '.join(missing)}; expected a "
            "folder that `rlhf-ray ilql` wrote. Leave decode_beta out to sample from the policy alone"
        )


class Decoder:
    """The policy that a checkpoint's targets and V steer, token by token. For small models and for tests."""

    def __init__(self, folder: Path, model: Any) -> None:
        """`model` is the language model of the checkpoint `folder`, on the CPU in fp32."""
        from safetensors.torch import load_file

        tensors = load_file(folder / FILE)
        self.model = model
        hidden, like = model.config.hidden_size, next(model.parameters())
        self.heads = decoding_heads(model.config.vocab_size, lambda outputs: value_head(hidden, outputs, like))
        for name, head in self.heads.items():
            own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
            head.load_state_dict(own)

    @torch.no_grad()
    def scores(self, ids: Tensor, decode_beta: float | None = None) -> Tensor:
        """[B, V] for the token after each of `ids` [B, T]; `decode_beta` is the checkpoint's own if it is none."""
        beta = getattr(self.model.config, SETTINGS)["decode_beta"] if decode_beta is None else decode_beta
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, -1]
        return steered(self.model.get_output_embeddings()(hidden), hidden, self.heads, beta)
