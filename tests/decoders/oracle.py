"""An oracle for decoders that knows nothing of tokcc: transformers' own model, one row at a time, evicting in Python.

Every row of a batch runs alone and without padding, with eager attention, and a rule throws entries out of the cache
after every call. What the compiled decoder gives for that row in a padded batch has to be the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

__all__ = ["Call", "Memory", "Merged", "Rule", "Trace", "run_alone"]


class _Layer(CacheLayerMixin):
    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.keys = self.values = None
        self.is_initialized = True

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys = key_states if self.keys is None else torch.cat([self.keys, key_states], 2)
        self.values = value_states if self.values is None else torch.cat([self.values, value_states], 2)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        new = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return self.get_seq_length() + new, 0

    def get_seq_length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def get_max_cache_shape(self) -> int:
        return -1

    def get_max_length(self) -> int:
        return -1


@dataclass
class Memory:
    """What a rule may carry from call to call for one layer."""

    values: dict[str, Any] = field(default_factory=dict)
    positions: Tensor | None = None
    """int64 ``[Hkv, P]``: true positions of the cached entries."""


@dataclass(frozen=True)
class Call:
    """One layer in one call, before anything is evicted; one row, no batch axis.

    Attributes:
        layer: 0-based.
        num_layers: Depth.
        probs: fp32 ``[H, S, L]``, rows sum to 1.
        key: ``[Hkv, L, D]``.
        value: ``[Hkv, L, D]``.
        positions: int64 ``[Hkv, L]``: true positions.
        seen: Tokens so far, this call's included.
        memory: Carried from call to call.
    """

    layer: int
    num_layers: int
    probs: Tensor
    key: Tensor
    value: Tensor
    positions: Tensor
    seen: int
    memory: Memory

    @property
    def grouped(self) -> Tensor:
        """Probabilities by key head: ``[Hkv, G, S, L]``."""
        return self.probs.unflatten(0, (self.key.shape[0], -1))

    @property
    def total(self) -> int:
        """L."""
        return self.key.shape[1]

    @property
    def new(self) -> int:
        """S."""
        return self.probs.shape[1]


@dataclass(frozen=True)
class Merged:
    """What a rule leaves that changes entries.

    Attributes:
        keep: int64 ``[Hkv, K]``, ascending: the entries that the new ones take the place of.
        key: ``[Hkv, K, D]``.
        value: ``[Hkv, K, D]``.
    """

    keep: Tensor
    key: Tensor
    value: Tensor


Rule = Callable[[Call], Tensor | Merged | None]
"""Returns the kept entries int64 ``[Hkv, K]``, ascending, or None to keep everything."""


Holding = Callable[[int, int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Returns what is left of a layer's keys and values ``[Hkv, K, D]`` until the next call.

Takes the number of the call, the layer, keys, values, and the true positions of the entries ``[Hkv, K]``.
"""


@dataclass
class Trace:
    """What one row gave.

    Attributes:
        logits: ``[T, V]``.
        positions: For each call and layer, the true positions of the kept entries, int64 ``[Hkv, K]``.
        keys: The keys of the last call by layer, ``[Hkv, K, D]``.
        values: The same for values.
    """

    logits: Tensor
    positions: list[list[Tensor]]
    keys: list[Tensor]
    values: list[Tensor]


def turn(model: nn.Module, keys: Tensor, by: Tensor) -> Tensor:
    """Turn cached keys ``[1, Hkv, K, D]`` by whole positions ``[Hkv, K]``: rotations add up."""
    rotary = next(module for name, module in model.named_modules() if name.endswith("rotary_emb"))
    angles = by[..., None].double() * rotary.inv_freq.double()  # [Hkv, K, rot / 2]
    half = angles.shape[-1]
    cos, sin = angles.cos(), angles.sin()
    one, two, rest = keys[..., :half].double(), keys[..., half : 2 * half].double(), keys[..., 2 * half :]
    turned = torch.cat([one * cos - two * sin, two * cos + one * sin], -1)
    return torch.cat([turned.to(keys.dtype), rest], -1)


def run_alone(
    model: nn.Module,
    ids: Tensor,
    lengths: Sequence[int],
    rule: Rule | None,
    *,
    slots: bool = False,
    holding: Holding | None = None,
) -> Trace:
    """Run one row of ids ``[T]`` in calls of the given lengths with eager attention.

    Args:
        model: With eager attention.
        ids: The row.
        lengths: New tokens of each call.
        rule: What to evict.
        slots: Positions are places in the cache: entries that move up are turned back. The keys returned are unturned.
        holding: What becomes of entries that stay.
    """
    layers = model.config.num_hidden_layers
    cache = Cache(layers=[_Layer() for _ in range(layers)])
    memories = [Memory() for _ in range(layers)]
    attentions = [m for m in model.modules() if hasattr(m, "layer_idx") and type(m).__name__.endswith("Attention")]
    hooks = [m.register_forward_pre_hook(_OwnMask(cache), with_kwargs=True) for m in attentions]
    try:
        return _run(model, ids, lengths, rule, cache, memories, slots=slots, holding=holding)
    finally:
        for hook in hooks:
            hook.remove()


class _OwnMask:
    """Gives an attention the mask of its own layer where layers keep different numbers of entries.

    transformers makes one mask for all, after the cache of the first.
    """

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        lengths = [layer.get_seq_length() for layer in self.cache.layers]
        # Layers before this one have seen the call already.
        past = lengths[module.layer_idx]
        hidden = args[0] if args else kwargs["hidden_states"]
        new = hidden.shape[1]
        before = [n - new * (i < module.layer_idx) for i, n in enumerate(lengths)]
        if len(set(before)) == 1:
            return None
        slot = torch.arange(past + new)
        own = slot[past:, None]
        window = getattr(module, "sliding_window", None)
        seen = (slot <= own) & (slot > own - window if window else True)
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        return args, {**kwargs, "attention_mask": mask[None, None]}


def _run(
    model: nn.Module,
    ids: Tensor,
    lengths: Sequence[int],
    rule: Rule | None,
    cache: Cache,
    memories: list[Memory],
    *,
    slots: bool,
    holding: Holding | None,
) -> Trace:
    layers = len(memories)
    logits, kept, start = [], [], 0
    for number, length in enumerate(lengths):
        new = torch.arange(start, start + length)
        place = new if not slots else torch.arange(length) + cache.layers[0].get_seq_length()
        with torch.no_grad():
            out = model(
                input_ids=ids[None, start : start + length],
                position_ids=place[None],
                past_key_values=cache,
                use_cache=True,
                output_attentions=True,
            )
        start += length
        logits.append(out.logits[0])
        of_call = []
        for index, (layer, memory, probs) in enumerate(zip(cache.layers, memories, out.attentions, strict=True)):
            heads = layer.keys.shape[1]
            own = new.expand(heads, -1)
            memory.positions = own if memory.positions is None else torch.cat([memory.positions, own], 1)
            if rule is not None:
                call = Call(
                    index, layers, probs[0].float(), layer.keys[0], layer.values[0], memory.positions, start, memory
                )
                left = rule(call)
                if left is not None:
                    keep = left.keep if isinstance(left, Merged) else left
                    rows = torch.arange(heads)[:, None]
                    layer.keys, layer.values = layer.keys[:, rows, keep], layer.values[:, rows, keep]
                    if isinstance(left, Merged):
                        layer.keys, layer.values = left.key[None], left.value[None]
                    memory.positions = memory.positions[rows, keep]
                    if slots:
                        layer.keys = turn(model, layer.keys, torch.arange(keep.shape[1]) - keep)
            if holding is not None:
                held = holding(number, index, layer.keys[0], layer.values[0], memory.positions)
                layer.keys, layer.values = (x[None] for x in held)
            of_call.append(memory.positions)
        kept.append(of_call)
    if slots:
        for layer in cache.layers:
            layer.keys = turn(model, layer.keys, -torch.arange(layer.keys.shape[2]).expand(layer.keys.shape[1], -1))
    return Trace(
        torch.cat(logits), kept, [layer.keys[0] for layer in cache.layers], [layer.values[0] for layer in cache.layers]
    )
