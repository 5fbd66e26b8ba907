"""How a picture becomes the model's input: read from Hugging Face processor files, or the usual ImageNet way.

Only what `preprocessor_config.json` says is followed, with pillow and numpy: no torchvision, no code of the model's
repository. What it does not say, or what does not fit the engine's input, becomes a note in the report.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tokcc.errors import UsageError
from tokcc.report.batches import InputSpec
from tokcc.report.distances import Array
from tokcc.report.extras import require

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ImagePlan", "find_image_input", "plan_images", "read_picture"]

_BICUBIC = 3
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_DEFAULT_SIZE = 224
_DEFAULT_CROP = 0.875

Size2 = tuple[int, int]


def read_picture(path: Path, mode: str = "RGB") -> Image:
    """Read a picture, turned as it was taken.

    Args:
        path: The file.
        mode: Pillow's name of the colours.

    Raises:
        UsageError: The file is no picture that pillow can read, or pillow is not installed.
    """
    require("PIL", "calibration with images")
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            return ImageOps.exif_transpose(opened).convert(mode)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UsageError(
            f"cannot read the image {path}", found=str(error), help="remove or repair it; it is damaged or no image"
        ) from error


@dataclass(frozen=True)
class ImagePlan:
    """Steps from a picture to one sample of an image input.

    Attributes:
        spec: The image input.
        channels: 1 or 3.
        channels_last: Whether the channel axis is the last one.
        size: Height and width of the result; what is larger is cropped at the centre, what is smaller padded.
        resize: Before that: an int is the length of the shorter side, a pair is height and width, None is no change.
        resample: Pillow's number of the filter.
        scale: Factor on the pixel values.
        mean: Subtracted per channel after scaling.
        std: Divided by per channel.
    """

    spec: InputSpec
    channels: int
    channels_last: bool
    size: Size2
    resize: int | Size2 | None
    resample: int = _BICUBIC
    scale: float = 1 / 255
    mean: tuple[float, ...] = _IMAGENET_MEAN
    std: tuple[float, ...] = _IMAGENET_STD

    def pixels(self, path: Path) -> Array:
        """Read a picture, resized and cropped: uint8 ``[H, W, 3]`` or ``[H, W, 1]``, as the model sees it.

        Raises:
            UsageError: The file is no picture that pillow can read.
        """
        from PIL import Image

        image = read_picture(path, "L" if self.channels == 1 else "RGB")
        target = self._resized(image.height, image.width)
        if (image.height, image.width) != target:
            image = image.resize((target[1], target[0]), Image.Resampling(self.resample))
        array = np.asarray(image)
        return _centre_crop(array.reshape(*array.shape[:2], self.channels), self.size)

    def _resized(self, height: int, width: int) -> Size2:
        if self.resize is None:
            return height, width
        if isinstance(self.resize, tuple):
            return self.resize
        shorter, longer = sorted((height, width))
        long_side = self.resize * longer // shorter  # cut off, not rounded: what transformers does
        return (self.resize, long_side) if height <= width else (long_side, self.resize)

    def normalised(self, pixels: Array) -> Array:
        """Return the model's input for the pixels, without the batch axis."""
        if np.dtype(self.spec.dtype).kind in "iu":  # the model normalises by itself
            values: Array = pixels
        else:
            scaled = pixels.astype(np.float64) * self.scale
            values = ((scaled - np.asarray(self.mean)) / np.asarray(self.std)).astype(np.float32)
        return values if self.channels_last else np.ascontiguousarray(values.transpose(2, 0, 1))


def _centre_crop(array: Array, size: Size2) -> Array:
    """Crop around the centre; what is smaller is padded with black first."""
    missing = [max(0, wanted - found) for wanted, found in zip(size, array.shape[:2], strict=True)]
    if any(missing):
        before = [(count + 1) // 2 for count in missing]
        array = np.pad(array, [(b, m - b) for b, m in zip(before, missing, strict=True)] + [(0, 0)])
    top, left = ((found - wanted) // 2 for found, wanted in zip(array.shape[:2], size, strict=True))
    return np.ascontiguousarray(array[top : top + size[0], left : left + size[1]])


def find_image_input(specs: Sequence[InputSpec]) -> InputSpec:
    """Return the only input that takes pictures: four axes, one of them 1 or 3 channels.

    Raises:
        UsageError: There is none, or the model needs other inputs too.
    """
    found = [spec for spec in specs if _channel_axis(spec) is not None]
    if len(found) == 1 and len(specs) == 1:
        return found[0]
    if not found:
        raise UsageError(
            "the model takes no images",
            needed="an input [batch, 3, height, width]",
            found=", ".join(map(str, specs)),
            help="give an .npz with one array per input, or text (.jsonl, .txt)",
        )
    raise UsageError(
        "a folder of images feeds one input, but the model has more",
        needed=", ".join(map(str, specs)),
        found=found[0].name,
        help="give an .npz with one array per input name",
    )


def _channel_axis(spec: InputSpec) -> int | None:
    if len(spec.shape) != 4:
        return None
    return next((axis for axis in (1, 3) if spec.shape[axis] in (1, 3)), None)


def plan_images(specs: Sequence[InputSpec], preprocessor: Path | None) -> tuple[ImagePlan, list[str]]:
    """Decide how pictures become the model's image input.

    Args:
        specs: The engine's inputs.
        preprocessor: Folder with ``preprocessor_config.json`` (or a file), if any.

    Returns:
        The plan, and notes on everything that was not given but assumed.

    Raises:
        UsageError: The model takes no images alone, or the processor's file cannot be read.
    """
    spec = find_image_input(specs)
    axis = _channel_axis(spec)
    channels_last = axis == 3
    height, width = spec.shape[1:3] if channels_last else spec.shape[2:]
    fixed = (height, width) if isinstance(height, int) and isinstance(width, int) else None
    channels = spec.shape[axis or 1]
    base = ImagePlan(spec, channels if isinstance(channels, int) else 3, channels_last, (0, 0), None)
    config = _read_config(preprocessor)
    if config is None:
        return _imagenet(base, fixed)
    return _from_config(base, fixed, config)


def _imagenet(base: ImagePlan, fixed: Size2 | None) -> tuple[ImagePlan, list[str]]:
    size = fixed or (_DEFAULT_SIZE, _DEFAULT_SIZE)
    square = size[0] == size[1]
    resize = round(size[0] / _DEFAULT_CROP) if square else size
    plan = replace(
        base,
        size=size,
        resize=resize,
        mean=_channelled(_IMAGENET_MEAN, base),
        std=_channelled(_IMAGENET_STD, base),
    )
    how = f"shorter side to {resize}, centre crop {_text(size)}" if square else f"resized to {_text(size)}"
    return plan, [
        f"images: no preprocessor_config.json comes with the model: assumed bicubic, {how}, ImageNet mean and std"
    ]


def _from_config(base: ImagePlan, fixed: Size2 | None, config: Mapping[str, Any]) -> tuple[ImagePlan, list[str]]:
    notes: list[str] = []
    resize, crop = _sizes(config)
    ends_with = crop or (resize if isinstance(resize, tuple) else None)
    if ends_with is None:
        side = resize if isinstance(resize, int) else _DEFAULT_SIZE
        target = fixed or (side, side)
        notes.append(f"images: the processor gives no fixed size; cropped at the centre to {_text(target)}")
    else:
        target = fixed or ends_with
    if ends_with is not None and ends_with != target:
        notes.append(f"images: the processor makes {_text(ends_with)}, the model takes {_text(target)}: scaled to that")
        resize = _scaled(resize, ends_with, target)
    if isinstance(resize, int):
        resize = max(resize, *target)  # a shorter side below the crop would be padded with black
    normalise = bool(config.get("do_normalize", True))
    mean = _triple(config.get("image_mean"), _IMAGENET_MEAN) if normalise else (0.0,)
    std = _triple(config.get("image_std"), _IMAGENET_STD) if normalise else (1.0,)
    plan = replace(
        base,
        size=target,
        resize=resize,
        resample=int(config.get("resample", _BICUBIC)),
        scale=float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 1.0,
        mean=_channelled(mean, base),
        std=_channelled(std, base),
    )
    return plan, notes


def _sizes(config: Mapping[str, Any]) -> tuple[int | Size2 | None, Size2 | None]:
    """Return what the processor resizes to and what it crops to."""
    size = config.get("size")
    crop = _pair(config.get("crop_size")) if config.get("do_center_crop", "crop_size" in config) else None
    if not config.get("do_resize", True):
        return None, crop
    if isinstance(size, int):
        # Files of old feature extractors: one number is the shorter side where a crop follows, else both sides.
        return (size if crop is not None else (size, size)), crop
    if isinstance(size, Mapping) and isinstance(size.get("shortest_edge"), int):
        shortest, fraction = int(size["shortest_edge"]), config.get("crop_pct")
        if crop is None and isinstance(fraction, float) and 0 < fraction <= 1:  # ConvNeXt: a little larger, then crop
            return int(shortest / fraction), (shortest, shortest)
        return shortest, crop
    return _pair(size), crop


def _scaled(resize: int | Size2 | None, old: Size2, new: Size2) -> int | Size2:
    """Keep the proportion of resizing to cropping at another input size."""
    if resize is None or resize == old:
        return new
    if isinstance(resize, int):
        return round(resize * min(new) / min(old))
    return round(resize[0] * new[0] / old[0]), round(resize[1] * new[1] / old[1])


def _text(size: Size2) -> str:
    return f"{size[0]}x{size[1]}"


def _pair(value: Any) -> Size2 | None:
    if isinstance(value, int):
        return value, value
    if isinstance(value, Mapping) and isinstance(value.get("height"), int) and isinstance(value.get("width"), int):
        return int(value["height"]), int(value["width"])
    if isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(v, int) for v in value):
        return int(value[0]), int(value[1])
    return None


def _triple(value: Any, default: tuple[float, ...]) -> tuple[float, ...]:
    if isinstance(value, int | float):
        return (float(value),) * 3
    if isinstance(value, list) and value and all(isinstance(v, int | float) for v in value):
        return tuple(map(float, value))
    return default


def _channelled(values: tuple[float, ...], plan: ImagePlan) -> tuple[float, ...]:
    return values if len(values) == plan.channels else (sum(values) / len(values),) * plan.channels


def _read_config(preprocessor: Path | None) -> Mapping[str, Any] | None:
    if preprocessor is None:
        return None
    folder = preprocessor if preprocessor.is_dir() else preprocessor.parent
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read {path}", found=str(error), help="repair or remove it") from error
        config = config.get("image_processor", config) if isinstance(config, dict) else None
        if isinstance(config, dict) and ("size" in config or "image_mean" in config or "crop_size" in config):
            return config
    return None
