"""Queries before they are turned by their positions, heard from transformers' own modules, and their rotation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["heard_queries", "rotated"]


@contextmanager
def heard_queries(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Give the queries of the latest call by layer, ``[H, S, D]``; one row alone."""
    heard: dict[int, Tensor] = {}
    hooks = []
    heads = model.config.num_attention_heads
    for module in model.modules():
        if not hasattr(module, "layer_idx") or not type(module).__name__.endswith("Attention"):
            continue
        layer: int = module.layer_idx
        if hasattr(module, "q_norm"):  # [1, S, H, D]
            hooks.append(module.q_norm.register_forward_hook(_hear(heard, layer, lambda x: x[0].transpose(0, 1))))
        elif hasattr(module, "q_proj"):  # [1, S, H * D]
            split = lambda x: x[0].unflatten(1, (heads, -1)).transpose(0, 1)  # noqa: E731
            hooks.append(module.q_proj.register_forward_hook(_hear(heard, layer, split)))
        else:  # [1, S, 3 * H * D]: queries come first
            first = lambda x: x[0].chunk(3, 1)[0].unflatten(1, (heads, -1)).transpose(0, 1)  # noqa: E731
            hooks.append(module.c_attn.register_forward_hook(_hear(heard, layer, first)))
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def _hear(heard: dict[int, Tensor], layer: int, shape: Any) -> Any:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        heard[layer] = shape(output.detach()).float()

    return hook


def rotated(model: nn.Module, x: Tensor, position: int) -> Tensor:
    """Turn vectors ``[..., D]`` to one position; as they are where the model has no rotation."""
    rotary = next((module for name, module in model.named_modules() if name.endswith("rotary_emb")), None)
    if rotary is None:
        return x
    angles = position * rotary.inv_freq.double()
    half = len(angles)
    one, two = x[..., :half].double(), x[..., half:].double()
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([one * cos - two * sin, two * cos + one * sin], -1).float()
