"""Results of products, attentions, convolutions and reshapes whose sizes are symbolic.

Evaluated on fake tensors these look at strides, and there ask whether a symbolic size is one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

__all__ = ["counts_blocks", "fake_result"]

aten = torch.ops.aten

_BLOCKS = ("tokcc::split_blocks",)
"""Operations that cut an axis into as many blocks as it takes."""


def counts_blocks(target: Any) -> bool:
    """Return whether an operation makes a number of blocks.

    Short examples have one block, and of an example of 1 torch would believe that it is never anything else: such a
    number needs an example of its own.
    """
    schema = getattr(target, "_schema", None)
    return schema is not None and schema.name in _BLOCKS


def fake_result(target: Any, args: Sequence[Any]) -> torch.Tensor | None:
    """Return the fake result of a call, or None for what torch evaluates just as well.

    Args:
        target: The operation.
        args: Its fakes.
    """
    if target in (aten.matmul.default, aten.bmm.default):
        first, second = args[:2]
        return _product(first, second, first.shape[-1:], second.shape[-2:-1], second.shape[-1:])
    if target is aten.scaled_dot_product_attention.default:
        query, key, value = args[:3]
        if _same(query.shape[:-2], key.shape[:-2]) and _same(key.shape[-2:-1], value.shape[-2:-1]):
            return _product(query, value, query.shape[-1:], key.shape[-1:], value.shape[-1:])
    if target is aten.conv2d.default and len(args) == 5:
        return _convolved(args[0], args[1], args[3], args[4])
    if target is aten.reshape.default:
        return _reshaped(args[0], args[1])
    if target is aten.narrow.default and not isinstance(args[3], int):
        # What is asked for is there: torch would ask for a proof.
        source: torch.Tensor = args[0]
        axis = args[1] % source.ndim
        return source.new_empty((*source.shape[:axis], args[3], *source.shape[axis + 1 :]))
    return None


def _convolved(
    image: torch.Tensor, weight: torch.Tensor, stride: Sequence[int], padding: Sequence[int]
) -> torch.Tensor | None:
    """Return the fake of a plain convolution of images of a fixed size, as many as there may be."""
    sizes: Sequence[Any] = image.shape
    if isinstance(sizes[0], int) or not all(isinstance(size, int) for size in sizes[1:]):
        return None
    sides = [
        (size + 2 * around - side) // step + 1
        for size, side, step, around in zip(sizes[2:], weight.shape[2:], stride, padding, strict=True)
    ]
    return image.new_empty((sizes[0], weight.shape[0], *sides))


def _reshaped(source: torch.Tensor, shape: Sequence[Any]) -> torch.Tensor | None:
    """Return the fake of a reshape to sizes that are all given."""
    sizes: Sequence[Any] = (*source.shape, *shape)
    if all(isinstance(size, int) for size in sizes) or any(isinstance(size, int) and size < 0 for size in shape):
        return None
    if not statically_known_true(math.prod(source.shape) == math.prod(shape)):
        return None
    return source.new_empty(tuple(shape))


def _product(
    first: torch.Tensor, second: torch.Tensor, left: Sequence[Any], right: Sequence[Any], width: Sequence[Any]
) -> torch.Tensor | None:
    """Return the fake of rows of ``first`` by columns of ``second``, where all axes that must agree do."""
    symbolic = any(not isinstance(size, int) for size in (*first.shape, *second.shape))
    agree = first.ndim >= 3 and _same(first.shape[:-2], second.shape[:-2]) and _same(left, right)
    if not (symbolic and agree and first.dtype == second.dtype):
        return None
    return first.new_empty((*first.shape[:-1], *width))


def _same(first: Sequence[Any], second: Sequence[Any]) -> bool:
    return len(first) == len(second) and all(statically_known_true(a == b) for a, b in zip(first, second, strict=True))
