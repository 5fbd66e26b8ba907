"""Elementwise operations; operands are cast to the result's dtype, as torch promotes them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from tokcc.errors import LoweringError
from tokcc.lowering.onnx.translate import Translator

__all__ = ["LOWERINGS"]

aten = torch.ops.aten


def _dtype(node: fx.Node) -> torch.dtype:
    return node.meta["val"].dtype  # type: ignore[no-any-return]  # a fake tensor's dtype


def _common(*args: Any) -> torch.dtype:
    fakes = [a.meta["val"] if isinstance(a, fx.Node) else a for a in args]
    fakes = [0 if isinstance(f, torch.SymInt) else f for f in fakes]
    result = fakes[0]
    if len(fakes) == 1:
        return result.dtype  # type: ignore[no-any-return]  # a fake tensor's dtype
    return torch.result_type(*fakes)


def _unary(op_type: str) -> Any:
    def lower(t: Translator, node: fx.Node, x: Any) -> Any:
        return t.op(op_type, t.value(x, _dtype(node)))

    return lower


def _rounding(op_type: str) -> Any:
    """Rounding; integers are what they are, and ONNX's operations do not take them."""

    def lower(t: Translator, node: fx.Node, x: Any) -> Any:
        value = t.value(x)
        return t.op(op_type, value) if _dtype(node).is_floating_point else value

    return lower


def _binary(op_type: str) -> Any:
    def lower(t: Translator, node: fx.Node, first: Any, second: Any, alpha: Any = 1) -> Any:
        dtype = _dtype(node)
        right = t.value(second, dtype)
        if alpha != 1:
            right = t.op("Mul", right, t.value(alpha, dtype))
        return t.op(op_type, t.value(first, dtype), right)

    return lower


def _compare(op_type: str, negate: bool = False) -> Any:
    def lower(t: Translator, node: fx.Node, first: Any, second: Any) -> Any:
        del node
        dtype = _common(first, second)
        if dtype == torch.bool and op_type != "Equal":
            dtype = torch.int32
        made = t.op(op_type, t.value(first, dtype), t.value(second, dtype))
        return t.op("Not", made) if negate else made

    return lower


def _logic(op_type: str) -> Any:
    def lower(t: Translator, node: fx.Node, first: Any, second: Any) -> Any:
        if _dtype(node) != torch.bool:
            raise LoweringError("a bitwise operation on integers has no portable ONNX form", node=node.name)
        return t.op(op_type, t.value(first, torch.bool), t.value(second, torch.bool))

    return lower


def logical_not(t: Translator, node: fx.Node, x: Any) -> Any:
    """Negation of bools."""
    del node
    return t.op("Not", t.value(x, torch.bool))


def bitwise_not(t: Translator, node: fx.Node, x: Any) -> Any:
    """Negation of bools, and ``-x - 1`` of integers."""
    dtype = _dtype(node)
    if dtype == torch.bool:
        return logical_not(t, node, x)
    return t.op("Sub", t.value(-1, dtype), t.value(x, dtype))


def div_mode(t: Translator, node: fx.Node, first: Any, second: Any, *, rounding_mode: str | None = None) -> Any:
    """Division with a rounding mode; on integers ONNX truncates, which is floor where nothing is negative."""
    dtype = _dtype(node)
    a, b = t.value(first, dtype), t.value(second, dtype)
    if rounding_mode is None:
        return t.op("Div", a, b)
    if dtype.is_floating_point:
        quotient = t.op("Div", a, b)
        return t.op("Floor", quotient) if rounding_mode == "floor" else _truncated(t, quotient)
    if rounding_mode == "trunc":
        return t.op("Div", a, b)
    # floor(a / b) = (a - mod(a, b)) / b exactly, with ONNX's Mod taking the divisor's sign.
    return t.op("Div", t.op("Sub", a, t.op("Mod", a, b)), b)


def _truncated(t: Translator, x: Any) -> Any:
    return t.op("Mul", t.op("Sign", x), t.op("Floor", t.op("Abs", x)))


def floor_divide(t: Translator, node: fx.Node, first: Any, second: Any) -> Any:
    """Floor division."""
    return div_mode(t, node, first, second, rounding_mode="floor")


def remainder(t: Translator, node: fx.Node, first: Any, second: Any) -> Any:
    """Remainder with the sign of the divisor."""
    dtype = _dtype(node)
    if dtype.is_floating_point:
        a, b = t.value(first, dtype), t.value(second, dtype)
        return t.op("Sub", a, t.op("Mul", t.op("Floor", t.op("Div", a, b)), b))
    return t.op("Mod", t.value(first, dtype), t.value(second, dtype))


def rsub(t: Translator, node: fx.Node, first: Any, second: Any, alpha: Any = 1) -> Any:
    """``second - alpha * first``."""
    dtype = _dtype(node)
    taken = t.value(first, dtype)
    if alpha != 1:
        taken = t.op("Mul", taken, t.value(alpha, dtype))
    return t.op("Sub", t.value(second, dtype), taken)


def cast(t: Translator, node: fx.Node, x: Any, *rest: Any, **kwargs: Any) -> Any:
    """Conversion of the dtype."""
    del rest, kwargs
    return t.value(x, _dtype(node))


def identity(t: Translator, node: fx.Node, x: Any, *rest: Any, **kwargs: Any) -> Any:
    """Operations that return their operand in inference."""
    del node, rest, kwargs
    return t.value(x)


def where(t: Translator, node: fx.Node, condition: Any, first: Any, second: Any) -> Any:
    """Choice."""
    return _choose(t, node, condition, first, second)


def masked_fill(t: Translator, node: fx.Node, x: Any, mask: Any, value: Any) -> Any:
    """Fill where the mask is true."""
    return _choose(t, node, mask, value, x)


def _choose(t: Translator, node: fx.Node, condition: Any, first: Any, second: Any) -> Any:
    dtype = _dtype(node)
    chosen, a, b = t.value(condition, torch.bool), t.value(first, dtype), t.value(second, dtype)
    if dtype != torch.bool:
        return t.op("Where", chosen, a, b)
    # ONNX Runtime's CPU provider chooses between anything but truth values.
    return t.op("Or", t.op("And", chosen, a), t.op("And", t.op("Not", chosen), b))


def clamp(t: Translator, node: fx.Node, x: Any, low: Any = None, high: Any = None) -> Any:
    """Bounds."""
    dtype = _dtype(node)
    value = t.value(x, dtype)
    if low is not None and not (isinstance(low, float) and math.isinf(low)):
        value = t.op("Max", value, t.value(low, dtype))
    if high is not None and not (isinstance(high, float) and math.isinf(high)):
        value = t.op("Min", value, t.value(high, dtype))
    return value


def hardtanh(t: Translator, node: fx.Node, x: Any, low: Any = -1.0, high: Any = 1.0) -> Any:
    """Bounds, -1 and 1 where none are given."""
    return clamp(t, node, x, low, high)


def clamp_max(t: Translator, node: fx.Node, x: Any, high: Any) -> Any:
    """Upper bound."""
    return clamp(t, node, x, None, high)


def power(t: Translator, node: fx.Node, x: Any, exponent: Any) -> Any:
    """Powers; squares and roots in their own operations."""
    dtype = _dtype(node)
    value = t.value(x, dtype)
    if exponent == 2:
        return t.op("Mul", value, value)
    if exponent == 0.5:
        return t.op("Sqrt", value)
    if exponent == -0.5:
        return t.op("Div", t.value(1.0, dtype), t.op("Sqrt", value))
    return t.op("Pow", value, t.value(exponent, dtype))


def rsqrt(t: Translator, node: fx.Node, x: Any) -> Any:
    """Reciprocal square root."""
    dtype = _dtype(node)
    return t.op("Div", t.value(1.0, dtype), t.op("Sqrt", t.value(x, dtype)))


def gelu(t: Translator, node: fx.Node, x: Any, *, approximate: str = "none") -> Any:
    """GELU: the operation itself from opset 20, else the form that runtimes recognise."""
    dtype = _dtype(node)
    value = t.value(x)
    if t.op.opset >= 20:
        return t.op("Gelu", value, approximate=approximate)
    one, half = t.value(1.0, dtype), t.value(0.5, dtype)
    if approximate == "tanh":
        cubed = t.op("Mul", t.op("Mul", value, value), value)
        inner = t.op("Add", value, t.op("Mul", cubed, t.value(0.044715, dtype)))
        bent = t.op("Tanh", t.op("Mul", inner, t.value(math.sqrt(2.0 / math.pi), dtype)))
        return t.op("Mul", t.op("Mul", value, half), t.op("Add", bent, one))
    bent = t.op("Erf", t.op("Div", value, t.value(math.sqrt(2.0), dtype)))
    return t.op("Mul", t.op("Mul", value, t.op("Add", bent, one)), half)


def silu(t: Translator, node: fx.Node, x: Any) -> Any:
    """``x * sigmoid(x)``."""
    del node
    value = t.value(x)
    return t.op("Mul", value, t.op("Sigmoid", value))


def _attribute(op_type: str, **names: float) -> Any:
    def lower(t: Translator, node: fx.Node, x: Any, *args: Any) -> Any:
        del node
        given = dict(zip(names, args, strict=False))
        return t.op(op_type, t.value(x), **{**names, **given})

    return lower


def elu(t: Translator, node: fx.Node, x: Any, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Any:
    """ELU; other scales than 1 (they are SELU's) are refused."""
    if scale != 1 or input_scale != 1:
        raise LoweringError("elu with a scale", node=node.name, needed="scale 1", found=f"{scale}, {input_scale}")
    return t.op("Elu", t.value(x), alpha=float(alpha))


def dropout(t: Translator, node: fx.Node, x: Any, p: float, train: bool) -> Any:
    """Nothing, in evaluation."""
    if train and p:
        raise LoweringError("dropout in training mode", node=node.name, help="call model.eval() before exporting")
    return t.value(x)


def softplus(t: Translator, node: fx.Node, x: Any, *rest: Any) -> Any:
    """Softplus with the default sharpness."""
    if rest and rest[0] != 1:
        raise LoweringError("softplus with beta other than 1", node=node.name)
    return t.op("Softplus", t.value(x))


def _test(op_type: str) -> Any:
    """NaN and infinity tests, in fp32: IsInf takes no fp16 before opset 20, and neither takes integers."""

    def lower(t: Translator, node: fx.Node, x: Any) -> Any:
        del node
        wide = x.meta["val"].dtype == torch.float64
        return t.op(op_type, t.value(x, torch.float64 if wide else torch.float32))

    return lower


def expm1(t: Translator, node: fx.Node, x: Any) -> Any:
    """``exp(x) - 1``."""
    dtype = _dtype(node)
    return t.op("Sub", t.op("Exp", t.value(x, dtype)), t.value(1.0, dtype))


_UNARY = {
    "neg": "Neg",
    "abs": "Abs",
    "exp": "Exp",
    "log": "Log",
    "sqrt": "Sqrt",
    "erf": "Erf",
    "tanh": "Tanh",
    "sigmoid": "Sigmoid",
    "relu": "Relu",
    "cos": "Cos",
    "sin": "Sin",
    "sign": "Sign",
    "reciprocal": "Reciprocal",
}

LOWERINGS: dict[Any, Any] = {
    **{getattr(aten, name).default: _unary(op) for name, op in _UNARY.items()},
    **{
        getattr(aten, name).default: _rounding(op)
        for name, op in (("floor", "Floor"), ("ceil", "Ceil"), ("round", "Round"))
    },
    **{
        getattr(getattr(aten, name), overload): _binary(op)
        for name, op in {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div"}.items()
        for overload in ("Tensor", "Scalar")
    },
    **{
        getattr(getattr(aten, name), overload): _compare(op, negate=name == "ne")
        for name, op in {
            "eq": "Equal",
            "ne": "Equal",
            "lt": "Less",
            "le": "LessOrEqual",
            "gt": "Greater",
            "ge": "GreaterOrEqual",
        }.items()
        for overload in ("Tensor", "Scalar")
    },
    **dict.fromkeys((aten.__and__.Tensor, aten.logical_and.default, aten.bitwise_and.Tensor), _logic("And")),
    **dict.fromkeys((aten.__or__.Tensor, aten.logical_or.default, aten.bitwise_or.Tensor), _logic("Or")),
    **dict.fromkeys((aten.__xor__.Tensor, aten.logical_xor.default, aten.bitwise_xor.Tensor), _logic("Xor")),
    aten.logical_not.default: logical_not,
    aten.bitwise_not.default: bitwise_not,
    aten.maximum.default: _binary("Max"),
    aten.minimum.default: _binary("Min"),
    aten.max.other: _binary("Max"),
    aten.min.other: _binary("Min"),
    aten.div.Tensor_mode: div_mode,
    aten.div.Scalar_mode: div_mode,
    aten.floor_divide.default: floor_divide,
    aten.remainder.Scalar: remainder,
    aten.remainder.Tensor: remainder,
    aten.rsub.Scalar: rsub,
    aten.rsub.Tensor: rsub,
    aten._to_copy.default: cast,
    aten.to.dtype: cast,
    aten.type_as.default: cast,
    **dict.fromkeys(
        (
            aten.clone.default,
            aten.contiguous.default,
            aten.alias.default,
            aten.detach.default,
            aten.lift_fresh_copy.default,
        ),
        identity,
    ),
    aten.dropout.default: dropout,
    **dict.fromkeys((aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar), where),
    aten.masked_fill.Scalar: masked_fill,
    aten.masked_fill.Tensor: masked_fill,
    aten.clamp.default: clamp,
    aten.clamp.Tensor: clamp,
    aten.clamp_min.default: clamp,
    aten.clamp_max.default: clamp_max,
    aten.hardtanh.default: hardtanh,
    aten.pow.Tensor_Scalar: power,
    aten.pow.Tensor_Tensor: _binary("Pow"),
    aten.square.default: lambda t, node, x: power(t, node, x, 2),
    aten.rsqrt.default: rsqrt,
    aten.expm1.default: expm1,
    aten.gelu.default: gelu,
    aten.silu.default: silu,
    aten.leaky_relu.default: _attribute("LeakyRelu", alpha=0.01),
    aten.elu.default: elu,
    aten.hardswish.default: lambda t, node, x: t.op("HardSwish", t.value(x)),
    aten.hardsigmoid.default: lambda t, node, x: t.op("HardSigmoid", t.value(x), alpha=1 / 6, beta=0.5),
    aten.softplus.default: softplus,
    aten.isnan.default: _test("IsNaN"),
    aten.isinf.default: _test("IsInf"),
}
