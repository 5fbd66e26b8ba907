"""Idefics3 and SmolVLM: a SigLIP tower on tiles, and a connector that folds neighbouring patches into one token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokcc.capture.vlm.family import Encoder, Family, image_batch, one_field, square

__all__ = ["FAMILY"]


class _Tiles(nn.Module):
    """Tower and connector on tiles that are images from edge to edge, all of one size.

    The tower looks up the place of every patch from a mask; here the places are known.
    """

    def __init__(self, model: Any, pixels: Tensor) -> None:
        super().__init__()
        self.tower, self.connector = model.model.vision_model, model.model.connector
        patch = int(model.config.vision_config.patch_size)
        self.register_buffer("places", _places(self.tower.embeddings, pixels[:1], patch), persistent=False)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Return ``image_features`` ``[n, N, H]`` of ``pixel_values`` ``[n, C, H, W]``."""
        parts: Any = self.tower.embeddings
        patches = parts.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        states: Any = self.tower.encoder(
            inputs_embeds=patches + parts.position_embedding(self.places), attention_mask=None
        )
        normed = self.tower.post_layernorm(states.last_hidden_state)
        return {"image_features": self.connector(normed)}


def _places(embeddings: Any, pixels: Tensor, patch: int) -> Tensor:
    """Return what the tower looks up in its table of positions for a whole tile, int64 ``[1, patches]``."""
    seen: list[Tensor] = []
    hook = embeddings.position_embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        whole = torch.ones(1, pixels.shape[2] // patch, pixels.shape[3] // patch, dtype=torch.bool)
        embeddings(pixel_values=pixels, patch_attention_mask=whole)
    finally:
        hook.remove()
    return seen[0]


def _encoder(model: Any, size: tuple[int, int] | None, dtype: torch.dtype) -> Encoder:
    config = model.config.vision_config
    inputs, dynamic = image_batch(config, size, dtype, square(config))
    return Encoder(_Tiles(model, inputs["pixel_values"]), inputs, dynamic)


FAMILY = Family(
    "Idefics3",
    ("idefics3", "smolvlm"),
    _encoder,
    one_field("image_seq_len"),
    unit="tile",
    notes=(
        "the encoder reads tiles [n, C, H, W]: leave out the empty ones that processors fill batches up with, and "
        "their mask",
    ),
)
