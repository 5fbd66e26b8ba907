"""The rows of an image that was cut into tiles: laid side by side, cut to its shape, a row at the end of each line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tokcc.errors import UsageError

__all__ = ["best_resolution", "packed"]

Array = npt.NDArray[Any]


def packed(
    features: Array,
    size: tuple[int, int] | None,
    pinpoints: Sequence[tuple[int, int]],
    tile: int,
    line_end: Array | None,
) -> Array:
    """Return the rows ``[rows, H]`` of one image (LLaVA-NeXT, `spatial_unpad`).

    Args:
        features: ``[n, N, H]`` of the whole image, scaled down, and then of its tiles; N is a square.
        size: Height and width of the image before it was cut.
        pinpoints: Heights and widths that images are scaled to.
        tile: Side of a tile in pixels.
        line_end: The row ``[H]`` behind each line of tiles, or None.

    Raises:
        UsageError: The number of tiles is not that of the image's size.
    """
    end = [] if line_end is None else [line_end.astype(features.dtype)[None]]
    if len(features) == 1:
        return np.concatenate([features[0], *end])
    if size is None:
        raise UsageError("the image was cut into tiles, and its size is not known", needed="Picture(units, size=...)")
    height, width = best_resolution(size, pinpoints)
    down, across = height // tile, width // tile
    if len(features) != 1 + down * across:
        raise UsageError(
            f"an image of {size[0]} x {size[1]} is cut in another way",
            needed=f"1 + {down} x {across} tiles",
            found=f"{len(features)} tiles",
        )
    side = math.isqrt(features.shape[1])
    grid = features[1:].reshape(down, across, side, side, -1).transpose(0, 2, 1, 3, 4)
    grid = _unpadded(grid.reshape(down * side, across * side, -1), size)
    if line_end is not None:
        column = np.broadcast_to(line_end.astype(grid.dtype), (len(grid), 1, grid.shape[2]))
        grid = np.concatenate([grid, column], 1)
    return np.concatenate([features[0], grid.reshape(-1, grid.shape[2])])


def best_resolution(size: tuple[int, int], possible: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the height and width that show most of an image, and of those the one that wastes least."""

    def worth(target: tuple[int, int]) -> tuple[int, int]:
        scale = min(target[1] / size[1], target[0] / size[0])
        shown = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        return shown, shown - target[0] * target[1]

    return max(possible, key=worth)


def _unpadded(grid: Array, size: tuple[int, int]) -> Array:
    """Cut off the borders that an image of another shape was filled up with."""
    height, width = grid.shape[:2]
    if size[1] / size[0] > width / height:
        border = (height - int(round(size[0] * (width / size[1]), 7))) // 2
        return grid[border : height - border]
    border = (width - int(round(size[1] * (height / size[0]), 7))) // 2
    return grid[:, border : width - border]
