"""Parts of transformer layers with trained weights, for scorers that are one: named as in LLaMA-like checkpoints.

``<layer>.input_layernorm.weight``, ``<layer>.self_attn.{q,k,v,o}_proj.weight`` (``.bias`` where there is one),
``<layer>.post_attention_layernorm.weight``, ``<layer>.mlp.{gate,up,down}_proj.weight``.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from tokcc.errors import AxisError
from tokcc.ir.builder import Builder
from tokcc.passes.ordering import LOWEST
from tokcc.passes.trained import TensorSpec, Trained, activated, linear_specs

__all__ = ["Blocks"]

aten = torch.ops.aten


class Blocks(Trained):
    """A trained piece with attention of its own.

    Attributes:
        heads: Query heads; their width follows from the weights.
        kv_heads: Key and value heads, of which each serves as many query heads; None = as many as query heads.
        rope_theta: Base of the rotary positions; None = the attention knows no positions.
    """

    heads: int = Field(default=8, ge=1)
    kv_heads: int | None = Field(default=None, ge=1)
    rope_theta: float | None = Field(default=None, gt=0.0)

    def projection_specs(
        self, name: str, parts: str, width: int | str, context: int | str | None = None
    ) -> list[TensorSpec]:
        """Return projections of an attention.

        Args:
            name: In front of ``<part>_proj``.
            parts: Which of ``q``, ``k``, ``v``, ``o``.
            width: Of what asks.
            context: Of what is attended to; None = the same.
        """
        other = width if context is None else context
        shapes: dict[str, tuple[int | str, int | str]] = {
            "q": ("query_width", width),
            "k": ("key_width", other),
            "v": ("key_width", other),
            "o": (width, "query_width"),
        }
        return [spec for part in parts for spec in linear_specs(f"{name}.{part}_proj", *shapes[part])]

    def layer_specs(self, name: str, width: int | str, *, gated: bool = True) -> list[TensorSpec]:
        """Return all tensors of a self-attention layer with a gated or a plain MLP."""
        return [
            TensorSpec(f"{name}.input_layernorm.weight", (width,)),
            *self.projection_specs(f"{name}.self_attn", "qkvo", width),
            TensorSpec(f"{name}.post_attention_layernorm.weight", (width,)),
            *(linear_specs(f"{name}.mlp.gate_proj", "mlp_width", width) if gated else ()),
            *linear_specs(f"{name}.mlp.up_proj", "mlp_width", width),
            *linear_specs(f"{name}.mlp.down_proj", width, "mlp_width"),
        ]

    def layer(self, b: Builder, x: Any, name: str, mask: Any, like: Any, *, gated: bool = True) -> Any:
        """Apply a pre-norm layer to ``[B, L, D]``; every token sees every other one.

        Args:
            b: The builder.
            x: fp32 ``[B, L, D]``.
            name: Of the layer's tensors.
            mask: bool ``[B, L]``: what may be attended to; None = all.
            like: A handle on the same device.
            gated: The MLP is SwiGLU, else it has one GELU.
        """
        y = self.normed(b, x, f"{name}.input_layernorm", "rms")
        x = b.add(x, self.attend(b, y, y, f"{name}.self_attn", mask, like))
        y = self.normed(b, x, f"{name}.post_attention_layernorm", "rms")
        wide = self.linear(b, y, f"{name}.mlp.up_proj")
        if gated:
            wide = b.mul(activated(b, self.linear(b, y, f"{name}.mlp.gate_proj"), "silu"), wide)
        else:
            wide = activated(b, wide, "gelu")
        return b.add(x, self.linear(b, wide, f"{name}.mlp.down_proj"))

    def attend(self, b: Builder, x: Any, context: Any, name: str, mask: Any, like: Any, values: Any = None) -> Any:
        """Return what ``x`` ``[B, L, D]`` gathers from the context ``[B, M, E]``, projected: ``[B, L, D]``.

        ``values`` ``[B, M, E]`` is what is gathered, where it is not the context itself.
        """
        probs = self.probs(b, x, context, name, mask, like)
        own = self.linear(b, context if values is None else values, f"{name}.v_proj")
        value = self._repeated(b, self._by_head(b, own, self.kv_heads or self.heads))
        mixed = b.transpose(b.matmul(probs, value), 1, 2)  # [B, L, H, d]
        sizes = [b.size(mixed, 0), b.size(mixed, 1), b.shape(mixed)[2] * b.shape(mixed)[3]]
        return self.linear(b, b.reshape(mixed, sizes), f"{name}.o_proj")

    def probs(self, b: Builder, x: Any, context: Any, name: str, mask: Any, like: Any, start: Any = 0) -> Any:
        """Return the attention of ``x`` to the context, fp32 ``[B, H, L, M]``.

        Args:
            b: The builder.
            x: fp32 ``[B, L, D]``.
            context: fp32 ``[B, M, E]``.
            name: In front of ``q_proj`` and ``k_proj``.
            mask: bool ``[B, M]`` or broadcastable to ``[B, H, L, M]``: what may be attended to; None = all.
            like: A handle on the same device.
            start: Position of the first row of ``x``; the context begins at 0.
        """
        query = self._by_head(b, self.linear(b, x, f"{name}.q_proj"), self.heads)
        key = self._by_head(b, self.linear(b, context, f"{name}.k_proj"), self.kv_heads or self.heads)
        if self.rope_theta is not None:
            query, key = self._turned(b, query, like, start), self._turned(b, key, like, 0)
        key = self._repeated(b, key)
        width = b.shape(query)[3]
        logits = b.mul(b.matmul(query, b.transpose(key, 2, 3)), float(width) ** -0.5)
        if mask is not None:
            wide = b.unsqueeze(b.unsqueeze(mask, 1), 1) if len(b.shape(mask)) == 2 else mask
            logits = b.where(wide, logits, LOWEST)
        return b.softmax(logits, 3)

    def _by_head(self, b: Builder, x: Any, heads: int) -> Any:
        """``[B, L, H * d]`` -> ``[B, H, L, d]``."""
        width = b.shape(x)[2]
        if width % heads:
            raise AxisError(
                f"{width} numbers are not those of {heads} heads",
                needed="a number of heads that divides the width",
                help="give `heads` as the weights were trained with",
            )
        return b.transpose(b.reshape(x, [b.size(x, 0), b.size(x, 1), heads, width // heads]), 1, 2)

    def _repeated(self, b: Builder, x: Any) -> Any:
        """Give every query head its key head."""
        own = self.kv_heads or self.heads
        if own == self.heads:
            return x
        sizes = [b.size(x, i) for i in range(4)]
        wide = b.expand(b.unsqueeze(x, 2), [sizes[0], own, self.heads // own, sizes[2], sizes[3]])
        return b.reshape(wide, [sizes[0], self.heads, sizes[2], sizes[3]])

    def _turned(self, b: Builder, x: Any, like: Any, start: Any) -> Any:
        """Turn pairs of numbers ``(i, i + d / 2)`` of ``[B, H, L, d]`` by the token's position."""
        assert self.rope_theta is not None
        half = b.shape(x)[3] // 2
        speed = self.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        place = b.cast(b.arange(b.add_sizes(b.size(x, 2), start), like, start=start), torch.float32)
        angle = b.mul(b.unsqueeze(place, 1), b.constant(f"{self.kind}_rotary", speed.to(torch.float32)))  # [L, d / 2]
        cos, sin = b.call(aten.cos.default, angle), b.call(aten.sin.default, angle)
        one, two = b.slice(x, 3, 0, half), b.slice(x, 3, half)
        return b.cat([b.sub(b.mul(one, cos), b.mul(two, sin)), b.add(b.mul(two, cos), b.mul(one, sin))], 3)
