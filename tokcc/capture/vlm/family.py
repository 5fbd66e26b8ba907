"""What is known of a family of vision-language models: its encoder, and how placeholders in prompts are counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim

__all__ = [
    "AUDIO",
    "IMAGE",
    "Encoder",
    "Family",
    "FieldEdit",
    "Medium",
    "Placeholders",
    "PooledFeatures",
    "image_batch",
    "one_field",
    "pooled_encoder",
    "square",
]

_EXAMPLES = 2
"""Images of an example call: torch.export makes an axis of size 1 static."""


@dataclass(frozen=True)
class Medium:
    """What an encoder reads.

    Attributes:
        part: The encoder's name, which is also its file's, after transformers.js.
        input: Its main input.
        output: Its output, ``[n, N, H]``.
        lengths: Its output int64 ``[n]`` that says how many of the N count, where there is one.
    """

    part: str
    input: str
    output: str
    lengths: str | None = None


IMAGE = Medium("vision_encoder", "pixel_values", "image_features")
AUDIO = Medium("audio_encoder", "input_features", "audio_features", "audio_lengths")


@dataclass(frozen=True)
class Encoder:
    """An encoder that can be traced: tower, selection of features and projector in one module.

    Attributes:
        module: Takes the medium's input, returns a dict with the medium's output ``[n, N, H]``.
        inputs: An example call by name.
        dynamic: Dynamic axes in torch.export's form; None = all static.
        grid: Frames, rows and columns of the output's tokens, where the decoder's positions have these three axes.
        pixels: Height and width of the images, where it is made for one shape.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    dynamic: dict[str, Any] | None
    grid: tuple[int, int, int] | None = None
    pixels: tuple[int, int] | None = None


@dataclass(frozen=True)
class FieldEdit:
    """A field that stock processors read.

    Attributes:
        file: Of the model folder.
        field: Top-level key in it.
        value: What it has to be.
    """

    file: str
    field: str
    value: int | str


@dataclass(frozen=True)
class Placeholders:
    """How a prompt comes by as many placeholders as an image has tokens.

    Attributes:
        edits: Fields that make transformers' processor write that number.
        javascript: The same for transformers.js, where it counts otherwise.
        refusal: Why no field can, or None.
    """

    edits: tuple[FieldEdit, ...] = ()
    javascript: tuple[FieldEdit, ...] = ()
    refusal: str | None = None


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        name: For messages and manifests.
        model_types: In config.json.
        encoder: Takes the model, its image size (height, width; None = the model's own) and the dtype of its inputs.
        placeholders: Takes the configuration, tokens of one unit as the model was made, and as the engine gives them.
        token: Attribute of the configuration that holds the placeholder's id.
        unit: What ``n`` counts: whole images, tiles of images, or sounds.
        medium: What the encoder reads.
        positions: ``rows`` = one number a token, ``grid`` = frame, row and column of each (M-RoPE).
        packing: How the rows of several units become those of one image: ``flat`` = one after the other, ``anyres`` =
            as a grid of tiles, cut to the image's shape, with a learned row at the end of each line.
        notes: What a report has to say.
    """

    name: str
    model_types: tuple[str, ...]
    encoder: Callable[[Any, tuple[int, int] | None, torch.dtype], Encoder]
    placeholders: Callable[[Any, int, int], Placeholders]
    token: str = "image_token_id"
    unit: Literal["image", "tile", "sound"] = "image"
    medium: Medium = IMAGE
    positions: Literal["rows", "grid"] = "rows"
    packing: Literal["flat", "anyres"] = "flat"
    notes: tuple[str, ...] = field(default=())


class PooledFeatures(nn.Module):
    """What a model itself gives as the features of images, where that is one tensor for all of them.

    Args:
        model: The whole model.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Return ``image_features`` ``[n, N, H]`` of ``pixel_values`` ``[n, C, H, W]``."""
        model: Any = self.model
        return {IMAGE.output: model.get_image_features(pixel_values).pooler_output}


def image_batch(
    config: Any, size: tuple[int, int] | None, dtype: torch.dtype, own: tuple[int, int]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an example ``pixel_values`` ``[n, C, H, W]`` and its dynamic axes: n alone.

    Args:
        config: The vision configuration.
        size: Height and width, or None for the model's own.
        dtype: Of the pixels.
        own: The model's own size.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (_EXAMPLES, int(getattr(config, "num_channels", 3)), *(size or own))
    pixels = torch.randn(shape, generator=generator).to(dtype)
    return {IMAGE.input: pixels}, {IMAGE.input: {0: Dim("images", min=1)}}


def square(config: Any) -> tuple[int, int]:
    """Return height and width of a configuration's ``image_size``."""
    size = config.image_size
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


def pooled_encoder(model: Any, size: tuple[int, int] | None, dtype: torch.dtype) -> Encoder:
    """Return the encoder of a family whose model itself gives the features of images as one tensor."""
    config = model.config.vision_config
    return Encoder(PooledFeatures(model), *image_batch(config, size, dtype, square(config)))


def one_field(field: str) -> Callable[[Any, int, int], Placeholders]:
    """Return the placeholders of a family whose processor has their number in one field."""

    def placeholders(config: Any, stock: int, count: int) -> Placeholders:
        del config, stock
        edit = FieldEdit("processor_config.json", field, count)
        return Placeholders((edit,), (edit,))

    return placeholders
