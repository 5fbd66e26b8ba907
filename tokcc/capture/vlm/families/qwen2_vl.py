"""Qwen2-VL and Qwen2.5-VL: towers whose attention runs over segments that the image's shape decides.

An engine is made for one shape: lengths of segments are numbers in the graph, and everything that is computed from the
shape is a constant. The input is the patches alone, in the order of transformers' processor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokcc.capture.vlm.family import Encoder, Family, Placeholders
from tokcc.errors import UsageError

__all__ = ["FAMILY"]

_DEFAULT = 448
"""Height and width of the image, in pixels, where none is given."""


class _Lengths:
    """Bounds of segments that are known as numbers: what stands in for ``cu_seqlens`` in the tower's attention.

    The attention takes differences of neighbouring bounds and makes a list of them; a tensor would be data there.
    """

    def __init__(self, bounds: list[int]) -> None:
        self.bounds = bounds

    def __getitem__(self, span: slice) -> _Lengths:
        return _Lengths(self.bounds[span])

    def __sub__(self, other: _Lengths) -> _Lengths:
        return _Lengths([a - b for a, b in zip(self.bounds, other.bounds, strict=True)])

    def tolist(self) -> list[int]:
        return self.bounds


class _OneShape(nn.Module):
    """The tower on images of one shape."""

    def __init__(self, model: Any, rows: int, columns: int) -> None:
        super().__init__()
        self.tower = model.model.visual
        grid = torch.tensor([[1, rows, columns]])
        self.known, self.bounds = _computed(self.tower, grid)
        for name, value in self.known.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Return ``image_features`` ``[1, N, H]`` of patches ``[rows * columns, width]``."""
        given: dict[str, Any] = {name: getattr(self, name) for name in self.known}
        given |= {name: _Lengths(bounds) for name, bounds in self.bounds.items()}
        features = self.tower(pixel_values, grid_thw=None, **given).pooler_output
        return {"image_features": features[None]}


def _computed(tower: Any, grid: Tensor) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """Return what a tower computes from an image's shape: tensors, and bounds of segments."""
    from transformers import vision_utils

    config = tower.config
    tensors = {"position_ids": vision_utils.get_vision_position_ids(grid, config.spatial_merge_size)}
    bounds = {"cu_seqlens": vision_utils.get_vision_cu_seqlens(grid).tolist()}
    if hasattr(config, "window_size"):
        tensors["window_index"], windows = vision_utils.get_vision_window_index(
            grid, config.spatial_merge_size, config.window_size, config.patch_size
        )
        bounds["cu_window_seqlens"] = windows.tolist()
    return tensors, bounds


def _encoder(model: Any, size: tuple[int, int] | None, dtype: torch.dtype) -> Encoder:
    config = model.config.vision_config
    merge = int(config.spatial_merge_size)
    step = int(config.patch_size) * merge
    height, width = size or (_DEFAULT, _DEFAULT)
    if height % step or width % step:
        raise UsageError(
            "the image cannot be cut into blocks of patches",
            needed=f"height and width divisible by {step}",
            found=f"{height} x {width}",
        )
    rows, columns = height // step * merge, width // step * merge
    channels = int(config.in_channels)
    patch = channels * int(config.temporal_patch_size) * int(config.patch_size) ** 2
    pixels = torch.randn(rows * columns, patch, generator=torch.Generator().manual_seed(0)).to(dtype)
    return Encoder(
        _OneShape(model, rows, columns),
        {"pixel_values": pixels},
        None,
        grid=(1, rows // merge, columns // merge),
        pixels=(height, width),
    )


def _placeholders(config: Any, stock: int, count: int) -> Placeholders:
    del config, stock, count
    return Placeholders(
        refusal="the processor counts placeholders from the shape of the image, and runtimes count positions from it, "
        "too: own expansion is needed, with the positions of the tokens that are kept"
    )


FAMILY = Family(
    "Qwen2-VL",
    ("qwen2_vl", "qwen2_5_vl"),
    _encoder,
    _placeholders,
    positions="grid",
    notes=("the encoder is made for images of one shape (--input pixel_values=fp32[1,3,HEIGHT,WIDTH]), one at a time",),
)
