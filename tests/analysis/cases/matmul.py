"""Layers, matrix products and attention written out."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.analysis.cases.places import PLACES
from tests.analysis.cases.reduction import EVERY
from tests.analysis.oracle import Case, Side

__all__ = ["CASES"]

aten = torch.ops.aten


def _linear(x: Tensor, w: Tensor, v: Tensor, b: Tensor, one: Tensor) -> tuple[Tensor, ...]:
    places = [PLACES[name](x) for name in ("b n c", "n b c", "(n b) c", "(b n) c", "b 1 n c", "b n 1 c")]
    flat, turned = places[2], PLACES["c (b n)"](x)
    return (
        *(aten.linear.default(placed, w, b) for placed in places),
        aten.linear.default(PLACES["b h n d"](x), v),
        aten.linear.default(x, one),
        aten.addmm.default(b, flat, w.t()),
        aten.mm.default(flat, w),
        aten.mm.default(w, turned),
        aten.addmm.default(b.unsqueeze(1), w, turned),
        aten.matmul.default(x, w),
        aten.matmul.default(x, b),
        aten.matmul.default(b, x.transpose(1, 2)),
        aten.matmul.default(w, x.transpose(1, 2)),
        aten.bmm.default(x, w.expand(x.shape[0], 8, 8)),
        aten.linear.default(x.unsqueeze(-1), one.t()),
    )


_LINEAR = (
    "b n c",
    "n b c",
    "(n b) c",
    "(b n) c",
    "b 1 n c",
    "b n 1 c",
    "b h n 4",
    "b n 1",
    "(n b) c",
    "(n b) c",
    "c (b n)",
    "c (b n)",
    "b n c",
    "b n",
    "b n",
    "b c n",
    "b n c",
    "b n 1 c",
)


def _scores(x: Tensor) -> tuple[Tensor, ...]:
    """Products of tokens with tokens: both axes are token axes."""
    heads, fused = PLACES["b h n d"](x), PLACES["(b h) n d"](x)
    return (
        aten.matmul.default(x, x.transpose(1, 2)),
        aten.bmm.default(x, x.transpose(1, 2)),
        aten.matmul.default(heads, heads.transpose(-1, -2)),
        aten.bmm.default(fused, fused.transpose(1, 2)),
        aten.matmul.default(heads, heads.transpose(-1, -2)).reshape(-1, x.shape[1], x.shape[1]),
    )


def _written_out(x: Tensor, **sides: Tensor) -> Tensor:
    heads = PLACES["b h n d"](x)
    scores = aten.matmul.default(heads, heads.transpose(-1, -2)) * 0.5
    for name, side in sides.items():
        scores = scores.masked_fill(~side, -1e4) if name.startswith("mask") else scores + side
    probs = aten.softmax.int(scores, -1)
    return aten.matmul.default(probs, heads).transpose(1, 2).reshape(x.shape)


def _multihead(x: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """As nn.MultiheadAttention with weights: batch and heads fused, ``baddbmm``."""
    tokens = x.shape[1]
    fused = PLACES["n (b h) d"](x).transpose(0, 1)
    scores = aten.baddbmm.default(bias, fused, fused.transpose(-2, -1))
    probs = aten.softmax.int(scores, -1)
    values = aten.bmm.default(probs, fused)
    plain = aten.softmax.int(aten.bmm.default(fused, fused.transpose(-2, -1)), -1)
    return (
        values.transpose(0, 1).reshape(tokens, x.shape[0], x.shape[2]),
        probs.reshape(x.shape[0], 2, tokens, tokens).mean(1),
        aten.bmm.default(plain.to(torch.float64).to(torch.float32), fused),
        aten.matmul.default(plain.reshape(x.shape[0], 2, tokens, tokens), PLACES["b h n d"](x)),
    )


def _pool_by_attention(x: Tensor, probe: Tensor) -> tuple[Tensor, ...]:
    """A learned probe over the tokens: its softmax runs over what is left."""
    logits = aten.matmul.default(x, probe)
    probs = aten.softmax.int(logits, 1)
    scores = aten.softmax.int(aten.linear.default(x, probe.unsqueeze(0)), 1)
    return (
        aten.matmul.default(probs.unsqueeze(1), x),
        aten.matmul.default(scores.transpose(1, 2), x).squeeze(1),
        aten.bmm.default(x.transpose(1, 2), scores),
    )


_FORMS = {
    "bias [H, N, N]": {"bias": Side("h n n")},
    "bias [1, H, N, N]": {"bias": Side("1 h n n")},
    "bias [B, 1, N, N]": {"bias": Side("b 1 n n", "additive")},
    "bias [B, 1, 1, N]": {"bias": Side("b 1 1 n", "additive")},
    "mask [B, 1, N, N]": {"mask": Side("b 1 n n", "bool")},
    "mask [B, 1, 1, N]": {"mask": Side("b 1 1 n", "bool")},
    "mask [N, N]": {"mask": Side("n n", "bool")},
    "mask and bias": {"mask": Side("b 1 1 n", "bool"), "bias": Side("1 h n n"), "other": Side("n 1")},
}


def _letters(x: Tensor, w: Tensor, table: Tensor, plain: Tensor) -> tuple[Tensor, ...]:
    heads = PLACES["b h n d"](x)
    return (
        aten.einsum.default("bnc,ce->bne", [x, w]),
        aten.einsum.default("bnc,bnd->bncd", [x, x[..., :4]]),
        aten.einsum.default("bnc,nc->nb", [x, table]),
        aten.einsum.default("bn c, bnc -> bn", [x, x]),
        aten.einsum.default("bhnd,hd->bnh", [heads, plain]),
    )


def _attending(x: Tensor) -> Tensor:
    probs = aten.softmax.int(aten.einsum.default("bnc,bmc->bnm", [x, x]), -1)
    return aten.einsum.default("bnm,bmc->bnc", [probs, x])


CASES: list[Case] = [
    Case(
        "layers",
        _linear,
        _LINEAR,
        {"w": Side("c c", "weight"), "v": Side("d d", "weight"), "b": Side("c"), "one": Side("1 c", "weight")},
        dynamic=True,
    ),
    Case("token by token products", _scores, ("b n n", "b n n", "b h n n", "(b h) n n", "(b h) n n")),
    Case("attention written out", _written_out, ("b n c",), commutes=False, kinds=EVERY),
    *(
        Case(
            f"attention written out, {name}",
            _written_out,
            ("b n c",),
            sides,
            commutes=False,
            kinds=EVERY,
            dynamic=name == "mask and bias",
        )
        for name, sides in _FORMS.items()
    ),
    Case(
        "attention with batch and heads fused",
        _multihead,
        ("n b c", "b n p", "(b h) n d", "b h n d"),
        {"bias": Side("(b h) n n")},
        commutes=False,
        kinds=EVERY,
        dynamic=True,
    ),
    Case(
        "attention with batch and heads fused, shared bias",
        _multihead,
        ("n b c", "b n p", "(b h) n d", "b h n d"),
        {"bias": Side("1 n n")},
        commutes=False,
        kinds=EVERY,
    ),
    Case(
        "pooling by a probe",
        _pool_by_attention,
        ("b 1 c", "b c", "b c 1"),
        {"probe": Side("c")},
        commutes=False,
        kinds=EVERY,
    ),
    Case(
        "products with letters",
        _letters,
        ("b n e", "b n c d", "n b", "b n", "b n h"),
        {"w": Side("c e", "weight"), "table": Side("n c"), "plain": Side("h d")},
        kinds=(("drop",), ("shared",)),
        dynamic=True,
    ),
    Case("attention with letters", _attending, ("b n c",), commutes=False, dynamic=True),
]
