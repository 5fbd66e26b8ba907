"""Gathers, scatters and lookups."""

from __future__ import annotations

from typing import Any

import torch

from tests.lowering.cases.given import BOOL, INT, ROW, STATIC, X, Y, fixed, of
from tests.lowering.harness import Case, Input

aten = torch.ops.aten


def indexing_cases() -> list[Case]:
    return [
        Case("select", of(aten.select.int, 1, 0), (X,)),
        Case("select-last", of(aten.select.int, -1, -1), (X,)),
        *(
            Case(f"slice_scatter-{i}", of(aten.slice_scatter.default, 2, *span), (X, Input(("B", "N", width))))
            for i, (width, span) in enumerate([(2, (1, 3)), (2, (0, 2)), (3, (-3, 2**63 - 1)), (4, ()), (1, (3, 4))])
        ),
        Case("copy", of(aten.copy.default), (X, Y)),
        Case("copy-wide", of(aten.copy.default), (X, ROW)),
        Case("copy-cast", of(aten.copy.default), (X, Input(("B", "N", 4), "int"))),
        Case("slice", of(aten.slice.Tensor, 1, 1, 3), (X,)),
        Case("slice-step", of(aten.slice.Tensor, 1, 1, 2**63 - 1, 2), (X,)),
        Case("slice-negative", of(aten.slice.Tensor, 1, -3, -1), (X,)),
        Case("slice-size", lambda b, x: b.slice(x, 1, 1, b.sub_sizes(b.size(x, 1), 1)), (X,)),
        Case("slice-all", of(aten.slice.Tensor, 1, 0, 2**63 - 1), (X,)),
        Case("embedding", of(aten.embedding.default), (Input((7, 4)), Input(("B", "N"), "index", 7))),
        Case(
            "embedding-stored",
            lambda b, i: b.call(aten.embedding.default, b.constant("e", fixed(7, 4)), i),
            (Input(("B", "N"), "index", 7),),
        ),
        Case("narrow", lambda b, x: b.call(aten.narrow.default, x, 1, 1, 2), (STATIC,)),
        Case("narrow-size", _narrowed, (X, Input((2, "N", 3)))),
        Case("index_copy", _copied, (Input(("B", 2, 70, 3)), Input(("B", 2, "N", 3))), half=True),
        Case(
            "index_select", lambda b, x, i: b.call(aten.index_select.default, x, 1, i), (X, Input((3,), "index", "N"))
        ),
        Case("gather", lambda b, x, i: b.gather(x, 1, i), (Input(("B", "N")), Input(("B", 3), "index", "N"))),
        Case("gather-fewer", lambda b, x, i: b.gather(x, 1, i), (X, Input(("B", 3, 2), "index", "N"))),
        Case(
            "scatter",
            lambda b, x, i, s: b.scatter(x, 1, i, s),
            (Input(("B", "N")), Input(("B", 3), "unique", "N"), Input(("B", 3))),
        ),
        Case(
            "scatter-value",
            lambda b, x, i: b.call(aten.scatter.value, x, 1, i, 2.5),
            (Input(("B", "N")), Input(("B", 3), "index", "N")),
        ),
        Case("index-one", lambda b, x, i: b.call(aten.index.Tensor, x, [None, i]), (X, Input((3,), "index", "N"))),
        Case(
            "index-grid",
            lambda b, x, i: b.call(aten.index.Tensor, x, [i]),
            (Input(("N", 4)), Input((3, 2), "index", "N")),
        ),
        Case(
            "index-pairs",
            lambda b, x, i, j: b.call(aten.index.Tensor, x, [i, j]),
            (Input((3, "N", 4)), Input((3, 1), "index", 3), Input((2,), "index", "N")),
        ),
        Case("pad", of(aten.pad.default, [1, 2, 0, 1]), (X,)),
        Case("pad-value", of(aten.pad.default, [1, 0], "constant", -2.5), (X,), half=True),
        Case("pad-int", of(aten.pad.default, [1, 0], "constant", 3.0), (INT,)),
        Case("pad-bool", of(aten.pad.default, [1, 0], "constant", 1.0), (BOOL,)),
        Case("pad-crop", of(aten.pad.default, [-1, 1]), (STATIC,)),
        Case("pad-reflect", of(aten.pad.default, [1, 2], "reflect"), (X,)),
        Case("pad-replicate", of(aten.pad.default, [1, 2], "replicate"), (X,)),
        Case("constant_pad_nd", of(aten.constant_pad_nd.default, [2, 0], 1), (X,)),
        Case("flip", of(aten.flip.default, [1, -1]), (X,)),
        Case("roll", of(aten.roll.default, [1, -2], [1, 2]), (X,)),
        Case("roll-around", of(aten.roll.default, [11, -7], [1, 2]), (X,)),
        Case("diagonal", of(aten.diagonal.default, 0, 1, 2), (Input(("B", 5, 5)),)),
        Case(
            "diagonal-symbolic",
            lambda b, x: b.call(aten.diagonal.default, b.matmul(x, b.transpose(x, 1, 2)), 0, -2, -1),
            (X,),
        ),
    ]


def _narrowed(b: Any, x: Any, y: Any) -> Any:
    """As long as another tensor."""
    return b.call(aten.narrow.default, b.cat([x, x], 1), 1, 0, b.size(y, 1))


def _copied(b: Any, x: Any, y: Any) -> Any:
    """Every second place, from a size on."""
    place = b.arange(b.mul_sizes(b.size(y, 2), 2), x, step=2)
    return b.call(aten.index_copy.default, x, 2, b.call(aten.add.Scalar, place, b.size(y, 0)), y)
