"""Where tokens of an image are in space, from the depth of its pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tokcc.ir.builder import Builder
from tokcc.passes.inputs import EngineInput

__all__ = ["DEPTH", "points_of_depth"]

aten = torch.ops.aten

DEPTH: Sequence[EngineInput] = (
    EngineInput(
        "depth", ("B", "H", "W"), "distance of every pixel along the camera's axis; 0 = not known", low=0.0, high=4.0
    ),
    EngineInput("intrinsics", ("B", 3, 3), "camera matrix in pixels, without skew", unguided=1.0, low=1.0, high=2.0),
    EngineInput("pose", ("B", 4, 4), "camera to world"),
)
"""What places are computed from."""


def points_of_depth(b: Builder, depth: Any, intrinsics: Any, pose: Any, rows: int, columns: int) -> tuple[Any, Any]:
    """Return the place of every token, the mean over its pixels of known depth.

    ``p = R K^-1 (u, v, 1) d + t`` (SeGPruner, arXiv:2603.29437); it is linear in the pixels, so their mean comes first.

    Args:
        b: The builder.
        depth: fp32 ``[B, H, W]`` of a fixed size.
        intrinsics: fp32 ``[B, 3, 3]``.
        pose: fp32 ``[B, 4, 4]``.
        rows: Rows of tokens, which divide H.
        columns: Columns of tokens, which divide W.

    Returns:
        fp32 ``[B, N, 3]`` and which tokens have any pixel of known depth, bool ``[B, N]``.
    """
    height, width = b.shape(depth)[1:]
    size = b.size(depth, 0)

    def per_token(x: Any) -> Any:
        """Sum ``[B, H, W]`` over the pixels of each token: ``[B, N]``."""
        cells = b.reshape(x, [size, rows, height // rows, columns, width // columns])
        return b.reshape(b.sum(b.sum(cells, 4), 2), [size, rows * columns])

    def entry(row: int, column: int) -> Any:
        return b.slice(b.slice(intrinsics, 1, row, row + 1), 2, column, column + 1)  # [B, 1, 1]

    known = b.compare("gt", depth, 0.0)
    z = b.where(known, depth, 0.0)
    u = b.cast(b.arange(width, depth), torch.float32)
    v = b.unsqueeze(b.cast(b.arange(height, depth), torch.float32), 1)
    x = b.mul(b.div(b.sub(u, entry(0, 2)), entry(0, 0)), z)
    y = b.mul(b.div(b.sub(v, entry(1, 2)), entry(1, 1)), z)
    count = per_token(b.cast(known, torch.float32))
    total = b.call(aten.stack.default, [per_token(part) for part in (x, y, z)], 2)  # [B, N, 3]
    camera = b.div(total, b.unsqueeze(b.clamp_min(count, 1.0), 2))
    turn = b.slice(b.slice(pose, 1, 0, 3), 2, 0, 3)  # [B, 3, 3]
    shift = b.transpose(b.slice(b.slice(pose, 1, 0, 3), 2, 3, 4), 1, 2)  # [B, 1, 3]
    world = b.add(b.matmul(camera, b.transpose(turn, 1, 2)), shift)
    return world, b.compare("gt", count, 0.0)
