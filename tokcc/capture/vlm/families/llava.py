"""LLaVA-1.5: hidden states of a late layer of a CLIP tower without the class token, and a two-layer projector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokcc.capture.vlm.family import Encoder, Family, FieldEdit, Placeholders, image_batch, square

__all__ = ["FAMILY", "SelectedFeatures"]


class SelectedFeatures(nn.Module):
    """Tower, chosen hidden states without the class token, projector.

    Args:
        tower: The vision tower.
        projector: Applied to each token.
        layers: Hidden states to take, side by side where there are several.
        drop_class_token: Whether the first token is left out.
    """

    def __init__(self, tower: nn.Module, projector: nn.Module, layers: Any, *, drop_class_token: bool) -> None:
        super().__init__()
        self.tower, self.projector = tower, projector
        self.layers = [layers] if isinstance(layers, int) else list(layers)
        self.drop = drop_class_token

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Return ``image_features`` ``[n, N, H]`` of ``pixel_values`` ``[n, C, H, W]``."""
        states = self.tower(pixel_values, output_hidden_states=True).hidden_states
        chosen = [states[layer] for layer in self.layers]
        # Before they are joined, as the model does: each has a class token of its own.
        chosen = [state[:, 1:] for state in chosen] if self.drop else chosen
        features = chosen[0] if len(chosen) == 1 else torch.cat(chosen, -1)
        return {"image_features": self.projector(features)}


def _encoder(model: Any, size: tuple[int, int] | None, dtype: torch.dtype) -> Encoder:
    config = model.config
    module = SelectedFeatures(
        model.model.vision_tower,
        model.model.multi_modal_projector,
        config.vision_feature_layer,
        drop_class_token=config.vision_feature_select_strategy == "default",
    )
    return Encoder(module, *image_batch(config.vision_config, size, dtype, square(config.vision_config)))


def _placeholders(config: Any, stock: int, count: int) -> Placeholders:
    """A processor writes (h / patch) (w / patch) + additional tokens, less one for the class token it leaves out.

    With a patch as large as the image the product is 1, and the additional tokens say the rest. transformers.js does
    not subtract.
    """
    if count == stock:
        return Placeholders()
    file = "processor_config.json"
    height, width = square(config.vision_config)
    if height != width:
        return Placeholders(refusal="the images are not square, and the processor knows one patch size for both sides")
    drops = config.vision_feature_select_strategy == "default"
    patch = FieldEdit(file, "patch_size", height)
    name = "num_additional_image_tokens"
    return Placeholders(
        (patch, FieldEdit(file, name, count if drops else count - 1)), (patch, FieldEdit(file, name, count - 1))
    )


FAMILY = Family("LLaVA", ("llava",), _encoder, _placeholders)
