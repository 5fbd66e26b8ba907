"""From text and image files to tokens and pictures, with the processor that lies in a bundle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tokcc.backends.manifest import Media
from tokcc.backends.packing import best_resolution
from tokcc.backends.vlm import Picture
from tokcc.errors import UsageError

__all__ = ["Processor", "pictures_of"]

Array = npt.NDArray[Any]


class Processor:
    """The stock processor of a model, read from local files.

    Args:
        folder: The bundle.
        media: What its manifest says of images.
        tile: Side of what the encoder reads, in pixels, where it is known.

    Raises:
        UsageError: There is no processor, or nothing that reads it.
    """

    def __init__(self, folder: Path, media: Media, *, tile: int = 0) -> None:
        try:
            from transformers import AutoProcessor
        except ImportError as error:
            raise UsageError("images need transformers", help='pip install "tokcc[hf]"') from error
        try:
            self._processor: Any = AutoProcessor.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # transformers gives many kinds of error for files that are missing or foreign
            raise UsageError(
                f"`{folder}` has no processor that transformers reads",
                needed="the model's processor and tokenizer files",
                found=(str(error).splitlines() or [type(error).__name__])[0][:300],
                help="compile from a folder that has them, or use `tokcc.backends.vlm` with arrays and token ids",
            ) from error
        self._media, self._tile = media, tile

    def read(self, prompt: str, images: Sequence[Path]) -> tuple[list[int], list[Picture]]:
        """Return the tokens of a prompt and its pictures.

        Args:
            prompt: Text; where it has no placeholder, those of all images are put in front.
            images: Files.

        Raises:
            UsageError: A file is no image, or the processor does not take them.
        """
        opened = [self._open(path) for path in images]
        token = str(getattr(self._processor, "image_token", "<image>"))
        if images and token not in prompt:
            prompt = token * len(images) + prompt
        try:
            made = self._processor(images=opened or None, text=[prompt], return_tensors="np")
        except Exception as error:  # a processor raises whatever it likes
            raise UsageError(
                "the processor does not take text and images",
                found=(str(error).splitlines() or [type(error).__name__])[0][:300],
                help=f"write `{token}` once for each image",
            ) from error
        arrays = {name: np.asarray(value) for name, value in made.items()}
        ids = [int(item) for item in arrays["input_ids"][0]]
        return ids, list(pictures_of(arrays, self._media, self._tile)) if images else []

    def _open(self, path: Path) -> Any:
        try:
            from PIL import Image
        except ImportError as error:
            raise UsageError("images need pillow", help='pip install "tokcc[hf]"') from error
        try:
            image = Image.open(path).convert("RGB")
        except OSError as error:  # a file that is missing, or no image
            raise UsageError(f"`{path}` is not an image", found=str(error).splitlines()[0]) from error
        height, width = self._media.pixels or (0, 0)
        # An engine for one shape: the processor leaves an image of that shape as it is.
        return image.resize((width, height)) if height else image


def pictures_of(arrays: Mapping[str, Array], media: Media, tile: int = 0) -> Iterator[Picture]:
    """Yield the pictures of what a processor gives for one prompt.

    Args:
        arrays: Its output.
        media: What the manifest says of images.
        tile: Side of a tile in pixels, where tiles are packed.
    """
    units = arrays[media.input]
    beside = {name: arrays[name] for name in ("feature_attention_mask",) if name in arrays}
    if "image_grid_thw" in arrays:
        counts = [int(np.prod(grid)) for grid in arrays["image_grid_thw"]]
        yield from (Picture(part) for part in np.split(units, np.cumsum(counts)[:-1]))
    elif media.packing == "anyres":
        for own, size in zip(units, arrays["image_sizes"], strict=True):
            shape = int(size[0]), int(size[1])
            height, width = best_resolution(shape, media.pinpoints)
            yield Picture(own[: 1 + (height // tile) * (width // tile)], size=shape)
    elif units.ndim == 5:
        flat = units.reshape(-1, *units.shape[2:])
        # Batches are filled up with empty tiles.
        yield from (Picture(part[None]) for part in flat if part.any())
    else:
        yield from (
            Picture(part[None], beside={name: value[i : i + 1] for name, value in beside.items()})
            for i, part in enumerate(units)
        )
