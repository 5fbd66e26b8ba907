"""Unary and binary operations on numbers, and casts."""

from __future__ import annotations

import torch

from tests.lowering.cases.given import BOOL, BOOL2, INT, INT2, NONZERO, POSITIVE, ROW, X, Y, of
from tests.lowering.harness import Case, Input

aten = torch.ops.aten


def unary_cases() -> list[Case]:
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


def binary_cases() -> list[Case]:
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


def casts_cases() -> list[Case]:
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
