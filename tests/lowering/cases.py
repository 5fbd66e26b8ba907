"""A case, or several, for every operation that can be lowered."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import Tensor

import tokcc.kernels
from tests.lowering.harness import Body, Case, Input

__all__ = ["CASES"]

assert tokcc.kernels is not None
aten, ops = torch.ops.aten, torch.ops.tokcc

X = Input(("B", "N", 4))
Y = Input(("B", "N", 4))
ROW = Input((4,))
POSITIVE = Input(("B", "N", 4), "positive")
INT, INT2, NONZERO = Input(("B", "N"), "int"), Input(("B", 1), "int"), Input(("B", "N"), "nonzero")
BOOL, BOOL2 = Input(("B", "N"), "bool"), Input(("B", 1), "bool")
STATIC = Input((2, 3, 4))


def fixed(*shape: int, seed: int = 0) -> Tensor:
    """A parameter."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def of(target: Any, *args: Any, **kwargs: Any) -> Body:
    """``target(*inputs, *args)``."""
    return lambda b, *handles: b.call(target, *handles, *args, **kwargs)


def parts(target: Any, count: int, *args: Any, **kwargs: Any) -> Body:
    """All results of an operation with several."""

    def body(b: Any, *handles: Any) -> tuple[Any, ...]:
        made = b.call(target, *handles, *args, **kwargs)
        return tuple(b.call(operator.getitem, made, i) for i in range(count))

    return body


def weighted(target: Any, *shapes: tuple[int, ...], **kwargs: Any) -> Body:
    """``target(x, *parameters)``: weights that are stored, not fed."""

    def body(b: Any, x: Any) -> Any:
        own = [b.constant(f"w{i}", fixed(*shape, seed=i).to(b.dtype(x))) for i, shape in enumerate(shapes)]
        return b.call(target, x, *own, **kwargs)

    return body


def _unary() -> list[Case]:
    cases = []
    for name in ("neg", "abs", "exp", "erf", "tanh", "sigmoid", "relu", "cos", "sin", "sign", "floor", "ceil", "round"):
        cases.append(Case(name, of(getattr(aten, name).default), (X,), half=name not in ("erf",)))
    for name in ("log", "sqrt", "reciprocal", "rsqrt"):
        cases.append(Case(name, of(getattr(aten, name).default), (POSITIVE,), half=True))
    for name in ("neg", "abs", "sign", "relu", "floor", "ceil", "round"):
        cases.append(Case(f"{name}-int", of(getattr(aten, name).default), (INT,)))
    for name in (
        "silu",
        "expm1",
        "square",
        "gelu",
        "leaky_relu",
        "elu",
        "hardswish",
        "hardsigmoid",
        "hardtanh",
        "softplus",
    ):
        half = name not in ("hardsigmoid", "expm1", "gelu")
        cases.append(Case(name, of(getattr(aten, name).default), (X,), half=half))
    cases += [
        Case("exp-int", of(aten.exp.default), (INT,)),
        Case("gelu-tanh", of(aten.gelu.default, approximate="tanh"), (X,)),
        Case("gelu-20", of(aten.gelu.default), (X,), opset=20),
        Case("gelu-tanh-20", of(aten.gelu.default, approximate="tanh"), (X,), opset=20),
        Case("leaky_relu-slope", of(aten.leaky_relu.default, 0.3), (X,)),
        Case("elu-alpha", of(aten.elu.default, 0.5), (X,)),
        Case("hardtanh-bounds", of(aten.hardtanh.default, -0.2, 0.4), (X,)),
        Case("isnan", lambda b, x: b.call(aten.isnan.default, b.call(aten.log.default, x)), (X,), half=True),
        Case("isnan-int", of(aten.isnan.default), (INT,)),
        Case(
            "isinf",
            lambda b, x: b.call(aten.isinf.default, b.call(aten.log.default, b.call(aten.relu.default, x))),
            (X,),
            half=True,
        ),
        Case("isinf-int", of(aten.isinf.default), (INT,)),
        Case("logical_not", of(aten.logical_not.default), (BOOL,)),
        Case("logical_not-float", of(aten.logical_not.default), (X,)),
        Case("bitwise_not", of(aten.bitwise_not.default), (BOOL,)),
        Case("bitwise_not-int", of(aten.bitwise_not.default), (INT,)),
    ]
    return cases


def _binary() -> list[Case]:
    cases = []
    for name in ("add", "sub", "mul", "div"):
        tensor, scalar = getattr(aten, name).Tensor, getattr(aten, name).Scalar
        cases += [
            Case(f"{name}.Tensor", of(tensor), (X, ROW), half=True),
            Case(f"{name}.Tensor-mixed", of(tensor), (X, Input(("N", 4), "nonzero"))),
            Case(f"{name}.Tensor-int", of(tensor), (INT, NONZERO)),
            Case(f"{name}.Scalar", of(scalar, 3), (X,), half=True),
            Case(f"{name}.Scalar-int", of(scalar, 3), (INT,)),
            Case(f"{name}.Scalar-float", of(scalar, 0.5), (INT,)),
        ]
    for name in ("eq", "ne", "lt", "le", "gt", "ge"):
        tensor, scalar = getattr(aten, name).Tensor, getattr(aten, name).Scalar
        cases += [
            Case(f"{name}.Tensor", of(tensor), (X, ROW), half=True),
            Case(f"{name}.Tensor-int", of(tensor), (INT, INT2)),
            Case(f"{name}.Tensor-bool", of(tensor), (BOOL, BOOL2)),
            Case(f"{name}.Tensor-mixed", of(tensor), (INT, Input(("B", "N")))),
            Case(f"{name}.Scalar", of(scalar, 0), (X,)),
            Case(f"{name}.Scalar-int", of(scalar, 2), (INT,)),
            Case(f"{name}.Scalar-float", of(scalar, 0.5), (INT,)),
            Case(f"{name}.Scalar-bool", of(scalar, 1), (BOOL,)),
        ]
    for name in ("and", "or", "xor"):
        for target in (getattr(aten, f"__{name}__").Tensor, getattr(aten, f"bitwise_{name}").Tensor):
            cases.append(Case(f"{target}", of(target), (BOOL, BOOL2)))
        target = getattr(aten, f"logical_{name}").default
        cases += [Case(f"{target}", of(target), (BOOL, BOOL2)), Case(f"{target}-int", of(target), (INT, INT2))]
    for mode in (None, "floor", "trunc"):
        cases += [
            Case(f"div-{mode}", of(aten.div.Tensor_mode, rounding_mode=mode), (X, Y)),
            Case(f"div-{mode}-int", of(aten.div.Tensor_mode, rounding_mode=mode), (INT, NONZERO)),
            Case(f"div-{mode}-scalar", of(aten.div.Scalar_mode, -4, rounding_mode=mode), (INT,)),
        ]
    return [
        *cases,
        Case("add-alpha", lambda b, x, y: b.call(aten.add.Tensor, x, y, alpha=3), (X, Y)),
        Case("add.Scalar-alpha", of(aten.add.Scalar, 2, 3), (X,)),
        Case("sub-alpha", lambda b, x, y: b.call(aten.sub.Tensor, x, y, alpha=2), (INT, INT2)),
        Case("rsub.Scalar", of(aten.rsub.Scalar, 1.5), (X,), half=True),
        Case("rsub.Scalar-alpha", of(aten.rsub.Scalar, 1.5, 2), (X,)),
        Case("rsub.Tensor", of(aten.rsub.Tensor), (X, ROW)),
        Case("rsub.Tensor-alpha", lambda b, x, y: b.call(aten.rsub.Tensor, x, y, alpha=2), (X, ROW)),
        Case("maximum", of(aten.maximum.default), (X, ROW), half=True),
        Case("max.other", of(aten.max.other), (INT, Input(("B", "N")))),
        Case("min.other", of(aten.min.other), (X, ROW)),
        Case("minimum-int", of(aten.minimum.default), (INT, INT2)),
        Case("minimum", of(aten.minimum.default), (X, ROW), half=True),
        Case("floor_divide", of(aten.floor_divide.default), (INT, NONZERO)),
        Case("floor_divide-float", of(aten.floor_divide.default), (X, Y)),
        Case("remainder.Tensor", of(aten.remainder.Tensor), (INT, NONZERO)),
        Case("remainder.Tensor-float", of(aten.remainder.Tensor), (X, POSITIVE)),
        Case("remainder.Scalar", of(aten.remainder.Scalar, -4), (INT,)),
        Case("remainder.Scalar-float", of(aten.remainder.Scalar, 0.75), (X,)),
        Case("pow", of(aten.pow.Tensor_Scalar, 3), (X,)),
        Case("pow-2", of(aten.pow.Tensor_Scalar, 2), (INT,)),
        Case("pow-half", of(aten.pow.Tensor_Scalar, 0.5), (POSITIVE,)),
        Case("pow-minus-half", of(aten.pow.Tensor_Scalar, -0.5), (POSITIVE,), half=True),
        Case("pow-tensor", of(aten.pow.Tensor_Tensor), (POSITIVE, ROW)),
        Case("where", of(aten.where.self), (Input(("B", "N", 1), "bool"), X, Y), half=True),
        Case("where-mixed", of(aten.where.self), (BOOL, INT, Input(("B", 1)))),
        Case(
            "where.ScalarOther", lambda b, c, x: b.call(aten.where.ScalarOther, c, x, -1.5), (BOOL, Input(("B", "N")))
        ),
        Case("where.ScalarSelf", lambda b, c, x: b.call(aten.where.ScalarSelf, c, 2, x), (BOOL, INT)),
        Case("where-bool", of(aten.where.self), (BOOL, BOOL, Input(("B", 1), "bool"))),
        Case("where.Scalar", of(aten.where.Scalar, 1.0, 0.0), (BOOL,)),
        Case("where.Scalar-int", of(aten.where.Scalar, 1, 0), (BOOL,)),
        Case("masked_fill.Scalar", of(aten.masked_fill.Scalar, float("-inf")), (X, Input(("B", "N", 1), "bool"))),
        Case(
            "masked_fill.Tensor",
            lambda b, x, m: b.call(aten.masked_fill.Tensor, x, m, b.constant("v", torch.tensor(-7))),
            (INT, BOOL),
        ),
        Case("clamp", of(aten.clamp.default, -0.3, 0.4), (X,), half=True),
        Case("clamp-low", of(aten.clamp.default, 2), (INT,)),
        Case("clamp-high", of(aten.clamp.default, None, 0.25), (X,)),
        Case("clamp-inf", of(aten.clamp.default, float("-inf"), float("inf")), (X,)),
        Case("clamp.Tensor", of(aten.clamp.Tensor), (X, ROW, POSITIVE)),
        Case("clamp_min", of(aten.clamp_min.default, 0.1), (X,)),
        Case("clamp_max", of(aten.clamp_max.default, 3), (INT,)),
    ]


def _casts() -> list[Case]:
    kinds = {"float": X, "int": INT, "bool": BOOL}
    cases = []
    for name, given in kinds.items():
        for dtype in (torch.float32, torch.float16, torch.float64, torch.int64, torch.int32, torch.bool):
            short = str(dtype).removeprefix("torch.")
            cases.append(Case(f"_to_copy-{name}-{short}", of(aten._to_copy.default, dtype=dtype), (given,)))
    same = (aten.clone, aten.contiguous, aten.alias, aten.detach, aten.lift_fresh_copy)
    return [
        *cases,
        *(Case(f"{packet.default}", of(packet.default), (X,)) for packet in same),
        Case("to.dtype", of(aten.to.dtype, torch.int64), (X,)),
        Case("type_as", of(aten.type_as.default), (INT, X)),
        Case("dropout", of(aten.dropout.default, 0.5, False), (X,)),
    ]


def _reductions() -> list[Case]:
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


def _topk_half(b: Any, x: Any) -> Any:
    made = b.call(aten.topk.default, x, b.floordiv_sizes(b.add_sizes(b.size(x, 1), 1), 2), 1)
    return b.call(operator.getitem, made, 0), b.call(operator.getitem, made, 1)


def _shapes() -> list[Case]:
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


def _sizes() -> list[Case]:
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


def _indexing() -> list[Case]:
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


def _algebra() -> list[Case]:
    q, k = Input(("B", 2, "N", 4)), Input(("B", 2, "M", 4))
    image, line = Input(("B", 4, 9, 9)), Input(("B", 4, 9))
    sdpa = aten.scaled_dot_product_attention.default
    attend = of(sdpa)

    def masked(b: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        return b.call(sdpa, query, key, value, mask, scale=0.3)

    def bounded(b: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        added = b.where(mask, 0.0, -1e9)
        return b.call(sdpa, query, key, value, added)

    return [
        Case("linear", weighted(aten.linear.default, (5, 4), (5,)), (X,), half=True),
        Case("linear-no-bias", weighted(aten.linear.default, (5, 4)), (X,)),
        Case("linear-matrix", weighted(aten.linear.default, (5, 4), (5,)), (Input(("B", 4)),)),
        Case("linear-matrix-no-bias", weighted(aten.linear.default, (5, 4)), (Input(("B", 4)),)),
        Case("linear-fed", of(aten.linear.default), (X, Input((5, 4)), Input((5,)))),
        Case("matmul", of(aten.matmul.default), (X, Input(("B", 4, "M"))), half=True),
        Case("matmul-vector", of(aten.matmul.default), (X, ROW)),
        Case("mm", of(aten.mm.default), (Input(("N", 4)), Input((4, "M")))),
        Case("bmm", of(aten.bmm.default), (X, Input(("B", 4, 3)))),
        Case("addmm", of(aten.addmm.default), (ROW, Input(("N", 3)), Input((3, 4)))),
        Case("addmm-scaled", of(aten.addmm.default, beta=0.5, alpha=2), (ROW, Input(("N", 3)), Input((3, 4)))),
        Case("addmm-none", of(aten.addmm.default, beta=0), (ROW, Input(("N", 3)), Input((3, 4)))),
        Case("baddbmm", of(aten.baddbmm.default, beta=2, alpha=3), (Input(("B", "N", 2)), X, Input(("B", 4, 2)))),
        Case(
            "layer_norm",
            lambda b, x: b.call(
                aten.layer_norm.default,
                x,
                [4],
                b.constant("w", fixed(4).to(b.dtype(x))),
                b.constant("v", fixed(4, seed=1).to(b.dtype(x))),
                1e-3,
            ),
            (X,),
            half=True,
        ),
        Case("layer_norm-plain", of(aten.layer_norm.default, [4]), (X,)),
        Case("layer_norm-two", of(aten.layer_norm.default, [3, 4]), (Input(("B", 3, 4)),)),
        Case("rms_norm", lambda b, x: b.call(aten.rms_norm.default, x, [4], b.constant("w", fixed(4)), 1e-5), (X,)),
        Case("rms_norm-plain", of(aten.rms_norm.default, [4]), (X,)),
        Case(
            "batch_norm",
            lambda b, x: b.call(
                aten.batch_norm.default,
                x,
                b.constant("w", fixed(4)),
                b.constant("v", fixed(4, seed=1)),
                b.constant("m", fixed(4, seed=2)),
                b.constant("s", fixed(4, seed=3).abs() + 0.5),
                False,
                0.1,
                1e-5,
                False,
            ),
            (image,),
        ),
        Case(
            "batch_norm-plain",
            lambda b, x: b.call(
                aten.batch_norm.default,
                x,
                None,
                None,
                b.constant("m", fixed(4)),
                b.constant("s", fixed(4).abs() + 0.5),
                False,
                0.1,
                1e-3,
                False,
            ),
            (line,),
        ),
        Case(
            "group_norm",
            lambda b, x: b.call(
                aten.group_norm.default, x, 2, b.constant("w", fixed(4)), b.constant("v", fixed(4, seed=1))
            ),
            (image,),
        ),
        Case("group_norm-plain", of(aten.group_norm.default, 4), (line,)),
        Case("softmax", of(aten.softmax.int, -1), (X,), half=True),
        Case("softmax-dtype", of(aten.softmax.int, 1, torch.float32), (X,), half=True),
        Case("_softmax", of(aten._softmax.default, 1, False), (X,)),
        Case("log_softmax", of(aten.log_softmax.int, 1), (X,), half=True),
        Case("_log_softmax", of(aten._log_softmax.default, -1, False), (X,)),
        Case("conv1d", weighted(aten.conv1d.default, (6, 4, 3), (6,), stride=[2], padding=[1]), (line,)),
        Case("conv1d-groups", weighted(aten.conv1d.default, (4, 1, 3), groups=4, dilation=[2]), (line,)),
        Case("conv1d-same", weighted(aten.conv1d.padding, (6, 4, 4), (6,), padding="same"), (line,)),
        Case("conv1d-valid", weighted(aten.conv1d.padding, (6, 4, 3), (6,), padding="valid"), (line,)),
        Case("conv2d", weighted(aten.conv2d.default, (6, 4, 3, 3), (6,), stride=[3, 2], padding=[1, 0]), (image,)),
        Case("conv2d-same", weighted(aten.conv2d.padding, (6, 4, 3, 4), (6,), padding="same"), (image,)),
        Case(
            "conv2d-same-dilated",
            weighted(aten.conv2d.padding, (6, 4, 3, 3), (6,), padding="same", dilation=[2, 2]),
            (image,),
        ),
        Case(
            "conv3d",
            weighted(aten.conv3d.default, (6, 2, 2, 3, 3), (6,), stride=[2, 3, 3]),
            (Input(("B", 2, 4, 6, 6)),),
        ),
        Case(
            "convolution",
            lambda b, x: b.call(
                aten.convolution.default,
                x,
                b.constant("w", fixed(6, 4, 3, 3)),
                None,
                [2, 2],
                [1, 1],
                [1, 1],
                False,
                [0, 0],
                1,
            ),
            (image,),
        ),
        Case("avg_pool1d", of(aten.avg_pool1d.default, [2]), (line,)),
        Case("avg_pool2d", of(aten.avg_pool2d.default, [3, 3], [2, 2], [1, 1]), (image,)),
        Case("avg_pool2d-exclude", of(aten.avg_pool2d.default, [3, 3], [2, 2], [1, 1], False, False), (image,)),
        *(
            Case(
                f"grid_sampler-{mode}{padding}{int(corners)}",
                of(aten.grid_sampler.default, mode, padding, corners),
                (image, Input(("B", "N", 3, 2))),
            )
            for mode, padding, corners in ((0, 0, False), (0, 1, True), (0, 2, False), (1, 0, False), (2, 0, True))
        ),
        Case("max_pool2d", of(aten.max_pool2d.default, [3, 3], [2, 2], [1, 1]), (image,)),
        Case("max_pool2d-dilated", of(aten.max_pool2d.default, [2, 2], [1, 1], [0, 0], [2, 2]), (image,)),
        Case("adaptive_avg_pool1d", of(aten.adaptive_avg_pool1d.default, [1]), (line,)),
        Case("adaptive_avg_pool2d", of(aten.adaptive_avg_pool2d.default, [1, 1]), (image,)),
        Case("sdpa", attend, (q, k, k), half=True),
        Case("sdpa-bool", masked, (q, k, k, Input(("B", 1, 1, "M"), "bool"))),
        Case("sdpa-bool-rows", masked, (q, k, k, Input(("B", 1, "N", "M"), "bool"))),
        Case("sdpa-float", masked, (q, k, k, Input(("N", "M")))),
        Case("sdpa-bounded", bounded, (q, k, k, Input(("B", 1, 1, "M"), "bool"))),
        Case("sdpa-causal", lambda b, x, y, z: b.call(sdpa, x, y, z, None, 0.0, True), (q, k, k)),
        Case("sdpa-no-heads", attend, (X, X, X)),
        Case("sdpa-no-heads-causal", lambda b, x: b.call(sdpa, x, x, x, None, 0.0, True), (X,)),
        Case("sdpa-groups", lambda b, x, y, z: b.call(sdpa, x, y, z, enable_gqa=True), (Input(("B", 4, "N", 4)), k, k)),
    ]


def _tokens() -> list[Case]:
    scores = Input(("B", "N"))
    four = Input(("B", 2, "N", 4))

    def merge(b: Any, x: Any, order: Any, slot: Any, weight: Any = None, first: Any = 0) -> Any:
        keep = b.slice(order, 1, 0, b.sub_sizes(b.size(x, 1), 2))
        source = b.slice(order, 1, b.sub_sizes(b.size(x, 1), 2), b.size(x, 1))
        made = b.call(ops.merge_tokens.default, x, weight, keep, source, slot, first, weight is not None)
        return b.call(operator.getitem, made, 0), b.call(operator.getitem, made, 1)

    def last_merge(b: Any, x: Any, order: Any, slot: Any) -> Any:
        return merge(b, x, order, slot, first=b.sub_sizes(b.size(x, 1), 3))

    def weighted_merge(b: Any, x: Any, order: Any, slot: Any, weight: Any) -> Any:
        return merge(b, x, order, slot, weight)

    def static_merge(b: Any, x: Any, keep: Any, source: Any, slot: Any) -> Any:
        made = b.call(ops.merge_tokens.default, x, None, keep, source, slot, 0, False)
        return b.call(operator.getitem, made, 0), b.call(operator.getitem, made, 1)

    def greedy(b: Any, x: Any, unary: Any, first: Any) -> Any:
        return b.call(ops.greedy_select.default, b.matmul(x, b.transpose(x, 1, 2)), unary, first, 3)

    def greedy_share(b: Any, x: Any, unary: Any, first: Any) -> Any:
        count = b.floordiv_sizes(b.add_sizes(b.size(x, 1), 1), 2)
        return b.call(ops.greedy_select.default, b.matmul(x, b.transpose(x, 1, 2)), unary, first, count)

    def greedy_blocked(b: Any, x: Any, blocked: Any, first: Any) -> Any:
        unary = b.where(blocked, float("-inf"), 0.0)
        return b.call(ops.greedy_select.default, b.matmul(x, b.transpose(x, 1, 2)), unary, first, 1)

    def greedy_of(form: str) -> Body:
        def body(b: Any, x: Any, unary: Any, first: Any) -> Any:
            unary = b.add(b.mul(unary, unary), 0.1)
            similarity = b.matmul(x, b.transpose(x, 1, 2))
            return b.call(ops.greedy_select.default, similarity, unary, first, 3, form)

        return body

    def dpp(b: Any, x: Any, blocked: Any, *, half: bool = False) -> Any:
        count = b.floordiv_sizes(b.add_sizes(b.size(x, 1), 1), 2) if half else 3
        unary = b.where(blocked, -1e30, 0.0)
        return b.call(ops.dpp_select.default, b.matmul(x, b.transpose(x, 1, 2)), unary, count)

    def cover(b: Any, x: Any, blocked: Any, *, half: bool = False) -> Any:
        count = b.floordiv_sizes(b.add_sizes(b.size(x, 1), 1), 2) if half else 3
        table = b.softmax(b.matmul(x, b.transpose(x, 1, 2)), 2)
        return b.call(ops.cover_select.default, b.slice(table, 1, 0, 2), b.where(blocked, -1e30, 0.0), count)

    heads, grown = Input(("B", 4, "M", 8)), Input(("B", 2, "N", 8))
    attend = ops.cached_attention.default

    def cached(b: Any, q: Any, k: Any, v: Any, *, window: int = 0, softcap: float = 0.0, padded: bool = False) -> Any:
        real = b.compare("ge", b.sum(b.slice(b.slice(v, 1, 0, 1), 3, 0, 1), 3), -1.0 if padded else -1e4)
        made = b.call(attend, b.slice(q, 2, 0, 3), k, v, b.squeeze(real, 1), window, 0.3, softcap)
        return tuple(b.call(operator.getitem, made, i) for i in range(2))

    def out_only(b: Any, q: Any, k: Any, v: Any) -> Any:
        return cached(b, q, k, v)[0]

    def weighted(b: Any, q: Any, k: Any, v: Any, bias: Any) -> Any:
        real = b.compare("ge", b.sum(b.slice(b.slice(v, 1, 0, 1), 3, 0, 1), 3), -1e4)
        made = b.call(attend, b.slice(q, 2, 0, 3), k, v, b.squeeze(real, 1), 0, 0.3, 5.0, bias)
        return tuple(b.call(operator.getitem, made, i) for i in range(2))

    index = Input(("B", 3), "index", "N")
    order, slot = Input(("B", "N"), "unique", "N"), Input(("B", 2), "index", 2)
    return [
        Case("cached_attention", cached, (heads, grown, grown), half=True),
        Case("cached_attention-out", out_only, (heads, grown, grown)),
        Case("cached_attention-padded", functools.partial(cached, padded=True), (heads, grown, grown)),
        Case("cached_attention-window", functools.partial(cached, window=2), (heads, grown, grown)),
        Case("cached_attention-softcap", functools.partial(cached, softcap=5.0), (heads, grown, grown)),
        Case("cached_attention-bias", weighted, (heads, grown, grown, Input(("B", 2, "N")))),
        Case(
            "gather_slots",
            of(ops.gather_slots.default),
            (grown, Input(("B", 2, 3), "index", "N")),
            half=True,
        ),
        Case("retain_slots", of(ops.retain_slots.default, 3), (Input(("B", 2, "N")),)),
        Case("retain_slots-ties", of(ops.retain_slots.default, 3), (Input(("B", 2, "N"), "index", 3),)),
        Case(
            "retain_slots-one",
            lambda b, x: b.call(ops.retain_slots.default, x, b.sub_sizes(b.size(x, 2), 1)),
            (Input(("B", 2, "N"), "index", 3),),
        ),
        Case(
            "retain_slots-none",
            lambda b, x: b.call(ops.retain_slots.default, b.slice(x, 2, b.size(x, 2), None), 0),
            (Input(("B", 2, "N")),),
        ),
        Case(
            "retain_slots-all",
            lambda b, x: b.call(ops.retain_slots.default, x, b.size(x, 2)),
            (Input(("B", 2, "N")),),
        ),
        Case("gather_tokens", lambda b, x, i: b.call(ops.gather_tokens.default, x, i, 1, 0), (X, index), half=True),
        Case(
            "gather_tokens-last",
            lambda b, x, i: b.call(ops.gather_tokens.default, x, i, -1, 0),
            (Input(("B", 2, 3, "N")), index),
        ),
        Case("gather_tokens-heads", lambda b, x, i: b.call(ops.gather_tokens.default, x, i, 2, 0), (four, index)),
        Case(
            "gather_tokens-nbc",
            lambda b, x, i: b.call(ops.gather_tokens.default, x, i, 0, 1),
            (Input(("N", "B", 4)), index),
        ),
        Case("gather_tokens-matrix", lambda b, x, i: b.call(ops.gather_tokens.default, x, i, 1, 0), (BOOL, index)),
        Case(
            "gather_tokens-shared",
            lambda b, x, i: b.call(ops.gather_tokens.default, x, i, 1, 0),
            (Input((1, "N", 4)), index),
        ),
        Case(
            "gather_tokens-shared-heads",
            lambda b, x, i: b.call(ops.gather_tokens.default, x, i, 3, 0),
            (Input((1, 2, 5, "N")), index),
        ),
        Case(
            "gather_tokens-shared-behind",
            lambda b, x, i: b.call(ops.gather_tokens.default, x, i, 1, 2),
            (Input((5, "N", 1, 4)), index),
        ),
        Case(
            "gather_tokens-one",
            lambda b, x, i: b.call(ops.gather_tokens.default, x, i, 1, 0),
            (Input((1, "N", 4)), Input((1, 3), "index", "N")),
        ),
        Case(
            "scatter_tokens",
            of(ops.scatter_tokens.default),
            (X, Input(("B", 3), "unique", "N"), Input(("B", 3, 4))),
            half=True,
        ),
        Case(
            "scatter_tokens-matrix",
            of(ops.scatter_tokens.default),
            (INT, Input(("B", 3), "unique", "N"), Input(("B", 3), "int")),
        ),
        Case("merge_tokens", merge, (X, order, slot), half=True),
        Case("merge_tokens-last", last_merge, (X, order, Input(("B", 2), "index", 1))),
        Case("merge_tokens-weight", weighted_merge, (X, order, slot, Input(("B", "N"), "positive")), half=True),
        Case(
            "merge_tokens-static",
            static_merge,
            (Input(("B", 4, 3)), Input(("B", 2), "unique", 2), Input(("B", 2), "index", 2), slot),
        ),
        Case("topk_select", of(ops.topk_select.default, 3, False), (scores,), half=True),
        Case("topk_select-ascending", of(ops.topk_select.default, 3, True), (scores,)),
        Case("topk_select-ties", of(ops.topk_select.default, 3, True), (Input(("B", "N"), "index", 3),)),
        Case(
            "topk_select-size",
            lambda b, x: b.call(ops.topk_select.default, x, b.floordiv_sizes(b.add_sizes(b.size(x, 1), 1), 2), True),
            (scores,),
        ),
        Case(
            "attention_probs",
            lambda b, q, k: b.call(ops.attention_probs.default, q, k, None, 0.4),
            (four, Input(("B", 2, "M", 4))),
        ),
        Case(
            "attention_probs-bool",
            lambda b, q, k, m: b.call(ops.attention_probs.default, q, k, m, 0.4),
            (four, four, Input((1, 1, 1, "N"), "bool")),
        ),
        Case(
            "attention_probs-float",
            lambda b, q, k, m: b.call(ops.attention_probs.default, q, k, m, 0.4),
            (four, four, Input(("B", 1, "N", "N"))),
        ),
        Case("greedy_select", greedy, (X, scores, scores)),
        Case("greedy_select-share", greedy_share, (X, scores, scores)),
        Case("dpp_select", dpp, (X, BOOL)),
        Case("dpp_select-half", functools.partial(dpp, half=True), (X, BOOL)),
        Case("cover_select", cover, (X, BOOL)),
        Case("cover_select-half", functools.partial(cover, half=True), (X, BOOL)),
        Case("greedy_select-one", greedy_blocked, (X, BOOL, scores)),
        Case("greedy_select-all", greedy_of("all"), (X, scores, scores)),
        Case("greedy_select-product", greedy_of("product"), (X, scores, scores)),
        *(Case(f"recurrence-{axis}", of(ops.recurrence.default, axis), (X, Y), half=axis == 1) for axis in (0, 1, -1)),
        Case("recurrence-static", of(ops.recurrence.default, 1), (STATIC, STATIC)),
        Case("einsum", lambda b, x, y: b.call(aten.einsum.default, "bnc,bmc->bnm", [x, y]), (X, Y), half=True),
        Case(
            "einsum-three",
            lambda b, x, w, y: b.call(aten.einsum.default, "bnc, c, bnd -> bncd", [x, w, y]),
            (X, ROW, Y),
        ),
    ]


CASES = [
    *_unary(),
    *_binary(),
    *_casts(),
    *_reductions(),
    *_shapes(),
    *_sizes(),
    *_indexing(),
    *_algebra(),
    *_tokens(),
]
