"""Fused attention, with every form of mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.analysis.cases.places import PLACES
from tests.analysis.cases.reduction import EVERY
from tests.analysis.oracle import Case, Kind, Side

__all__ = ["CASES"]

aten = torch.ops.aten
sdpa = aten.scaled_dot_product_attention.default


def _attention(layout: str, **options: Any) -> Any:
    place = PLACES[layout]

    def fn(x: Tensor, mask: Tensor | None = None, cos: Tensor | None = None) -> Tensor:
        heads = place(x)
        query = heads * 1.5 if cos is None else heads * cos
        return sdpa(query, heads, heads - 0.5, mask, 0.0, False, **options)

    return fn


def _rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: tokens keep the position they had."""
    heads = PLACES["b h n d"](x)

    def turned(t: Tensor) -> Tensor:
        half = torch.cat([-t[..., 2:], t[..., :2]], -1)
        return t * cos + half * sin

    return sdpa(turned(heads), turned(heads), heads)


def _cross(x: Tensor, memory: Tensor) -> tuple[Tensor, ...]:
    """Queries are tokens and keys are not, and the other way round (a pooling head)."""
    heads = PLACES["b h n d"](x)
    probe = memory[:, :, :1]
    return sdpa(heads, memory, memory), sdpa(probe, heads, heads), sdpa(probe.expand(x.shape[0], 2, 3, 4), heads, heads)


def _pooling_head(x: Tensor, probe: Tensor) -> Tensor:
    """SigLIP: nn.MultiheadAttention with one learned query, batch and heads fused."""
    keys = PLACES["n (b h) d"](x).transpose(0, 1)
    query = probe.expand(keys.shape[0], 1, 4)
    return sdpa(query, keys, keys)


def _causal(x: Tensor) -> tuple[Tensor, ...]:
    heads = PLACES["b h n d"](x)
    return sdpa(heads, heads, heads, None, 0.0, True), sdpa(heads, heads, heads, None, 0.0, True, scale=0.3)


SOME: tuple[tuple[Kind, ...], ...] = (("drop",), ("merge",), ("padded",), ("drop", "merge"))
_MASKS = {
    "[1, N]": "1 n",
    "[N, N]": "n n",
    "[1, N, N]": "1 n n",
    "[B, 1, 1, N]": "b 1 1 n",
    "[B, 1, N, N]": "b 1 n n",
    "[B, H, N, N]": "b h n n",
    "[1, H, N, N]": "1 h n n",
    "[1, 1, N, N]": "1 1 n n",
    "[H, 1, N]": "h 1 n",
    "[1, 1, 1, N]": "1 1 1 n",
}


def _side(layout: str, kind: Any) -> dict[str, Side]:
    return {"mask": Side(layout, kind)}


CASES: list[Case] = [
    Case("fused attention", _attention("b h n d"), ("b h n d",), commutes=False, kinds=EVERY),
    Case("fused attention, scale", _attention("b h n d", scale=0.2), ("b h n d",), commutes=False),
    Case("fused attention [B, N, C]", _attention("b n c"), ("b n c",), commutes=False, kinds=EVERY),
    Case(
        "fused attention [B*H, N, D]",
        _attention("(b h) n d"),
        ("(b h) n d",),
        commutes=False,
        kinds=EVERY,
        dynamic=True,
    ),
    Case("fused attention [B, 1, N, C]", _attention("b 1 n c"), ("b 1 n c",), commutes=False, kinds=EVERY),
    *(
        Case(
            f"fused attention, {kind} mask {name}",
            _attention("b h n d"),
            ("b h n d",),
            _side(layout, kind),
            commutes=False,
            kinds=EVERY if name in ("[B, 1, 1, N]", "[1, H, N, N]") else SOME,
            dynamic=name == "[B, 1, 1, N]" and kind == "bool",
        )
        for name, layout in _MASKS.items()
        for kind in ("bool", "additive", "float")
    ),
    *(
        Case(
            f"fused attention [B*H, N, D], {kind} mask {layout}",
            _attention("(b h) n d"),
            ("(b h) n d",),
            _side(layout, kind),
            commutes=False,
            kinds=SOME,
        )
        for layout in ("(b h) n n", "(b h) 1 n", "n n", "1 n n")
        for kind in ("bool", "float")
    ),
    *(
        Case(f"rotary tables {name}", _rotary, ("b h n d",), {"cos": Side(layout), "sin": Side(layout)}, False)
        for name, layout in {"[N, D]": "n d", "[1, N, D]": "1 n d", "[B, 1, N, D]": "b 1 n d"}.items()
    ),
    Case(
        "cross attention",
        _cross,
        ("b h n d", "b h 1 d", "b h 3 d"),
        {"memory": Side("b h 5 d")},
        commutes=False,
        kinds=EVERY,
        dynamic=True,
    ),
    Case("pooling head", _pooling_head, ("(b h) 1 d",), {"probe": Side("1 1 d")}, commutes=False, kinds=EVERY),
    Case("causal attention", _causal, ("b h n d", "b h n d"), commutes=False, kinds=(("drop",), ("shared",))),
]
