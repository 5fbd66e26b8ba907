"""Sampling an image at places."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tokcc.errors import LoweringError
from tokcc.lowering.onnx.translate import Translator, ir_dtype

__all__ = ["LOWERINGS"]

aten = torch.ops.aten
_MODES = ("bilinear", "nearest", "bicubic")
_LATER_MODES = ("linear", "nearest", "cubic")
_PADDINGS = ("zeros", "border", "reflection")


def grid_sampler(
    t: Translator, node: fx.Node, image: Any, grid: Any, mode: int, padding: int, align_corners: bool
) -> Any:
    """``grid_sample`` of images; ONNX has it from opset 16 on, of volumes from opset 20 on."""
    if image.meta["val"].ndim != 4:
        raise LoweringError("sampling from a volume", node=node.name)
    names = _MODES if t.op.opset < 20 else _LATER_MODES
    how: dict[str, Any] = {"mode": names[mode], "padding_mode": _PADDINGS[padding], "align_corners": int(align_corners)}
    own = int(ir_dtype(image.meta["val"].dtype))
    if image.meta["val"].dtype == torch.float32:
        return t.op("GridSample", t.value(image), t.value(grid), **how)
    # ONNX Runtime samples in fp32 only.
    wide = [t.op("Cast", t.value(x), to=int(ir_dtype(torch.float32))) for x in (image, grid)]
    return t.op("Cast", t.op("GridSample", *wide, **how), to=own)


LOWERINGS: dict[Any, Any] = {aten.grid_sampler.default: grid_sampler}
