"""Vision transformers of the usual shapes with random weights: speed does not depend on what was learned."""

from __future__ import annotations

import torch
from torch import nn
from transformers import ViTConfig, ViTModel

from benchmarks.engines import Model

WIDTHS = {"vit-s": 384, "vit-b": 768}
HEAD_DIM = 64
CLASSES = 1000


class Classifier(nn.Module):
    """A ViT backbone with a linear head on the CLS row, as in DeiT.

    Args:
        backbone: The transformers model.
    """

    def __init__(self, backbone: ViTModel) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.config.hidden_size, CLASSES)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Classify images ``[B, 3, S, S]``."""
        hidden = self.backbone(pixel_values).last_hidden_state
        logits: torch.Tensor = self.head(hidden[:, 0])
        return logits


def classifier(size: str = "vit-s", *, layers: int = 12, image_size: int = 224, seed: int = 0) -> Classifier:
    """Build ViT-S/16 or ViT-B/16, with as many layers as asked for."""
    width = WIDTHS[size]
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD_DIM,
        intermediate_size=4 * width,
        image_size=image_size,
        patch_size=16,
    )
    model = Classifier(ViTModel(config, add_pooling_layer=False))
    model.train(False)
    return model


def model(size: str, batch: int, *, layers: int = 12, image_size: int = 224) -> Model:
    """The classifier with static example inputs of the given batch."""
    module = classifier(size, layers=layers, image_size=image_size)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(batch, 3, image_size, image_size, generator=generator)
    return Model(f"{size}-{layers}", module, (pixels,), ("pixel_values",), ("logits",))
