"""Decoders of transformers with their cache as plain inputs and outputs, by the community's names.

``input_ids``, ``attention_mask``, ``position_ids``, ``past_key_values.N.key/.value`` -> ``logits``,
``present.N.key/.value``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from tokcc.capture.windowed_bias import any_length
from tokcc.errors import CaptureError

__all__ = ["CausalDecoder", "Past", "appending_cache", "cache_shapes", "decoder_dynamic", "decoder_inputs"]

Past = list[dict[str, Tensor]]
_BATCH, _NEW, _PAST = 2, 3, 5  # sizes of 0 and 1 would be fixed by the trace


class CausalDecoder(nn.Module):
    """Calls a causal language model with a cache that is only appended to.

    The caches of transformers hold lengths as Python numbers, which a trace would fix; this one reads them from its
    tensors, in every layer alike, so that sliding windows stay in the mask.

    Args:
        model: A causal language model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past_key_values: Past
    ) -> dict[str, Any]:
        """Run one call.

        Args:
            input_ids: int64 ``[B, S]``.
            attention_mask: int64 ``[B, P + S]``, 1 = real token.
            position_ids: int64 ``[B, S]``: true positions.
            past_key_values: ``key`` ``[B, Hkv, P, D]`` and ``value`` of each layer.

        Returns:
            ``logits`` ``[B, S, V]``, and ``present`` like ``past_key_values`` with P + S slots.
        """
        cache = appending_cache(past_key_values)
        with any_length(self.model):
            result = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            )
        present = [{"key": layer.keys, "value": layer.values} for layer in cache.layers]
        return {"logits": result.logits, "present": present}


def appending_cache(past: Past) -> Any:
    """Return a cache for transformers over the given tensors."""
    from transformers.cache_utils import Cache, CacheLayerMixin

    class Appending(CacheLayerMixin):
        is_sliding = False

        def __init__(self, keys: Tensor, values: Tensor) -> None:
            super().__init__()  # type: ignore[no-untyped-call]  # transformers is partly typed
            self.keys: Tensor = keys
            self.values: Tensor = values
            self.past = keys.shape[-2]
            self.is_initialized = True

        def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
            """Nothing: the tensors are there."""

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            del args, kwargs
            self.keys = torch.cat([self.keys, key_states], dim=-2)
            self.values = torch.cat([self.values, value_states], dim=-2)
            return self.keys, self.values

        def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
            new = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
            return self.past + new, 0

        def get_seq_length(self) -> int:
            return self.past

        def get_max_cache_shape(self) -> int:
            return -1

        def get_max_length(self) -> int:
            return -1

    return Cache(layers=[Appending(layer["key"], layer["value"]) for layer in past])


def decoder_inputs(model: nn.Module, config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Return example inputs: a second call over a short past.

    Raises:
        CaptureError: As :func:`cache_shapes`.
    """
    vocabulary = int(getattr(config.get_text_config(), "vocab_size", 0) or 2)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (_BATCH, _NEW), generator=generator)
    with torch.no_grad():
        result = model(input_ids=ids, use_cache=True)

    def past(like: Sequence[int]) -> Tensor:
        return torch.randn(_BATCH, like[1], _PAST, like[3], generator=generator).to(dtype)

    return {
        "input_ids": ids,
        "attention_mask": torch.ones(_BATCH, _PAST + _NEW, dtype=torch.int64),
        "position_ids": torch.arange(_PAST, _PAST + _NEW).expand(_BATCH, _NEW).clone(),
        "past_key_values": [{"key": past(keys), "value": past(values)} for keys, values in cache_shapes(result)],
    }


def cache_shapes(result: Any) -> list[tuple[torch.Size, torch.Size]]:
    """Return the shapes of keys and values of each layer that a model's result holds.

    Raises:
        CaptureError: The model does not cache keys and values of every layer (state-space and hybrid models).
    """
    layers = getattr(getattr(result, "past_key_values", None), "layers", None)
    pairs = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers or ()]
    shapes = [
        (keys.shape, values.shape)
        for keys, values in pairs
        if isinstance(keys, Tensor) and isinstance(values, Tensor) and keys.ndim == values.ndim == 4
    ]
    if not shapes or len(shapes) < len(pairs):
        raise CaptureError(
            "the model has no key-value cache in every layer",
            needed="a decoder whose layers cache keys and values",
            found=type(getattr(result, "past_key_values", None)).__name__,
            help="hybrid models, and state-space models other than Mamba, are not supported; compile their parts"
            " through a factory",
        )
    return shapes


def decoder_dynamic(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Make batch, new tokens and past dynamic; the length of the mask is a size of its own."""
    batch, new, past = Dim("batch", min=1), Dim("sequence", min=1), Dim("past", min=0)
    layer = {"key": {0: batch, 2: past}, "value": {0: batch, 2: past}}
    return {
        "input_ids": {0: batch, 1: new},
        "attention_mask": {0: batch, 1: Dim.DYNAMIC},
        "position_ids": {0: batch, 1: new},
        "past_key_values": [dict(layer) for _ in inputs["past_key_values"]],
    }
