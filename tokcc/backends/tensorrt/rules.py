"""What TensorRT's builder takes: every node of a graph against the rules for its operation.

The rules are those that the builder of TensorRT for RTX 1.7.1 showed when it was given each form, and those of the
operator list of onnx-tensorrt. They are checked before a builder is near, since its own messages name no policy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from tokcc.analysis.sizes import known_number
from tokcc.lowering.onnx.translate import SIZE

__all__ = ["LARGEST_K", "OPERATIONS", "Violation", "violations", "worst"]

LARGEST_K = 3840
"""The most entries that a TopK gives."""

_F32, _F16, _BF16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
_I64, _I32, _BOOL = ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL
_I8, _U8 = ir.DataType.INT8, ir.DataType.UINT8
FLOATS = frozenset((_F32, _F16, _BF16))
NUMBERS = FLOATS | {_I64, _I32}
ALL = NUMBERS | {_BOOL}
MOVED = ALL | {_I8}
"""Of operations that move data and do not look at it."""
_NO_COUNT = "a length that depends on what a tensor holds is not known when the engine is built"


@dataclass(frozen=True)
class Violation:
    """A node that TensorRT does not take.

    Attributes:
        node: Its name.
        op: Its operation.
        step: The label of the policy step that brought it (``evit@3``); None = the model's own.
        what: What is wrong.
        needed: What TensorRT takes.
        found: What the node has.
        help: The nearest legal choice.
    """

    node: str
    op: str
    step: str | None
    what: str
    needed: str
    found: str
    help: str


@dataclass(frozen=True)
class Rule:
    """What is asked of an operation's nodes.

    Attributes:
        dtypes: Types of the first input.
        check: More; gives what is wrong, what is needed, what was found and what to do.
    """

    dtypes: frozenset[ir.DataType] = ALL
    check: Callable[[ir.Node, _Sizes], Iterator[tuple[str, str, str, str]]] | None = None


@dataclass(frozen=True)
class _Sizes:
    """What sizes can be.

    Attributes:
        bindings: Every size symbol at each shape of each profile, by what the shape is called.
    """

    bindings: Mapping[str, Mapping[Any, int]]

    def of(self, value: ir.Value | None) -> dict[str, int] | None:
        """Return what a size is at each shape; None = it does not follow from shapes."""
        if value is None:
            return None
        if value.const_value is not None:
            return dict.fromkeys(self.bindings or ("any shape",), int(value.const_value.numpy().reshape(-1)[0]))
        size = value.meta.get(SIZE)
        if size is None:
            return None
        found: dict[str, int] = {}
        for name, values in self.bindings.items():
            number = known_number(size, values)
            if number is None:
                return None
            found[name] = number
        return found


def _top_k(node: ir.Node, sizes: _Sizes) -> Iterator[tuple[str, str, str, str]]:
    known = sizes.of(node.inputs[1])
    if known is None:
        yield (
            "K does not follow from shapes",
            f"a number, or a function of the inputs' shapes, of 1 to {LARGEST_K}",
            "a K that depends on what a tensor holds",
            "use a budget in `tokens`, `keep` or `remove`",
        )
        return
    for name, k in known.items():
        if k > LARGEST_K:
            help = f"keep at most {LARGEST_K} tokens (`budget: {{tokens: {LARGEST_K}}}`), or build for shorter inputs"
        elif k < 1:
            help = "nothing is left to choose there: build for longer inputs (`--min-shapes`)"
        else:
            continue
        yield "K is beyond what a TopK gives", f"1 to {LARGEST_K}", f"{k} at the {name} shapes", help
        return


def _no_reduction(node: ir.Node, sizes: _Sizes) -> Iterator[tuple[str, str, str, str]]:
    del sizes
    given = node.attributes.get("reduction")
    if given is not None and given.as_string() != "none":
        yield (
            "a scatter with a reduction",
            "no reduction",
            f"reduction={given.as_string()}",
            "write the sum as a product with a one-hot matrix, as `merge_tokens` does",
        )


def _half_attention(node: ir.Node, sizes: _Sizes) -> Iterator[tuple[str, str, str, str]]:
    del sizes
    first = node.inputs[0]
    if first is not None and first.dtype == _F32:
        yield (
            "the fused Attention in fp32",
            "fp16 or bf16, or attention in single operations",
            "fp32",
            "use `--opset 18` or `--dtype float16`",
        )
    if len([value for value in node.outputs if value.uses()]) > 1:
        yield (
            "an Attention with several outputs",
            "one output",
            str(len(node.outputs)),
            "use `--opset 18`, which writes attention in single operations",
        )


def _linear(node: ir.Node, sizes: _Sizes) -> Iterator[tuple[str, str, str, str]]:
    del sizes
    mode = node.attributes.get("mode")
    if mode is not None and mode.as_string() != "linear":
        yield "a TensorScatter that wraps round", "mode=linear", mode.as_string(), "use `--opset 18`"


def _float_mod(node: ir.Node, sizes: _Sizes) -> Iterator[tuple[str, str, str, str]]:
    del sizes
    fmod = node.attributes.get("fmod")
    first = node.inputs[0]
    if first is not None and first.dtype in FLOATS and (fmod is None or not fmod.as_int()):
        yield "a Mod of floating-point numbers without fmod", "fmod=1, or integers", str(first.dtype), "use integers"


_POINTWISE = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Min", "Max", "Neg", "Abs", "Sign", "Sum", "Clip"), Rule(NUMBERS)),
    **dict.fromkeys(("Equal", "Where", "Identity"), Rule(MOVED)),
    **dict.fromkeys(("Greater", "GreaterOrEqual", "Less", "LessOrEqual"), Rule(NUMBERS)),
    **dict.fromkeys(("And", "Or", "Xor", "Not"), Rule(frozenset({_BOOL}))),
    **dict.fromkeys(
        (
            "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Ceil", "Celu", "Cos", "Cosh", "Elu", "Erf", "Exp",
            "Floor", "Gelu", "HardSigmoid", "HardSwish", "IsInf", "IsNaN", "LeakyRelu", "Log", "Mish", "PRelu",
            "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sin", "Sinh", "Softplus", "Softsign", "Sqrt", "Tan",
            "Tanh", "ThresholdedRelu",
        ),
        Rule(FLOATS),
    ),
    "Pow": Rule(NUMBERS),
    "Mod": Rule(NUMBERS, _float_mod),
    "Cast": Rule(ALL | {_I8, _U8}),
}  # fmt: skip
_SHAPES = {
    **dict.fromkeys(
        (
            "Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Pad", "Reshape", "Slice", "Split",
            "Squeeze", "Tile", "Transpose", "Unsqueeze", "Trilu", "DepthToSpace", "SpaceToDepth", "EyeLike",
        ),
        Rule(MOVED),
    ),
    **dict.fromkeys(("Shape", "Size", "Constant", "ConstantOfShape", "Range"), Rule(MOVED | {_U8})),
    "ScatterElements": Rule(MOVED, _no_reduction),
    "ScatterND": Rule(MOVED, _no_reduction),
    "TensorScatter": Rule(FLOATS, _linear),
    "OneHot": Rule(ALL),
}  # fmt: skip
_SUMS = {
    **dict.fromkeys(
        ("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMean", "ReduceSumSquare"), Rule(FLOATS)
    ),
    **dict.fromkeys(("ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum"), Rule(NUMBERS)),
    **dict.fromkeys(("ArgMax", "ArgMin", "CumSum"), Rule(NUMBERS)),
    "TopK": Rule(NUMBERS, _top_k),
    **dict.fromkeys(("Einsum", "Gemm", "MatMul"), Rule(FLOATS)),
    **dict.fromkeys(
        (
            "AveragePool", "BatchNormalization", "Conv", "ConvTranspose", "DeformConv", "GlobalAveragePool",
            "GlobalMaxPool", "GridSample", "GroupNormalization", "InstanceNormalization", "LRN", "LayerNormalization",
            "LogSoftmax", "LpNormalization", "LpPool", "MaxPool", "RMSNormalization", "Resize", "RotaryEmbedding",
            "Softmax",
        ),
        Rule(FLOATS),
    ),
    "Attention": Rule(FLOATS, _half_attention),
    **dict.fromkeys(("DequantizeLinear", "QuantizeLinear"), Rule(FLOATS | {_I8})),
    **dict.fromkeys(("If", "Loop", "Scan"), Rule()),
}  # fmt: skip
OPERATIONS: Mapping[str, Rule] = {**_POINTWISE, **_SHAPES, **_SUMS}
"""What the builder takes."""
_REFUSED = {
    "NonZero": _NO_COUNT,
    "Compress": _NO_COUNT,
    "Unique": _NO_COUNT,
    "NonMaxSuppression": _NO_COUNT,
}


def violations(model: ir.Model, bindings: Mapping[str, Mapping[Any, int]]) -> list[Violation]:
    """Hold every node of a graph, those in branches and loops included, against the rules.

    Args:
        model: The model, as it was lowered: sizes are looked up in its values.
        bindings: Every size symbol at each shape that the engine is made for.

    Returns:
        What is wrong; empty when the builder takes the graph.
    """
    sizes = _Sizes(bindings)
    found: list[Violation] = []
    for node in model.graph.all_nodes():
        if node.domain:
            continue  # a plugin, which has rules of its own
        found += [Violation(node.name or "", node.op_type, _step(node), *each) for each in _wrong(node, sizes)]
    return found


def _step(node: ir.Node) -> str | None:
    scope = (node.name or "").split("/")
    return scope[1] if scope[0] == "tokcc" and len(scope) > 2 else None


def _wrong(node: ir.Node, sizes: _Sizes) -> Iterator[tuple[str, str, str, str]]:
    rule = OPERATIONS.get(node.op_type)
    if rule is None:
        why = _REFUSED.get(node.op_type, "TensorRT's parser has no such operation")
        yield (
            f"{node.op_type}: {why}",
            "operations of TensorRT's parser",
            node.op_type,
            "use `--backend onnx`, or a method without it",
        )
        return
    first = next((value for value in node.inputs if value is not None), None)
    if first is not None and first.dtype is not None and first.dtype not in rule.dtypes:
        yield (
            f"{node.op_type} of {first.dtype.name}",
            " or ".join(sorted(kind.name for kind in rule.dtypes)),
            first.dtype.name,
            "use `--dtype float32`, `float16` or `bfloat16`"
            if first.dtype.is_floating_point()
            else "use `--backend onnx`",
        )
    if rule.check is not None:
        yield from rule.check(node, sizes)


def worst(found: Sequence[Violation]) -> Violation:
    """Return the one to tell of: what a policy step brought comes first."""
    return next((each for each in found if each.step is not None), found[0])
