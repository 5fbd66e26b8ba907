"""Shape operations."""

from __future__ import annotations

import operator
from typing import Any

import torch

from tests.lowering.cases.given import INT, STATIC, X, Y, of, parts
from tests.lowering.harness import Case, Input

aten = torch.ops.aten


def shapes_cases() -> list[Case]:
    def merged(b: Any, x: Any) -> Any:
        return b.call(aten.reshape.default, x, [b.mul_sizes(b.size(x, 0), b.size(x, 1)), 4])

    def heads(b: Any, x: Any) -> Any:
        return b.call(aten.view.default, x, [b.size(x, 0), b.size(x, 1), 2, 2])

    def swapped(b: Any, x: Any) -> Any:
        return b.call(aten.reshape.default, x, [b.size(x, 1), b.size(x, 0), 4])

    def split_rows(b: Any, x: Any) -> Any:
        half = b.floordiv_sizes(b.size(x, 1), 2)
        made = b.call(aten.split_with_sizes.default, x, [half, b.sub_sizes(b.size(x, 1), half)], 1)
        return b.call(operator.getitem, made, 0), b.call(operator.getitem, made, 1)

    def widened(b: Any, x: Any) -> Any:
        return b.call(aten.expand.default, x, [b.size(x, 0), b.add_sizes(b.size(x, 0), 2), 4])

    return [
        Case("reshape-merged", merged, (X,)),
        Case("reshape-heads", heads, (X,)),
        Case("reshape-swapped", swapped, (X,)),
        Case("reshape-minus", of(aten.reshape.default, [-1, 4]), (X,)),
        Case("view", of(aten.view.default, [4, -1]), (STATIC,)),
        Case("_unsafe_view", of(aten._unsafe_view.default, [6, 4]), (STATIC,)),
        Case("flatten", of(aten.flatten.using_ints, 1), (X,)),
        Case("flatten-front", of(aten.flatten.using_ints, 0, 1), (X,)),
        Case("unflatten", of(aten.unflatten.int, 2, [2, 2]), (X,)),
        Case("permute", of(aten.permute.default, [2, 0, -2]), (X,)),
        Case("transpose", of(aten.transpose.int, -1, 0), (X,)),
        Case("transposes", lambda b, x: b.transpose(b.permute(x, [2, 0, 1]), 0, 1), (X,)),
        Case("t", of(aten.t.default), (Input(("B", 4)),)),
        Case("unsqueeze", of(aten.unsqueeze.default, -1), (X,)),
        Case("squeeze", of(aten.squeeze.default), (Input(("N", 1, 4, 1)),)),
        Case("squeeze.dim", of(aten.squeeze.dim, 1), (Input(("N", 1, 4, 1)),)),
        Case("squeeze.dim-not", of(aten.squeeze.dim, 2), (Input(("N", 1, 4, 1)),)),
        Case("squeeze.dims", of(aten.squeeze.dims, [1, 3]), (Input(("N", 1, 4, 1)),)),
        Case("expand", lambda b, x: b.expand(x, [b.size(x, 0), 5, -1]), (Input(("B", 1, 4)),)),
        Case("expand-lead", lambda b, x: b.expand(x, [3, -1, 4]), (Input(("N", 4)),)),
        Case("expand-size", widened, (Input(("B", 1, 4)),)),
        Case("expand-same", lambda b, x: b.expand(x, [-1, -1, -1]), (X,)),
        Case("repeat", of(aten.repeat.default, [2, 1, 3]), (X,)),
        Case("repeat-lead", of(aten.repeat.default, [2, 1, 1, 1]), (X,)),
        Case("repeat-size", lambda b, x, y: b.call(aten.repeat.default, x, [b.size(y, 0), 1]), (Input((1, 4)), X)),
        Case("cat", lambda b, x, y: b.call(aten.cat.default, [x, y, x], 1), (X, Input(("B", 2, 4))), half=True),
        Case("cat-mixed", lambda b, x, y: b.call(aten.cat.default, [x, y], -1), (INT, Input(("B", 3)))),
        Case("cat-empty", lambda b, x, y: b.call(aten.cat.default, [y, x], 1), (Input((3, "N", 4)), Input((3, 0, 4)))),
        Case("stack", lambda b, x, y: b.call(aten.stack.default, [x, y], -1), (X, Y)),
        Case("split_with_sizes", parts(aten.split_with_sizes.default, 2, [1, 3], -1), (X,)),
        Case("split-symbolic", split_rows, (X,)),
        Case("split.sizes", parts(aten.split.sizes, 3, [1, 1, 2], 2), (X,)),
        Case("split.Tensor", parts(aten.split.Tensor, 2, 3, 2), (X,)),
        Case("split-one", parts(aten.split.Tensor, 1, 4, 2), (X,)),
        Case("chunk", parts(aten.chunk.default, 3, 3, 1), (Input(("B", 8)),)),
        Case("unbind", parts(aten.unbind.int, 4, -1), (X,)),
        Case("arange", lambda b, x: b.call(aten.add.Tensor, x, b.call(aten.arange.default, 4)), (X,)),
        Case("arange-size", lambda b, x: b.call(aten.arange.default, b.size(x, 1)), (X,)),
        Case("arange.start", lambda b, x: b.call(aten.arange.start, 2, b.add_sizes(b.size(x, 1), 2)), (X,)),
        Case("arange-int32", lambda b, x: b.call(aten.arange.start, 1, b.size(x, 1), dtype=torch.int32), (X,)),
        Case("arange.step", lambda b, x: b.call(aten.arange.start_step, 0, b.size(x, 1), 2), (X,)),
        Case("arange-float", lambda b, x: b.add(x, b.call(aten.arange.start_step, 0.0, 2.0, 0.5)), (X,)),
        Case("arange-float-size", lambda b, x: b.call(aten.arange.start_step, 0.5, b.size(x, 1), 0.5), (X,)),
        Case("full", lambda b, x: b.call(aten.full.default, [b.size(x, 0), 3], 1.5), (X,)),
        Case("full-static", lambda b, x: b.mul(x, b.call(aten.full.default, [1, 4], 2)), (X,)),
        Case("full-scalar", lambda b, x: b.mul(x, b.call(aten.full.default, [], 2.5)), (X,)),
        Case("full-bool", lambda b, x: b.call(aten.full.default, [b.size(x, 1)], True), (X,)),
        Case(
            "full-extreme", lambda b, x: b.add(x, b.call(aten.full.default, [1], 2**62 + 1, dtype=torch.int64)), (INT,)
        ),
        Case("full-large", lambda b, x: b.add(x, b.call(aten.full.default, [70, 1, 70, 1], 2.0)), (Input((4,)),)),
        Case("new_full", lambda b, x: b.call(aten.new_full.default, x, [2, b.size(x, 1)], -3), (INT,)),
        Case("zeros", lambda b, x: b.call(aten.zeros.default, [b.size(x, 1), 2]), (X,)),
        Case("ones", lambda b, x: b.call(aten.ones.default, [b.size(x, 1)], dtype=torch.int64), (X,)),
        Case("new_zeros", lambda b, x: b.call(aten.new_zeros.default, x, [b.size(x, 0), 1]), (X,), half=True),
        Case("new_ones", lambda b, x: b.call(aten.new_ones.default, x, [b.size(x, 0)], dtype=torch.bool), (X,)),
        Case("zeros_like", of(aten.zeros_like.default), (X,)),
        Case("zeros_like-static", of(aten.zeros_like.default), (Input((70, 80)),)),
        Case("ones_like", of(aten.ones_like.default, dtype=torch.int64), (X,)),
        Case("full_like", of(aten.full_like.default, 0.25), (X,), half=True),
    ]
