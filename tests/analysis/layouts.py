"""Tensors whose axes are named by a string such as ``"(b h) n d"``: what the oracle gathers and compares with.

Letters: ``b`` batch, ``n`` tokens, ``p`` tokens that probabilities are spread over, ``h`` heads, any other letter or
number an axis without meaning. This is deliberately not the code under test: no tags, no factors, one sample at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["HEADS", "parse", "sample", "spread"]

HEADS = 2


def parse(layout: str) -> list[tuple[str, ...]]:
    """Return the letters of each axis."""
    axes: list[tuple[str, ...]] = []
    group: list[str] | None = None
    for word in layout.replace("(", " ( ").replace(")", " ) ").split():
        if word == "(":
            group = []
        elif word == ")":
            assert group is not None
            axes.append(tuple(group))
            group = None
        elif group is not None:
            group.append(word)
        else:
            axes.append((word,))
    return axes


def _split(t: Tensor, layout: str, batch: int, tokens: int) -> tuple[Tensor, list[str]]:
    """Give every letter its own axis."""
    sizes = {"b": batch, "n": tokens, "p": tokens, "h": HEADS}
    axes = parse(layout)
    assert len(axes) == t.ndim, f"{layout} does not describe {list(t.shape)}"
    shape: list[int] = []
    for axis, size in zip(axes, t.shape, strict=True):
        shape += [sizes[letter] for letter in axis] if len(axis) > 1 else [size]
    letters = [letter for axis in axes for letter in axis]
    for letter, size in zip(letters, shape, strict=True):
        assert size == sizes.get(letter, size), f"{letter} of {layout} is {size}, not {sizes[letter]}"
    return t.reshape(shape), letters


def _fuse(t: Tensor, layout: str) -> Tensor:
    shape: list[int] = []
    place = 0
    for axis in parse(layout):
        shape.append(torch.Size(t.shape[place : place + len(axis)]).numel())
        place += len(axis)
    return t.reshape(shape)


def sample(t: Tensor, layout: str, batch: int, tokens: int, own: int, rows: Tensor) -> Tensor:
    """Return one sample (the batch axis stays, of size one) with the given tokens on every token axis."""
    wide, letters = _split(t, layout, batch, tokens)
    for axis, letter in enumerate(letters):
        if letter == "b":
            wide = wide.narrow(axis, own, 1)
        elif letter in "np":
            wide = wide.index_select(axis, rows)
    return _fuse(wide, layout)


def spread(t: Tensor, layout: str, tokens: int, owner: Tensor, groups: int) -> Tensor:
    """Collapse repeated tokens of one sample: any copy on ``n`` axes, the sum of the copies on ``p`` axes."""
    wide, letters = _split(t, layout, 1, tokens)
    copies = torch.stack([torch.nonzero(owner == group)[0, 0] for group in range(groups)])
    for axis, letter in enumerate(letters):
        if letter == "n":
            wide = wide.index_select(axis, copies)
        elif letter == "p":
            shape = [*wide.shape[:axis], groups, *wide.shape[axis + 1 :]]
            wide = wide.new_zeros(shape).index_add(axis, owner, wide)
    return _fuse(wide, layout)
