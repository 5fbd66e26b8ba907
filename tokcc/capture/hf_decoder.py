"""Decoders of transformers with their cache as plain inputs and outputs, by the community's names.

``input_ids``, ``attention_mask``, ``position_ids``, ``past_key_values.N.key/.value`` -> ``logits``,
``present.N.key/.value``. Where an indexer chooses keys by vectors of their own, those travel as ``.key_index``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from tokcc.capture.latent_cache import as_one_head, latent_layers
from tokcc.capture.windowed_bias import any_length
from tokcc.errors import CaptureError

__all__ = ["INDEX", "CausalDecoder", "Past", "appending_cache", "cache_shapes", "decoder_dynamic", "decoder_inputs"]

Past = list[dict[str, Tensor]]
INDEX = "key_index"
"""The part of a cache that an indexer chooses by."""
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
        self.latent = latent_layers(model)

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
        cache = appending_cache(past_key_values, latent=self.latent)
        with any_length(self.model), as_one_head(self.model, self.latent):
            result = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            )
        present = [layer.held() for layer in cache.layers]
        return {"logits": result.logits, "present": present}


def appending_cache(past: Past, *, latent: Collection[int] = ()) -> Any:
    """Return a cache for transformers over the given tensors.

    Args:
        past: Of each layer ``key`` and ``value``, ``key_index`` where there is an indexer.
        latent: Layers that cache a latent and a turned key, see :mod:`tokcc.capture.latent_cache`: keys are both beside
            each other, values the latents.
    """
    from transformers.cache_utils import Cache, CacheLayerMixin

    class Appending(CacheLayerMixin):
        is_sliding = False

        def __init__(self, keys: Tensor, values: Tensor, index: Tensor | None, latent: bool) -> None:
            super().__init__()  # type: ignore[no-untyped-call]  # transformers is partly typed
            self.latent = latent
            self.index = index
            self.keys: Tensor = keys
            self.values: Tensor = values
            self.past = keys.shape[-2]
            self.is_initialized = True

        def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
            """Nothing: the tensors are there."""

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            del args, kwargs
            if self.latent:
                key_states, value_states = torch.cat([key_states, value_states], dim=-1), key_states
            self.keys = torch.cat([self.keys, key_states], dim=-2)
            self.values = torch.cat([self.values, value_states], dim=-2)
            return self.keys, self.values

        def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
            assert self.index is not None, "the cache holds nothing for an indexer"
            self.index = torch.cat([self.index, indexer_key_states.unsqueeze(1)], dim=-2)
            return self.index.squeeze(1)

        def held(self) -> dict[str, Tensor]:
            found = {"key": self.keys, "value": self.values}
            return found if self.index is None else {**found, INDEX: self.index}

        def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
            new = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
            return self.past + new, 0

        def get_seq_length(self) -> int:
            return self.past

        def get_max_cache_shape(self) -> int:
            return -1

        def get_max_length(self) -> int:
            return -1

    return Cache(
        layers=[Appending(x["key"], x["value"], x.get(INDEX), number in latent) for number, x in enumerate(past)]
    )


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

    def past(heads: int, width: int) -> Tensor:
        return torch.randn(_BATCH, heads, _PAST, width, generator=generator).to(dtype)

    layers, latent = [], latent_layers(model)
    for number, (keys, values) in enumerate(cache_shapes(result)):
        if number in latent:  # a latent, and a turned key
            own = {"key": past(1, keys[3] + values[3]), "value": past(1, keys[3])}
        else:
            own = {"key": past(keys[1], keys[3]), "value": past(values[1], values[3])}
        chosen_by = getattr(result.past_key_values.layers[number], "indexer_keys", None)
        layers.append(own if chosen_by is None else {**own, INDEX: past(1, chosen_by.shape[-1])})
    return {
        "input_ids": ids,
        "attention_mask": torch.ones(_BATCH, _PAST + _NEW, dtype=torch.int64),
        "position_ids": torch.arange(_PAST, _PAST + _NEW).expand(_BATCH, _NEW).clone(),
        "past_key_values": layers,
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
    return {
        "input_ids": {0: batch, 1: new},
        "attention_mask": {0: batch, 1: Dim.DYNAMIC},
        "position_ids": {0: batch, 1: new},
        "past_key_values": [{name: {0: batch, 2: past} for name in layer} for layer in inputs["past_key_values"]],
    }
