"""An oracle for methods whose heads keep different numbers of entries: nothing is thrown away, but masked by head.

transformers' own model runs one row with eager attention over everything it ever saw; a rule says after every call what
each key head still sees, and how many tokens an entry stands for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from tests.decoders.engine import CALLS, Engine, _without, build, tokens
from tests.decoders.oracle import _Layer
from tests.decoders.tiny import model_of

__all__ = ["Seen", "assert_equals_masked", "run_masked"]


@dataclass
class Seen:
    """One layer after a call; a rule changes ``weight``, and ``front_key`` and ``front_value`` where there is a front.

    Attributes:
        layer: 0-based.
        probs: fp32 ``[H, S, L]`` of the call, without the front.
        query: What the call's queries were, ``[H, S, D]``, or None where nobody asked.
        key: ``[Hkv, L, D]``: everything so far.
        value: ``[Hkv, L, D]``.
        weight: fp32 ``[Hkv, L]``: how many tokens an entry stands for; 0 = gone.
        front_key: ``[Hkv, D]`` of an entry in front.
        front_value: The same for its value.
        front_weight: fp32 ``[Hkv]``.
    """

    layer: int
    probs: Tensor
    key: Tensor
    value: Tensor
    weight: Tensor
    front_key: Tensor
    front_value: Tensor
    front_weight: Tensor

    @property
    def new(self) -> int:
        """S."""
        return self.probs.shape[1]

    @property
    def grouped(self) -> Tensor:
        """``[Hkv, G, S, L]``."""
        return self.probs.unflatten(0, (self.key.shape[0], -1))


MaskedRule = Callable[[Seen], None]


class _Mask:
    def __init__(self, cache: Cache, weights: list[Tensor | None], fronts: list[Tensor | None]) -> None:
        self.cache, self.weights, self.fronts = cache, weights, fronts

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer = module.layer_idx
        weight, front = self.weights[layer], self.fronts[layer]
        if weight is None or front is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        new = hidden.shape[1]
        heads = module.config.num_attention_heads
        columns = torch.cat([front[:, None], weight, torch.ones(weight.shape[0], new)], 1)  # [Hkv, 1 + P + S]
        bias = torch.where(columns > 0, columns.clamp(min=1e-9).log(), torch.tensor(-math.inf))
        bias = bias.repeat_interleave(heads // bias.shape[0], 0)[:, None]
        slot = torch.arange(columns.shape[1])
        causal = torch.where(slot <= slot[-new:, None], 0.0, -math.inf)
        mask = (bias + causal).clamp(min=torch.finfo(torch.float32).min)
        return args, {**kwargs, "attention_mask": mask[None]}


def run_masked(model: nn.Module, ids: Tensor, lengths: Sequence[int], rule: MaskedRule) -> tuple[Tensor, list[Tensor]]:
    """Run one row of ids ``[T]`` in calls.

    Returns:
        The logits ``[T, V]`` and the weights by layer ``[Hkv, T]``.
    """
    count, config = model.config.num_hidden_layers, model.config
    kv = getattr(config, "num_key_value_heads", config.num_attention_heads)
    width = config.hidden_size // config.num_attention_heads
    cache = Cache(layers=[_Layer() for _ in range(count)])
    weights: list[Any] = [torch.zeros(kv, 0) for _ in range(count)]
    fronts: list[Any] = [torch.zeros(kv) for _ in range(count)]
    for layer in cache.layers:  # the entry in front, of no weight
        layer.keys, layer.values = torch.zeros(1, kv, 1, width), torch.zeros(1, kv, 1, width)
    attentions = [m for m in model.modules() if hasattr(m, "layer_idx") and type(m).__name__.endswith("Attention")]
    hooks = [m.register_forward_pre_hook(_Mask(cache, weights, fronts), with_kwargs=True) for m in attentions]
    logits, start = [], 0
    try:
        for length in lengths:
            place = torch.arange(start, start + length)[None]
            with torch.no_grad():
                out = model(
                    input_ids=ids[None, start : start + length],
                    position_ids=place,
                    past_key_values=cache,
                    use_cache=True,
                    output_attentions=True,
                )
            start += length
            logits.append(out.logits[0])
            for index, (layer, probs) in enumerate(zip(cache.layers, out.attentions, strict=True)):
                weight = torch.cat([weights[index], torch.ones(kv, length)], 1)
                seen = Seen(
                    index,
                    probs[0, :, :, 1:].float(),
                    layer.keys[0, :, 1:],
                    layer.values[0, :, 1:],
                    weight,
                    layer.keys[0, :, 0].clone(),
                    layer.values[0, :, 0].clone(),
                    fronts[index].clone(),
                )
                rule(seen)
                weights[index], fronts[index] = seen.weight, seen.front_weight
                layer.keys = torch.cat([seen.front_key[None, :, None], layer.keys[:, :, 1:]], 2)
                layer.values = torch.cat([seen.front_value[None, :, None], layer.values[:, :, 1:]], 2)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(logits), weights


def assert_equals_masked(
    family: str,
    policy: dict[str, Any],
    rule: MaskedRule,
    folder: Path,
    *,
    calls: Sequence[int] = CALLS,
    padding: Sequence[int] = (0, 3, 5),
    tolerance: float = 2e-4,
) -> tuple[Engine, dict[str, Any]]:
    """Every row of a padded batch gives the logits it gives alone under the rule."""
    engine = build(family, policy, folder)
    ids, mask = tokens(len(padding), sum(calls), padding)
    logits, last = engine.run(ids, mask, calls)
    for row, count in enumerate(padding):
        wanted, _ = run_masked(model_of(family), ids[row, count:], _without(calls, count), rule)
        scale = float(wanted.abs().max())
        np.testing.assert_allclose(logits[row, count:], wanted.numpy(), rtol=0, atol=tolerance * scale)
    return engine, last
