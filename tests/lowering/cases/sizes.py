"""Arithmetic on sizes."""

from __future__ import annotations

import operator
from typing import Any

import torch

from tests.lowering.cases.given import X
from tests.lowering.harness import Body, Case

aten = torch.ops.aten


def sizes_cases() -> list[Case]:
    def rows(make: Any) -> Body:
        """The size that ``make`` computes, as the length of a range."""
        return lambda b, x: b.call(aten.arange.default, make(b, b.size(x, 0), b.size(x, 1)))

    def numel(b: Any, x: Any) -> Any:
        return b.call(aten.arange.default, b.call(aten.sym_numel.default, x))

    def call(target: Any) -> Body:
        return rows(lambda b, first, second: b.call(target, second, first))

    def rounded_up(b: Any, first: Any, second: Any) -> Any:
        # -((-n) // 4): floor division of a negative number
        del first
        return b.call(operator.neg, b.call(operator.floordiv, b.call(operator.neg, second), 4))

    def wrapped(b: Any, first: Any, second: Any) -> Any:
        del first
        return b.call(operator.mod, b.call(operator.sub, 0, second), 5)

    return [
        Case("size-add", call(operator.add), (X,)),
        Case("size-mul", call(operator.mul), (X,)),
        Case("size-sub", rows(lambda b, first, second: b.call(operator.sub, second, 1)), (X,)),
        Case("size-floordiv", rows(lambda b, first, second: b.call(operator.floordiv, second, 2)), (X,)),
        Case("size-mod", rows(lambda b, first, second: b.call(operator.mod, second, 4)), (X,)),
        Case("size-neg", rows(rounded_up), (X,)),
        Case("size-mod-negative", rows(wrapped), (X,)),
        Case("size-min", call(torch.sym_min), (X,)),
        Case("size-max", call(torch.sym_max), (X,)),
        Case("size-numel", numel, (X,)),
        Case("size-value", lambda b, x: b.call(aten.mul.Tensor, x, b.size(x, 1)), (X,)),
    ]
