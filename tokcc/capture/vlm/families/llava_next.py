"""LLaVA-NeXT: as LLaVA, on tiles of an image that are laid side by side outside the engine."""

from __future__ import annotations

from typing import Any

from tokcc.capture.vlm.families.llava import FAMILY as LLAVA
from tokcc.capture.vlm.family import Family, Placeholders

__all__ = ["FAMILY"]


def _placeholders(config: Any, stock: int, count: int) -> Placeholders:
    del config
    return Placeholders(
        refusal="the processor counts placeholders from the shape of the image and its tiles, and a tile of "
        f"{count} of {stock} tokens has no shape: prompts are expanded with {count} for each tile, and the rows at the "
        "ends of lines are left out"
    )


FAMILY = Family(
    "LLaVA-NeXT",
    ("llava_next",),
    LLAVA.encoder,
    _placeholders,
    unit="tile",
    packing="anyres",
    notes=("the encoder gives the tokens of each tile; runtimes lay them side by side, as `tokcc run` does",),
)
