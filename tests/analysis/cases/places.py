"""Every place that models put the token axis at."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tests.analysis.layouts import HEADS, parse

__all__ = ["PLACES", "side_layouts"]


def _heads(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], x.shape[1], HEADS, -1)  # [B, N, H, D]


def _fused_heads(x: Tensor) -> Tensor:
    batch, tokens, _ = x.shape
    return _heads(x).transpose(1, 2).reshape(batch * HEADS, tokens, -1)


def _multihead(x: Tensor) -> Tensor:
    """As nn.MultiheadAttention: [N, B*H, D]."""
    batch, tokens, _ = x.shape
    return x.transpose(0, 1).reshape(tokens, batch * HEADS, -1)


PLACES: dict[str, Callable[[Tensor], Tensor]] = {
    "b n c": lambda x: x,
    "n b c": lambda x: x.transpose(0, 1),
    "b c n": lambda x: x.transpose(1, 2),
    "c b n": lambda x: x.permute(2, 0, 1),
    "b n h d": _heads,
    "b h n d": lambda x: _heads(x).permute(0, 2, 1, 3),
    "b h d n": lambda x: _heads(x).permute(0, 2, 3, 1),
    "h b n d": lambda x: _heads(x).permute(2, 0, 1, 3),
    "b 1 n c": lambda x: x.unsqueeze(1),
    "b n 1 c": lambda x: x.unsqueeze(2),
    "(b h) n d": _fused_heads,
    "(b h) d n": lambda x: _fused_heads(x).transpose(1, 2),
    "n (b h) d": _multihead,
    "(n b) c": lambda x: x.transpose(0, 1).reshape(x.shape[0] * x.shape[1], x.shape[2]),
    "(b n) c": lambda x: x.reshape(x.shape[0] * x.shape[1], x.shape[2]),
    "c (b n)": lambda x: x.reshape(x.shape[0] * x.shape[1], x.shape[2]).transpose(0, 1),
    "(b h n) d": lambda x: _fused_heads(x).reshape(-1, x.shape[2] // HEADS),
}
"""From ``x [B, N, C]`` to each placement, by its layout."""


def side_layouts(layout: str) -> list[str]:
    """Return every broadcast form of a side operand: each axis of full size or one, leading ones left out or not."""
    axes = layout.replace("(", "").replace(")", "").split() if "(" not in layout else None
    names = [f"({' '.join(axis)})" if len(axis) > 1 else axis[0] for axis in parse(layout)] if axes is None else axes
    forms: list[list[str]] = [[]]
    for name in names:
        forms = [[*form, choice] for form in forms for choice in dict.fromkeys((name, "1"))]
    result: list[str] = []
    for form in forms:
        result.append(" ".join(form))
        short = list(form)
        while short and short[0] == "1":
            short = short[1:]
            result.append(" ".join(short))
    return list(dict.fromkeys(result))
