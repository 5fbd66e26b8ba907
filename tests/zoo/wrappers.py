"""Thin modules that give every zoo entry named inputs and a dict of named output tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = [
    "FeaturesIn",
    "MeanPooledText",
    "PaddedEncoder",
    "PixelsIn",
    "TextIn",
    "ValuesIn",
]


class _Named(nn.Module):
    """Calls ``model`` and picks the outputs named ``outputs`` (one name: the result may be a bare tensor)."""

    def __init__(self, model: nn.Module, outputs: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.outputs = tuple(outputs)

    def _pick(self, result: object) -> dict[str, Tensor]:
        if isinstance(result, Tensor):
            (name,) = self.outputs
            return {name: result}
        return {name: getattr(result, name) for name in self.outputs}


class PixelsIn(_Named):
    """An image or video model: ``pixel_values`` in."""

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Run the model."""
        return self._pick(self.model(pixel_values))


class ValuesIn(_Named):
    """An audio model on spectrogram patches: ``input_values`` in."""

    def forward(self, input_values: Tensor) -> dict[str, Tensor]:
        """Run the model."""
        return self._pick(self.model(input_values))


class FeaturesIn(_Named):
    """A speech encoder: ``input_features`` in."""

    def forward(self, input_features: Tensor) -> dict[str, Tensor]:
        """Run the model."""
        return self._pick(self.model(input_features))


class TextIn(_Named):
    """A text model: ``input_ids`` and ``attention_mask`` in."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Run the model."""
        return self._pick(self.model(input_ids=input_ids, attention_mask=attention_mask))


class MeanPooledText(nn.Module):
    """A text encoder with the masked mean pooling of sentence-transformers on top."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Run the model and average the rows that are not padding, then normalise."""
        tokens = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).expand(tokens.size()).to(tokens.dtype)
        mean = (tokens * mask).sum(1) / torch.clamp(mask.sum(1), min=1e-9)
        return {"sentence_embedding": nn.functional.normalize(mean, p=2.0, dim=1)}


class PaddedEncoder(nn.Module):
    """``nn.TransformerEncoder`` with a key padding mask (True = padding) as an input."""

    def __init__(self, encoder: nn.TransformerEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, src: Tensor, src_key_padding_mask: Tensor) -> dict[str, Tensor]:
        """Run the encoder."""
        return {"output": self.encoder(src, src_key_padding_mask=src_key_padding_mask)}
