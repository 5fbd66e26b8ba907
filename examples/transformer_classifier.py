"""A hand-written model: a text classifier around ``nn.TransformerEncoder``, nothing but torch.

It shows the ``file.py:factory`` form, for models that live in a user's own code:

    tokcc compile examples/transformer_classifier.py:classifier --policy examples/policies/evit.yaml -o out/
"""

from __future__ import annotations

import torch
from torch import nn


class TransformerClassifier(nn.Module):
    """Token ids to class logits, read from a learned first token.

    Args:
        vocabulary: Number of token ids.
        length: Tokens a sequence has.
        width: Model width.
        layers: Encoder layers.
        heads: Attention heads.
        classes: Output classes.
    """

    def __init__(
        self,
        vocabulary: int = 1000,
        length: int = 96,
        width: int = 128,
        layers: int = 6,
        heads: int = 4,
        classes: int = 5,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, length + 1, width) * 0.02)
        block = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        # The nested-tensor fast path is an eager-only kernel that torch.export cannot see through.
        self.encoder = nn.TransformerEncoder(block, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Classify token ids ``[B, length]``."""
        hidden = torch.cat([self.cls.expand(ids.shape[0], -1, -1), self.embed(ids)], dim=1) + self.position
        logits: torch.Tensor = self.head(self.encoder(hidden)[:, 0])
        return logits


def classifier() -> tuple[TransformerClassifier, tuple[torch.Tensor]]:
    """Factory: the classifier with fixed random weights, and example inputs."""
    torch.manual_seed(0)
    model = TransformerClassifier().eval()
    return model, (torch.randint(0, 1000, (2, 96)),)
