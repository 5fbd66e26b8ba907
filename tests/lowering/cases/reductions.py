"""Reductions, sorting and choosing."""

from __future__ import annotations

import operator
from typing import Any

import torch

from tests.lowering.cases.given import BOOL, INT, X, of, parts
from tests.lowering.harness import Case, Input

aten = torch.ops.aten


def _topk_half(b: Any, x: Any) -> Any:
    made = b.call(aten.topk.default, x, b.floordiv_sizes(b.add_sizes(b.size(x, 1), 1), 2), 1)
    return b.call(operator.getitem, made, 0), b.call(operator.getitem, made, 1)


def reductions_cases() -> list[Case]:
    cases = []
    for name, overload, dims in (
        ("mean", "dim", ([1], [-1, 0], None)),
        ("sum", "dim_IntList", ([1], [-1, 0], [])),
        ("amax", "default", ([1], [-1, 0])),
        ("amin", "default", ([-2],)),
    ):
        target = getattr(getattr(aten, name), overload)
        for axes in dims:
            for keep in (False, True):
                cases.append(Case(f"{name}-{axes}-{keep}", of(target, axes, keep), (X,), half=True))
    for name in ("mean", "sum", "max", "min"):
        cases.append(Case(f"{name}-all", of(getattr(aten, name).default), (X,)))
    for name in ("max", "min"):
        target = getattr(aten, name).dim
        cases += [
            Case(f"{name}.dim", parts(target, 2, 1), (X,)),
            Case(f"{name}.dim-keep", parts(target, 2, -1, True), (X,)),
            Case(f"{name}.dim-int", parts(target, 2, 1), (Input(("B", "N"), "unique", "N"),)),
        ]
    for name in ("argmax", "argmin"):
        target = getattr(aten, name).default
        cases += [
            Case(f"{name}", of(target, 1), (X,), half=True),
            Case(f"{name}-keep", of(target, -1, True), (X,)),
            Case(f"{name}-flat", of(target), (X,)),
            Case(f"{name}-flat-keep", of(target, None, True), (X,)),
            Case(f"{name}-int", of(target, 1), (Input(("B", "N"), "unique", "N"),)),
        ]
    for name in ("any", "all"):
        packet = getattr(aten, name)
        cases += [
            Case(f"{name}.dim", of(packet.dim, 1), (BOOL,)),
            Case(f"{name}.dim-keep", of(packet.dim, -1, True), (INT,)),
            Case(f"{name}.dim-float", of(packet.dim, 1), (Input(("B", "N"), "bool"),)),
            Case(
                f"{name}.dim-halves", lambda b, x, p=packet: b.call(p.dim, b.call(aten.mul.Tensor, x, 0.1), 1), (INT,)
            ),
            Case(f"{name}.default", of(packet.default), (BOOL,)),
        ]
    return [
        *cases,
        Case("sum-bool", of(aten.sum.dim_IntList, [1]), (BOOL,)),
        Case("sum-int", of(aten.sum.dim_IntList, [-1], True), (INT,)),
        Case("sum-dtype", of(aten.sum.default, dtype=torch.float32), (INT,)),
        Case("amax-int", of(aten.amax.default, [1]), (INT,)),
        Case("amax-bool", of(aten.amax.default, [1]), (BOOL,)),
        Case("cumsum", of(aten.cumsum.default, 1), (X,)),
        Case("cumsum-int", of(aten.cumsum.default, -1), (INT,)),
        Case("cumsum-bool", of(aten.cumsum.default, -1), (BOOL,)),
        Case("sort", parts(aten.sort.default, 2), (X,)),
        Case("sort-descending", parts(aten.sort.default, 2, 1, True), (X,)),
        Case("sort-int", parts(aten.sort.default, 2, 1), (Input(("B", "N"), "unique", "N"),)),
        Case("topk", parts(aten.topk.default, 2, 3), (X,), half=True),
        Case("topk-smallest", parts(aten.topk.default, 2, 2, 1, False), (X,)),
        Case("topk-size", lambda b, x: _topk_half(b, x), (X,)),
        Case("norm", of(aten.linalg_vector_norm.default, 2, [-1], True), (X,), half=True),
        Case("norm-1", of(aten.linalg_vector_norm.default, 1, [1]), (X,)),
        Case("norm-all", of(aten.linalg_vector_norm.default), (X,)),
    ]
