"""The parts that all families share: the table of embeddings, and the decoder that reads embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from tokcc.capture.hf_decoder import Past, appending_cache, cache_shapes

__all__ = ["EmbedTokens", "EmbeddedDecoder", "embed_example", "embedded_dynamic", "embedded_inputs"]

_BATCH, _NEW, _PAST = 2, 3, 5  # as in tokcc.capture.hf_decoder
_AXES = 3


class EmbedTokens(nn.Module):
    """The table of embeddings, as the decoder is fed with it: some models scale it.

    Args:
        model: The whole model.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.table = model.get_input_embeddings()

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Return ``inputs_embeds`` ``[B, S, H]`` of int64 ``input_ids`` ``[B, S]``."""
        return {"inputs_embeds": self.table(input_ids)}


class EmbeddedDecoder(nn.Module):
    """Calls the language model on embeddings, with a cache that is only appended to.

    Args:
        model: The whole model.
        grid: Positions have three axes: frame, row and column.
    """

    def __init__(self, model: Any, *, grid: bool) -> None:
        super().__init__()
        self.model = model
        self.grid = grid

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, past_key_values: Past
    ) -> dict[str, Any]:
        """Run one call.

        Args:
            inputs_embeds: ``[B, S, H]``.
            attention_mask: int64 ``[B, P + S]``, 1 = real token.
            position_ids: int64 ``[B, S]``, or ``[3, B, S]``: true positions.
            past_key_values: ``key`` ``[B, Hkv, P, D]`` and ``value`` of each layer.

        Returns:
            ``logits`` ``[B, S, V]``, and ``present`` like ``past_key_values`` with P + S slots.
        """
        cache = appending_cache(past_key_values)
        model: Any = self.model
        hidden = model.get_decoder()(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        present = [{"key": layer.keys, "value": layer.values} for layer in cache.layers]
        return {"logits": model.get_output_embeddings()(hidden), "present": present}


def embed_example(model: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an example call of the embedding and its dynamic axes."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.get_input_embeddings().num_embeddings, (_BATCH, _NEW), generator=generator)
    batch, new = Dim("batch_size", min=1), Dim("sequence_length", min=1)
    return {"input_ids": ids}, {"input_ids": {0: batch, 1: new}}


def embedded_inputs(decoder: EmbeddedDecoder, dtype: torch.dtype) -> dict[str, Any]:
    """Return example inputs of a decoder: a second call over a short past.

    Raises:
        CaptureError: The model does not cache keys and values of every layer.
    """
    model: Any = decoder.model
    generator = torch.Generator().manual_seed(0)
    width = int(model.config.get_text_config().hidden_size)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    embeds = random(_BATCH, _NEW, width)
    with torch.no_grad():
        result = model.get_decoder()(inputs_embeds=embeds, use_cache=True)
    positions = torch.arange(_PAST, _PAST + _NEW).expand(_BATCH, _NEW).clone()
    return {
        "inputs_embeds": embeds,
        "attention_mask": torch.ones(_BATCH, _PAST + _NEW, dtype=torch.int64),
        "position_ids": positions.expand(_AXES, -1, -1).clone() if decoder.grid else positions,
        "past_key_values": [
            {"key": random(_BATCH, key[1], _PAST, key[3]), "value": random(_BATCH, value[1], _PAST, value[3])}
            for key, value in cache_shapes(result)
        ],
    }


def embedded_dynamic(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Make batch, new tokens and past dynamic. transformers.js knows the batch by the name ``batch_size``."""
    batch, new, past = Dim("batch_size", min=1), Dim("sequence", min=1), Dim("past", min=0)
    layer = {"key": {0: batch, 2: past}, "value": {0: batch, 2: past}}
    grid = inputs["position_ids"].ndim == _AXES
    return {
        "inputs_embeds": {0: batch, 1: new},
        "attention_mask": {0: batch, 1: Dim.DYNAMIC},
        "position_ids": {1: batch, 2: new} if grid else {0: batch, 1: new},
        "past_key_values": [dict(layer) for _ in inputs["past_key_values"]],
    }
