"""Orders in which tokens stand beside those with similar keys."""

from __future__ import annotations

from typing import Any

import torch

from tokcc.ir.builder import Builder

__all__ = ["halved", "main_directions"]

aten = torch.ops.aten

_GROUP, _CLASS = 2**24, 2**50
"""What a group and a class weigh in a key of sorting: more than there are tokens, and groups."""
_TINY = 1e-12


def main_directions(b: Builder, x: Any, count: int, rounds: int) -> list[Any]:
    """Return the directions in which vectors spread most, by repeated multiplication with what they spread.

    Each begins with equal numbers; what it has found is taken out before the next one is looked for.

    Args:
        b: The builder.
        x: fp32 ``[B, H, N, D]``, of mean 0; zeros count nothing.
        count: Directions.
        rounds: Multiplications.

    Returns:
        fp32 ``[B, H, D, 1]`` each, of length 1, or 0 where nothing spreads any more.
    """
    spread = b.matmul(b.transpose(x, 2, 3), x)  # [B, H, D, D]
    batch, heads, width = b.size(x, 0), int(b.shape(x)[1]), int(b.shape(x)[3])
    found = []
    for _ in range(count):
        direction = b.full([batch, heads, width, 1], width**-0.5, torch.float32, x)
        for _ in range(rounds):
            direction = b.matmul(spread, direction)
            length = b.sqrt(b.sum(b.mul(direction, direction), 2, keepdim=True))
            direction = b.div(direction, b.clamp_min(length, _TINY))
        found.append(direction)
        across = b.transpose(direction, 2, 3)
        strength = b.matmul(across, b.matmul(spread, direction))  # [B, H, 1, 1]
        spread = b.sub(spread, b.mul(strength, b.matmul(direction, across)))
    return found


def halved(b: Builder, key: Any, free: Any, page: int, times: int, rounds: int) -> Any:
    """Return an order in which pages of tokens have similar keys, int64 ``[B, H, N]``.

    The tokens are sorted along the direction in which their keys spread most and cut in two; each half is sorted along
    the next one and cut, and so on. Cuts are between pages. Only the tokens of one run are moved, among themselves.

    Args:
        b: The builder.
        key: ``[B, H, N, D]``.
        free: bool ``[B, N]``: the run.
        page: Tokens of a page, which are counted from the run's beginning.
        times: Sorts; all but the last are followed by a cut.
        rounds: For :func:`main_directions`.
    """
    batch, heads, tokens = b.size(key, 0), int(b.shape(key)[1]), b.size(key, 2)
    whole = [batch, heads, tokens]
    inside = b.cast(free, torch.int64)
    many = b.sum(inside, 1, keepdim=True)  # [B, 1]
    passed = b.call(aten.cumsum.default, inside, 1)  # [B, N]: tokens of the run up to here
    before = b.logical_and(b.logical_not(free), b.compare("eq", passed, 0))
    behind = b.logical_and(b.logical_not(free), b.compare("gt", passed, 0))
    front = b.unsqueeze(b.sum(b.cast(before, torch.int64), 1, keepdim=True), 1)  # [B, 1, 1]
    place = b.arange(tokens, key)
    # Tokens outside of the run keep their order in front of it and behind it.
    fixed = b.unsqueeze(b.add(b.where(behind, 2 * _CLASS, 0), place), 1)  # [B, 1, N]
    moving = b.expand(b.unsqueeze(free, 1), whole)
    weight = b.unsqueeze(b.unsqueeze(b.cast(free, torch.float32), 1), 3)
    x = b.mul(b.cast(key, torch.float32), weight)
    mean = b.div(b.sum(x, 2, keepdim=True), b.clamp_min(b.sum(weight, 2, keepdim=True), 1.0))
    x = b.mul(b.sub(x, mean), weight)
    pages = b.unsqueeze(b.clamp_min(b.call(aten.floor_divide.default, b.add(many, page - 1), page), 1), 1)  # [B, 1, 1]
    group = b.full(whole, 0, torch.int64, key)
    order = None
    for level, direction in enumerate(main_directions(b, x, times, rounds)):
        along = _places(b, _sorted(b, b.squeeze(b.matmul(x, direction), 3)))  # [B, H, N]
        rank = b.add(b.add(b.mul(group, _GROUP), along), _CLASS)
        order = _sorted(b, b.where(moving, rank, fixed))
        own = b.call(aten.floor_divide.default, b.clamp_min(b.sub(_places(b, order), front), 0), page)
        group = b.call(aten.div.Tensor_mode, b.mul(own, 2 ** (level + 1)), pages, rounding_mode="floor")
    assert order is not None
    return order


def _sorted(b: Builder, x: Any) -> Any:
    """Return the order of ascending numbers along the last axis."""
    return b.parts(b.call(aten.topk.default, x, b.size(x, 2), -1, False, True), 2)[1]


def _places(b: Builder, order: Any) -> Any:
    """Return where each token of ``[B, H, N]`` stands in an order."""
    sizes = [b.size(order, axis) for axis in range(3)]
    numbers = b.expand(b.arange(sizes[2], order), sizes)
    return b.scatter(b.full(sizes, 0, torch.int64, order), 2, order, numbers)
