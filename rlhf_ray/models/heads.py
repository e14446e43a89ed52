"""What each role computes from a Hugging Face model: token log-probabilities, values, scores.

Each is a module whose `forward` does all the work, heads called as modules, so that DeepSpeed's hooks (which gather
sharded parameters) see every use of a parameter. A dropped dimension or a head called outside `forward` is wrong
under ZeRO-3 without an error.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rlhf_ray.algorithms.logprobs import Reference, TokenStatistics, chunked
from rlhf_ray.models.packed import Packed, hidden_states

HEAD_CHUNK = 1024
"""Tokens whose logits exist at the same time."""


Head = Callable[[Tensor], Tensor]
"""[n, H] hidden states to [n, V] logits."""


class TokenLogprobs(nn.Module):
    """Policy or reference: log-probability and entropy of each response token."""

    def __init__(self, model: nn.Module, temperature: float) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.head_calls = 1
        """Least number of times that the head is called in a pass; see `keep_in_step`."""

    def keep_in_step(self, most_tokens: int) -> None:
        """Call the head equally often in every pass of up to `most_tokens`: sharded over ranks, each call gathers."""
        self.head_calls = -(-most_tokens // HEAD_CHUNK)

    def forward(self, packed: Packed, reference: Reference | None = None) -> TokenStatistics:
        """Of the R response tokens, at the sampling temperature, float32; with the KL to `reference` if given."""
        return self.statistics(self.hidden(packed), packed.targets, reference)

    def hidden(self, packed: Packed) -> Tensor:
        """[R, H] final hidden states that predict the response tokens."""
        return hidden_states(self.model.base_model, packed)[packed.predictors]  # type: ignore[arg-type]

    def statistics(self, hidden: Tensor, targets: Tensor, reference: Reference | None = None) -> TokenStatistics:
        """Of tokens `targets` [R], from their hidden states [R, H]."""
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        return chunked(hidden, head, targets, self.temperature, HEAD_CHUNK, self.head_calls, reference)

    def logprobs_at(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """[R, k] log-probabilities of tokens `ids` [R, k], float32, without gradients."""
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        pieces = list(zip(hidden.split(HEAD_CHUNK), ids.split(HEAD_CHUNK), strict=True))
        pieces += [(hidden[:0], ids[:0])] * (self.head_calls - len(pieces))
        logits = ((head(rows).float() / self.temperature, chosen) for rows, chosen in pieces)
        return torch.cat([table.log_softmax(-1).gather(-1, chosen) for table, chosen in logits])


class Values(nn.Module):
    """Critic: the expected return from the state in which each response token is chosen."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        reference = next(body.parameters())
        self.head = nn.Linear(body.config.hidden_size, 1, bias=False, dtype=reference.dtype)  # type: ignore[union-attr]
        nn.init.zeros_(self.head.weight)

    def forward(self, packed: Packed) -> Tensor:
        """[R] values, float32."""
        return self.head(hidden_states(self.body, packed)[packed.predictors])[:, 0].float()


class Scores(nn.Module):
    """Reward model: one score a sequence, read at its last real token."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, packed: Packed) -> Tensor:
        """[B] raw scores, float32."""
        hidden = hidden_states(self.model.base_model, packed)[packed.last_places]  # type: ignore[arg-type]
        return self.model.score(hidden)[:, 0].float()  # type: ignore[operator]


def switch_off_dropout(module: nn.Module) -> None:
    """Dropout makes a policy's log-probabilities random: the first ratio would not be one."""
    for child in module.modules():
        if isinstance(child, nn.Dropout):
            child.p = 0.0
    config = getattr(module, "config", None)
    for name in ("attention_dropout", "hidden_dropout", "resid_pdrop", "attn_pdrop", "embd_pdrop"):
        if config is not None and hasattr(config, name):
            setattr(config, name, 0.0)


@torch.inference_mode()
def checksum(module: nn.Module) -> str:
    """Hash of all parameters, bytes and names; equal for equal weights."""
    import xxhash

    digest = xxhash.xxh3_128()
    for name, parameter in module.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy())
    return digest.hexdigest()
