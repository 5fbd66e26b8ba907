"""Matrix products, convolutions, norms, softmax and attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from tokcc.errors import LoweringError
from tokcc.lowering.onnx.shapes import transposed
from tokcc.lowering.onnx.translate import Translator, ir_dtype

__all__ = ["LOWERINGS", "additive_mask", "probabilities"]

aten = torch.ops.aten


def linear(t: Translator, node: fx.Node, x: Any, weight: Any, bias: Any = None) -> Any:
    """A layer; a weight that is a parameter is stored transposed, unless something else reads it as it is."""
    del node
    value = t.value(x)
    if x.meta["val"].ndim == 2 and t.tensor(weight) is not None:
        return t.op("Gemm", value, t.value(weight), None if bias is None else t.value(bias), transB=1)
    # A vocabulary that is both embedding and head would be in the file twice; runtimes turn it when they load.
    shared = isinstance(weight, fx.Node) and any(user.target is not aten.linear.default for user in weight.users)
    if t.tensor(weight) is not None and not shared:
        matrix = t.derived(weight, ".transposed", lambda w: w.t())
    else:
        matrix = t.op("Transpose", t.value(weight), perm=[1, 0])
    product = t.op("MatMul", value, matrix)
    return product if bias is None else t.op("Add", product, t.value(bias))


def matmul(t: Translator, node: fx.Node, first: Any, second: Any) -> Any:
    """Batched product."""
    del node
    return t.op("MatMul", t.value(first), t.value(second))


def einsum(t: Translator, node: fx.Node, equation: str, operands: Any, **kwargs: Any) -> Any:
    """A product written with letters."""
    del node, kwargs
    return t.op("Einsum", *(t.value(x) for x in operands), equation=equation)


def addmm(
    t: Translator, node: fx.Node, bias: Any, first: Any, second: Any, *, beta: float = 1, alpha: float = 1
) -> Any:
    """``beta * bias + alpha * first @ second``."""
    dtype = node.meta["val"].dtype
    product = t.op("MatMul", t.value(first), t.value(second))
    if alpha != 1:
        product = t.op("Mul", product, t.value(float(alpha), dtype))
    added = t.value(bias)
    if beta == 0:
        return product
    if beta != 1:
        added = t.op("Mul", added, t.value(float(beta), dtype))
    return t.op("Add", product, added)


def layer_norm(
    t: Translator,
    node: fx.Node,
    x: Any,
    shape: Sequence[Any],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *rest: Any,
) -> Any:
    """Layer norm over the last axes."""
    del rest
    dtype = node.meta["val"].dtype
    ones = torch.ones(*shape).numpy()
    scale = t.op.constant(ones, ir_dtype(dtype)) if weight is None else t.value(weight)
    shift = None if bias is None else t.value(bias)
    return t.op("LayerNormalization", t.value(x), scale, shift, axis=-len(shape), epsilon=float(eps))


def rms_norm(
    t: Translator, node: fx.Node, x: Any, shape: Sequence[Any], weight: Any = None, eps: float | None = None
) -> Any:
    """RMS norm, written out (its operation needs opset 23)."""
    dtype = node.meta["val"].dtype
    small = torch.finfo(dtype).eps if eps is None else eps
    value = t.value(x)
    axes = t.op.ints([i - len(shape) for i in range(len(shape))])
    square = t.op("ReduceMean", t.op("Mul", value, value), axes, keepdims=1)
    scaled = t.op("Div", value, t.op("Sqrt", t.op("Add", square, t.value(float(small), dtype))))
    return scaled if weight is None else t.op("Mul", scaled, t.value(weight))


def batch_norm(
    t: Translator,
    node: fx.Node,
    x: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    variance: Any,
    training: bool,
    momentum: float,
    eps: float,
    *rest: Any,
) -> Any:
    """Batch norm in evaluation."""
    del rest, momentum
    if training:
        raise LoweringError("batch norm in training mode", node=node.name, help="call model.eval() before exporting")
    channels = x.meta["val"].shape[1]
    dtype = node.meta["val"].dtype
    ones = t.op.constant(torch.ones(channels).numpy(), ir_dtype(dtype))
    zeros = t.op.constant(torch.zeros(channels).numpy(), ir_dtype(dtype))
    scale = ones if weight is None else t.value(weight)
    shift = zeros if bias is None else t.value(bias)
    return t.op("BatchNormalization", t.value(x), scale, shift, t.value(mean), t.value(variance), epsilon=float(eps))


def group_norm(
    t: Translator,
    node: fx.Node,
    x: Any,
    groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *rest: Any,
) -> Any:
    """Group norm through instance norm."""
    del rest
    dtype = node.meta["val"].dtype
    rank = x.meta["val"].ndim
    ones = t.op.constant(torch.ones(groups).numpy(), ir_dtype(dtype))
    zeros = t.op.constant(torch.zeros(groups).numpy(), ir_dtype(dtype))
    flat = t.op("Reshape", t.value(x), t.op.ints([0, groups, -1]))
    normal = t.op("InstanceNormalization", flat, ones, zeros, epsilon=float(eps))
    out = t.op("Reshape", normal, t.op("Shape", t.value(x)))
    places = t.op.ints(list(range(1, rank - 1)))
    if weight is not None:
        out = t.op("Mul", out, t.op("Unsqueeze", t.value(weight), places))
    return out if bias is None else t.op("Add", out, t.op("Unsqueeze", t.value(bias), places))


def softmax(t: Translator, node: fx.Node, x: Any, dim: int, *rest: Any, **kwargs: Any) -> Any:
    """Softmax."""
    del rest, kwargs
    return t.op("Softmax", t.value(x, node.meta["val"].dtype), axis=dim % x.meta["val"].ndim)


def log_softmax(t: Translator, node: fx.Node, x: Any, dim: int, *rest: Any, **kwargs: Any) -> Any:
    """Log-softmax."""
    del rest, kwargs
    return t.op("LogSoftmax", t.value(x, node.meta["val"].dtype), axis=dim % x.meta["val"].ndim)


def conv(
    t: Translator,
    node: fx.Node,
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    """Convolution over one, two or three axes."""
    dims = weight.meta["val"].ndim - 2
    kernel, steps = [int(s) for s in weight.meta["val"].shape[2:]], _each(dilation, dims)
    if padding == "same":  # written out: auto_pad takes no dilation in ONNX Runtime
        spread = [step * (size - 1) for step, size in zip(steps, kernel, strict=True)]
        pads = [*(total // 2 for total in spread), *(total - total // 2 for total in spread)]
    else:
        pads = ([0] * dims if isinstance(padding, str) else _each(padding, dims)) * 2
    return t.op(
        "Conv",
        t.value(x),
        t.value(weight),
        None if bias is None else t.value(bias),
        strides=_each(stride, dims),
        pads=pads,
        dilations=steps,
        group=groups,
        kernel_shape=kernel,
    )


def convolution(
    t: Translator,
    node: fx.Node,
    x: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Any:
    """The general convolution."""
    del output_padding
    if transposed:
        raise LoweringError("a transposed convolution", node=node.name)
    return conv(t, node, x, weight, bias, stride, padding, dilation, groups)


def _each(value: Any, dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values


def _pool(t: Translator, kind: str, x: Any, kernel: Any, stride: Any, padding: Any, **attributes: Any) -> Any:
    dims = 1 if x.meta["val"].ndim == 3 else 2
    pads, size = _each(padding, dims), _each(kernel, dims)
    steps = _each(stride, dims) if stride else size
    return t.op(kind, t.value(x), kernel_shape=size, strides=steps, pads=[*pads, *pads], **attributes)


def average_pool(
    t: Translator,
    node: fx.Node,
    x: Any,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    ceil: bool = False,
    include_pad: bool = True,
    divisor: Any = None,
) -> Any:
    """Average pooling."""
    if ceil or divisor is not None:
        raise LoweringError("average pooling with ceil_mode or a divisor of its own", node=node.name)
    return _pool(t, "AveragePool", x, kernel, stride, padding, count_include_pad=int(include_pad))


def max_pool(
    t: Translator,
    node: fx.Node,
    x: Any,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    dilation: Any = 1,
    ceil: bool = False,
) -> Any:
    """Max pooling."""
    if ceil:
        raise LoweringError("max pooling with ceil_mode", node=node.name)
    return _pool(
        t, "MaxPool", x, kernel, stride, padding, dilations=_each(dilation, 1 if x.meta["val"].ndim == 3 else 2)
    )


def adaptive_average(t: Translator, node: fx.Node, x: Any, size: Any) -> Any:
    """Global average pooling."""
    if any(s != 1 for s in size):
        raise LoweringError("adaptive pooling to more than one element", node=node.name)
    rank = x.meta["val"].ndim
    return t.op("ReduceMean", t.value(x), t.op.ints(list(range(rank - len(size), rank))), keepdims=1)


# attention ------------------------------------------------------------------------------------------------------------


def additive_mask(t: Translator, mask: Any, dtype: torch.dtype) -> Any:
    """Return an additive mask; a boolean one becomes 0 and the lowest finite number, made once and shared by layers."""
    value = t.value(mask)
    if mask.meta["val"].dtype != torch.bool:
        return t.value(mask, dtype)
    return t.op("Where", value, t.value(0.0, dtype), t.value(float(torch.finfo(dtype).min), dtype))


def probabilities(t: Translator, query: Any, key: Any, mask: Any, scale: float, dtype: torch.dtype, rank: int) -> Any:
    """``softmax(scale * q k^T + mask)``: one form for attention itself and for scores beside it."""
    perm = [*range(rank - 2), rank - 1, rank - 2]
    logits = t.op("MatMul", t.op("Mul", query, t.value(scale, dtype)), transposed(t, key, perm))
    if mask is not None:
        logits = t.op("Add", logits, mask)
    return t.op("Softmax", logits, axis=-1)


def _live_rows(t: Translator, mask: Any, dtype: torch.dtype) -> Any:
    """Return 1 for query rows that may attend to something, or None when a mask is the same for all rows.

    A row that is masked everywhere is zero in torch and uniform in a plain softmax. Only masks with a query axis can
    have such rows beside live ones.
    """
    fake = mask.meta["val"]
    if fake.dtype != torch.bool or fake.ndim < 2 or (isinstance(fake.shape[-2], int) and fake.shape[-2] == 1):
        return None
    numbers = t.op("Cast", t.value(mask), to=int(ir_dtype(dtype)))
    return t.op("ReduceMax", numbers, t.op.ints([-1]), keepdims=1)


def attention(
    t: Translator,
    node: fx.Node,
    query: Any,
    key: Any,
    value: Any,
    mask: Any = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Scaled dot-product attention as matmul, softmax, matmul: the form that every runtime has."""
    if dropout:
        raise LoweringError("attention with dropout", node=node.name, help="call model.eval() before exporting")
    mask = mask if mask is not None else attn_mask
    fake = query.meta["val"]
    dtype, rank = fake.dtype, fake.ndim
    q, k, v = t.value(query), t.value(key), t.value(value)
    if enable_gqa:
        k, v = (_repeat_heads(t, x, value_of, fake.shape[-3]) for x, value_of in ((k, key), (v, value)))
    factor = 1.0 / math.sqrt(fake.shape[-1]) if scale is None else float(scale)
    added = None if mask is None else additive_mask(t, mask, dtype)
    if is_causal:
        added = _causal(t, query, key, dtype)
    probs = probabilities(t, q, k, added, factor, dtype, rank)
    live = None if mask is None else _live_rows(t, mask, dtype)
    out = t.op("MatMul", probs, v)
    return out if live is None else t.op("Mul", out, live)


def _causal(t: Translator, query: Any, key: Any, dtype: torch.dtype) -> Any:
    zero, one = (t.op.constant(i, ir_dtype(torch.int64)) for i in (0, 1))
    rows = t.op("Range", zero, t.op("Squeeze", t.op("Shape", t.value(query), start=-2, end=-1)), one)
    columns = t.op("Range", zero, t.op("Squeeze", t.op("Shape", t.value(key), start=-2, end=-1)), one)
    seen = t.op("LessOrEqual", t.op("Unsqueeze", columns, t.op.ints([0])), t.op("Unsqueeze", rows, t.op.ints([1])))
    return t.op("Where", seen, t.value(0.0, dtype), t.value(float(torch.finfo(dtype).min), dtype))


def _repeat_heads(t: Translator, value: Any, node: Any, heads: int) -> Any:
    own = node.meta["val"].shape[-3]
    if own == heads:
        return value
    width = node.meta["val"].shape[-1]
    wide = t.op("Expand", t.op("Unsqueeze", value, t.op.ints([2])), t.op.ints([1, 1, heads // own, 1, 1]))
    return t.op("Reshape", wide, t.op.ints([0, heads, -1, width]))


LOWERINGS: dict[Any, Any] = {
    aten.linear.default: linear,
    aten.matmul.default: matmul,
    aten.mm.default: matmul,
    aten.bmm.default: matmul,
    aten.einsum.default: einsum,
    aten.addmm.default: addmm,
    aten.baddbmm.default: addmm,
    aten.layer_norm.default: layer_norm,
    aten.rms_norm.default: rms_norm,
    aten.batch_norm.default: batch_norm,
    aten.group_norm.default: group_norm,
    aten.softmax.int: softmax,
    aten._softmax.default: softmax,
    aten.log_softmax.int: log_softmax,
    aten._log_softmax.default: log_softmax,
    aten.conv1d.default: conv,
    aten.conv2d.default: conv,
    aten.conv3d.default: conv,
    aten.conv1d.padding: conv,
    aten.conv2d.padding: conv,
    aten.convolution.default: convolution,
    aten.avg_pool1d.default: average_pool,
    aten.avg_pool2d.default: average_pool,
    aten.max_pool2d.default: max_pool,
    aten.adaptive_avg_pool1d.default: adaptive_average,
    aten.adaptive_avg_pool2d.default: adaptive_average,
    aten.scaled_dot_product_attention.default: attention,
}
