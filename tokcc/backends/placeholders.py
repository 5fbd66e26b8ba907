"""Prompts and their placeholders: as many of them as an image has tokens, and the positions of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tokcc.errors import UsageError

__all__ = ["Chunk", "expand", "grid_positions", "shared_rows"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Chunk:
    """Placeholders that stand together for one piece of an image.

    Attributes:
        stock: How many a stock processor writes.
        rows: How many features the engine gives.
        grid: Frames, rows and columns of the `stock` tokens, where positions are a grid.
        kept: Which of the `stock` tokens the features are, int64 ``[rows]``; None = all.
        last: Whether it ends an image.
    """

    stock: int
    rows: int
    grid: tuple[int, int, int] | None = None
    kept: Array | None = None
    last: bool = True


def expand(prompt: Sequence[int], token: int, chunks: Sequence[Chunk]) -> list[int]:
    """Return a prompt with as many placeholders as there are features.

    A prompt may have one placeholder for every image, one for every piece of an image, as many as a stock processor
    writes, or already as many as are wanted.

    Args:
        prompt: Token ids.
        token: The placeholder.
        chunks: The pieces of its images, in order.

    Raises:
        UsageError: The number of placeholders fits none of these.
    """
    found = sum(1 for item in prompt if item == token)
    if found == sum(chunk.rows for chunk in chunks):
        return list(prompt)
    images = sum(chunk.last for chunk in chunks)
    if found == images:
        whole: list[int] = []
        rows = 0
        for chunk in chunks:
            rows += chunk.rows
            if chunk.last:
                whole.append(rows)
                rows = 0
        return _replaced(prompt, token, [1] * images, whole)
    each = [chunk.rows for chunk in chunks]
    if found == len(chunks):
        return _replaced(prompt, token, [1] * found, each)
    stock = [chunk.stock for chunk in chunks]
    if found == sum(stock):
        return _replaced(prompt, token, stock, each)
    raise UsageError(
        "placeholders and images of a prompt do not fit",
        needed=f"{images} (one for each image), {sum(stock)} (as the model's processor writes them) or {sum(each)} "
        f"tokens {token}",
        found=str(found),
        help="give each prompt its own images, in the order of the placeholders",
    )


def _replaced(prompt: Sequence[int], token: int, before: Sequence[int], after: Sequence[int]) -> list[int]:
    """Write ``after[i]`` placeholders where the i-th group of ``before[i]`` begins, and leave the group out."""
    made: list[int] = []
    group, left = -1, 0
    for item in prompt:
        if item != token:
            made.append(item)
            continue
        if left == 0:
            group += 1
            left = before[group]
            made += [token] * after[group]
        left -= 1
    return made


def grid_positions(prompt: Sequence[int], token: int, chunks: Sequence[Chunk]) -> Array:
    """Return the positions ``[3, S]`` of an expanded prompt by frame, row and column (M-RoPE, arXiv:2409.12191).

    Text counts on in all three axes; an image's tokens have their place in the grid, and the text behind it goes on
    after its longer side, however many of them were left out.

    Args:
        prompt: With a placeholder for every feature.
        token: The placeholder.
        chunks: The pieces of its images, in order.
    """
    columns: list[Array] = []
    start, place, waiting = 0, 0, iter(chunks)
    while place < len(prompt):
        if prompt[place] != token:
            columns.append(np.full((3, 1), start))
            start, place = start + 1, place + 1
            continue
        chunk = next(waiting)
        assert chunk.grid is not None
        own = np.stack(np.meshgrid(*(np.arange(size) for size in chunk.grid), indexing="ij")).reshape(3, -1)
        columns.append(start + (own if chunk.kept is None else own[:, chunk.kept]))
        start, place = start + max(chunk.grid[1:]), place + chunk.rows
    return np.concatenate(columns, 1).astype(np.int64)


def shared_rows(prompt: Sequence[int], token: int, assign: Array) -> tuple[Array, Array, Array]:
    """Return the rows that a prompt's tokens share, for a decoder that attends to merged tokens one by one.

    Args:
        prompt: With all placeholders.
        token: The placeholder.
        assign: int64 ``[placeholders]``: the feature that each of them reads.

    Returns:
        int64 ``[U]``, the token that each row is the embedding of, and ``[U]``, the feature that it is, -1 for none: in
        the order in which tokens first read them. int64 ``[N]``, the row of each token.
    """
    ids = np.asarray(prompt, np.int64)
    key = np.arange(len(ids))
    key[ids == token] = len(ids) + assign
    read, first, back = np.unique(key, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    feature = np.where(read >= len(ids), read - len(ids), -1)
    return first[order], feature[order], rank[back.reshape(-1)]
