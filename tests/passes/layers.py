"""Trained layers of scorers written out for one sample: heads one by one, positions as complex numbers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Weights", "attention", "layer", "layer_weights", "linear", "mlp", "mlp_weights", "random", "rms", "turned"]

Weights = Mapping[str, Tensor]


def random(generator: torch.Generator, *shape: int) -> Tensor:
    """Numbers that keep activations near one."""
    return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5


def layer_weights(
    generator: torch.Generator, name: str, width: int, heads: int, kv_heads: int, head: int = 8, wide: int = 48
) -> dict[str, Tensor]:
    """Random weights of a layer as a LLaMA-like checkpoint names them, with biases as Qwen2 has them."""
    shapes = {
        "self_attn.q_proj.weight": (heads * head, width),
        "self_attn.k_proj.weight": (kv_heads * head, width),
        "self_attn.v_proj.weight": (kv_heads * head, width),
        "self_attn.o_proj.weight": (width, heads * head),
        "self_attn.q_proj.bias": (heads * head,),
        "self_attn.k_proj.bias": (kv_heads * head,),
        "mlp.gate_proj.weight": (wide, width),
        "mlp.up_proj.weight": (wide, width),
        "mlp.down_proj.weight": (width, wide),
    }
    # What is added to the stream stays near one, what attention compares is wide enough to prefer some.
    made = {
        f"{name}.{key}": (1 if "o_proj" in key or "down" in key else 2) * random(generator, *shape)
        for key, shape in shapes.items()
    }
    for norm in ("input_layernorm", "post_attention_layernorm"):
        made[f"{name}.{norm}.weight"] = 1 + 0.3 * torch.randn(width, generator=generator)
    return made


def mlp_weights(generator: torch.Generator, name: str, widths: Sequence[int]) -> dict[str, Tensor]:
    """Random weights of a plain MLP."""
    made = {}
    for i, (into, out) in enumerate(itertools.pairwise(widths)):
        made[f"{name}.layers.{i}.weight"] = 2 * random(generator, out, into)
        made[f"{name}.layers.{i}.bias"] = torch.randn(out, generator=generator)
    return made


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    """``x W^T + b``."""
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def rms(x: Tensor, weight: Tensor) -> Tensor:
    """Divide rows by the root of the mean of their squares."""
    return torch.stack([row / ((row @ row) / len(row) + 1e-6).sqrt() * weight for row in x])


def mlp(x: Tensor, weights: Weights, name: str, depth: int, activation: str = "silu") -> Tensor:
    """A plain MLP."""
    for i in range(depth):
        x = linear(getattr(F, activation)(x) if i else x, weights, f"{name}.layers.{i}")
    return x


def turned(x: Tensor, theta: float, start: int = 0) -> Tensor:
    """Turn ``[L, d]`` by positions: pairs ``(i, i + d / 2)`` are complex numbers."""
    half = x.shape[1] // 2
    places = torch.arange(start, start + len(x), dtype=torch.float64)
    angles = torch.outer(places, torch.tensor([theta ** (-i / half) for i in range(half)], dtype=torch.float64))
    pairs = torch.complex(x[:, :half].double(), x[:, half:].double()) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag], 1).float()


def attention(
    x: Tensor,
    context: Tensor,
    weights: Weights,
    name: str,
    heads: int,
    kv_heads: int,
    theta: float | None = None,
    start: int = 0,
) -> tuple[Tensor | None, list[Tensor]]:
    """Attention of ``[L, D]`` to all of ``[M, E]``: what is gathered, projected, and the probabilities of each head."""
    q, k = linear(x, weights, f"{name}.q_proj"), linear(context, weights, f"{name}.k_proj")
    width = q.shape[1] // heads
    has_values = f"{name}.v_proj.weight" in weights
    v = linear(context, weights, f"{name}.v_proj") if has_values else None
    mixed, maps = [], []
    for head in range(heads):
        own = head * kv_heads // heads
        one, other = q[:, head * width : (head + 1) * width], k[:, own * width : (own + 1) * width]
        if theta is not None:
            one, other = turned(one, theta, start), turned(other, theta)
        maps.append(torch.softmax(one @ other.T / width**0.5, dim=1))
        if v is not None:
            mixed.append(maps[-1] @ v[:, own * width : (own + 1) * width])
    gathered = linear(torch.cat(mixed, 1), weights, f"{name}.o_proj") if has_values else None
    return gathered, maps


def layer(x: Tensor, weights: Weights, name: str, heads: int, kv_heads: int, theta: float | None) -> Tensor:
    """A pre-norm layer with SwiGLU in which every row sees every other one."""
    y = rms(x, weights[f"{name}.input_layernorm.weight"])
    gathered, _ = attention(y, y, weights, f"{name}.self_attn", heads, kv_heads, theta)
    assert gathered is not None
    x = x + gathered
    y = rms(x, weights[f"{name}.post_attention_layernorm.weight"])
    gate = F.silu(linear(y, weights, f"{name}.mlp.gate_proj")) * linear(y, weights, f"{name}.mlp.up_proj")
    return x + linear(gate, weights, f"{name}.mlp.down_proj")
