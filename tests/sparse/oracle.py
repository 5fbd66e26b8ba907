"""An oracle for sparse attention that knows nothing of tokcc: transformers' own model, one row at a time.

Every row of a batch runs alone and without padding. Its attention is replaced by a dense one over what a rule says that
each query reads: a mask, written in Python from the method's formula. Between calls a second rule may throw entries out
of the caches, which then are the keys that the first one sees.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.decoders.oracle import Rule as Eviction
from tests.decoders.oracle import run_alone

__all__ = ["Eviction", "Look", "Rule", "blocks_to_tokens", "causal", "run_sparse"]

_NAME = "tokcc_sparse_oracle"


@dataclass(frozen=True)
class Look:
    """The attention of one layer in one call; one row, no batch axis.

    Attributes:
        layer: 0-based.
        query: ``[H, S, D]``, turned.
        key: ``[Hkv, L, D]``.
        value: ``[Hkv, L, Dv]``.
        scale: Factor of the logits.
        memory: What the rule carries from layer to layer and call to call.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    memory: dict[Any, Any]

    @property
    def repeated(self) -> Tensor:
        """Keys by query head, ``[H, L, D]``."""
        return self.key.repeat_interleave(self.query.shape[0] // self.key.shape[0], 0)

    @property
    def logits(self) -> Tensor:
        """``[H, S, L]``, not masked."""
        return (self.query.double() @ self.repeated.double().transpose(1, 2)) * self.scale

    @property
    def new(self) -> int:
        """S."""
        return self.query.shape[1]

    @property
    def total(self) -> int:
        """L."""
        return self.key.shape[1]


Rule = Callable[[Look], Tensor | None]
"""Returns what each query reads, bool ``[H or 1, S, L]``, or None for everything. What it may not see is left out.

Numbers ``[H, S, L]`` are the weights themselves, where they are no softmax over what is read.
"""


def causal(new: int, total: int) -> Tensor:
    """What queries see, bool ``[S, L]``."""
    return torch.arange(total) <= torch.arange(total - new, total)[:, None]


def blocks_to_tokens(table: Tensor, block_q: int, block_k: int, new: int, total: int) -> Tensor:
    """Spread a table of blocks ``[H, MQ, M]`` over queries and keys, ``[H, S, L]``."""
    return table.repeat_interleave(block_q, 1)[:, :new].repeat_interleave(block_k, 2)[:, :, :total]


class _Attention:
    def __init__(self, rule: Rule, zeros: bool) -> None:
        self.rule, self.zeros = rule, zeros
        self.memory: dict[Any, Any] = {}

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        del attention_mask, dropout, kwargs
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        look = Look(int(module.layer_idx), query[0], key[0], value[0], scale, self.memory)  # type: ignore[arg-type]
        logits = (look.query @ look.repeated.transpose(1, 2)) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        seen = causal(look.new, look.total)[None]
        read = self.rule(look)
        values = look.value.repeat_interleave(look.query.shape[0] // look.key.shape[0], 0)
        if read is not None and read.is_floating_point():
            return (read.to(values.dtype) @ values).transpose(0, 1)[None], None
        if read is not None:
            seen = seen & read
            assert self.zeros or bool(seen.any(-1).all()), "a query reads nothing"
        probs = torch.softmax(logits.masked_fill(~seen, -torch.inf).float(), -1).to(value.dtype)
        probs = probs.masked_fill(~seen.any(-1, keepdim=True), 0.0)
        return (probs @ values).transpose(0, 1)[None], probs[None]  # [1, S, H, Dv], [1, H, S, L]


def run_sparse(
    model: nn.Module, ids: Tensor, calls: Sequence[int], rule: Rule, zeros: bool = False, evict: Eviction | None = None
) -> Tensor:
    """Run one row of ids ``[T]`` in calls of the given lengths; return logits ``[T, V]``.

    Args:
        model: Any causal model of transformers.
        ids: The row.
        calls: New tokens of each call.
        rule: What queries read.
        zeros: Whether queries may read nothing, and attend to zeros then.
        evict: What goes out of the caches after every call.
    """
    attention = _Attention(rule, zeros)
    ALL_ATTENTION_FUNCTIONS.register(_NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, eager_mask)
    own = copy.deepcopy(model)
    own.set_attn_implementation(_NAME)
    if evict is not None:
        return run_alone(own, ids, calls, evict).logits
    cache, logits, start = DynamicCache(config=own.config), [], 0
    with torch.no_grad():
        for length in calls:
            places = torch.arange(start, start + length)[None]
            out = own(input_ids=ids[None, start : start + length], position_ids=places, past_key_values=cache)
            logits.append(out.logits[0])
            start += length
    return torch.cat(logits)
