"""Attention over a latent of each token, traced as it is best computed: keys and values are never written out.

In multi-head latent attention (DeepSeek-V2, arXiv:2405.04434) a layer caches one vector ``c`` and one turned key ``r``
for each token, of which every head makes keys ``[W_k c, r]`` and values ``W_v c``. A query's product with such a key is
that of ``[W_k^T q, q_r]`` with ``[c, r]``, and what it attends to is ``W_v`` times what it attends to of ``c``:
attention with one key head, whose keys are ``[c, r]`` and whose values are ``c``. In that form the cache is an ordinary
one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["as_one_head", "latent_layers"]

_METHOD = "expand_kv"


def latent_layers(model: nn.Module) -> frozenset[int]:
    """Return the layers of a model that cache latents, and expand them as is said above: tried out on numbers."""
    return frozenset(int(layer.layer_idx) for layer in _layers(model) if _expands(layer))


def _layers(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if hasattr(module, _METHOD) and isinstance(getattr(module, "kv_b_proj", None), nn.Linear):
            yield module


def _expands(layer: Any) -> bool:
    """Whether keys are a product with the latent, the turned key behind it, and values another product."""
    weight = layer.kv_b_proj.weight
    generator = torch.Generator().manual_seed(0)
    latent, turned = (
        torch.randn(1, 1, 3, width, generator=generator).to(weight) for width in (weight.shape[1], _turned(layer))
    )
    with torch.no_grad():
        key, value = getattr(layer, _METHOD)(latent, turned)
        by_key, by_value = _split(weight, key.shape[1], key.shape[3] - turned.shape[3])
        own = torch.cat([latent @ by_key.transpose(1, 2), turned.expand(-1, key.shape[1], -1, -1)], 3)
        wanted = latent @ by_value.transpose(1, 2)
    near = 1e-4 if weight.dtype == torch.float32 else 5e-2
    pairs = ((key, own), (value, wanted))
    return all(x.shape == y.shape and torch.allclose(x.float(), y.float(), rtol=near, atol=near) for x, y in pairs)


def _turned(layer: Any) -> int:
    return int(layer.qk_rope_head_dim)


def _split(weight: Tensor, heads: int, plain: int) -> tuple[Tensor, Tensor]:
    """Return what makes keys ``[H, Dn, C]`` and values ``[H, Dv, C]`` of latents."""
    whole = weight.reshape(heads, -1, weight.shape[1])
    by_key, by_value = torch.split(whole, [plain, whole.shape[1] - plain], 1)
    return by_key, by_value


@contextlib.contextmanager
def as_one_head(model: nn.Module, layers: Collection[int]) -> Iterator[None]:
    """Let the attentions of some layers of such a model read latents, while this is open.

    Caches are to hold ``[c, r]`` as keys and ``c`` as values, and to give back both.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    changed = [layer for layer in _layers(model) if layer.layer_idx in layers]
    for module in changed:
        setattr(module, _METHOD, _as_they_are)
    if changed:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = _attending(set(changed), ALL_ATTENTION_FUNCTIONS["sdpa"])
    try:
        yield
    finally:
        for module in changed:
            delattr(module, _METHOD)  # the method of its class is seen again
        if changed:
            del ALL_ATTENTION_FUNCTIONS["sdpa"]  # likewise


def _as_they_are(latent: Tensor, turned: Tensor) -> tuple[Tensor, Tensor]:
    return latent, turned


def _attending(layers: set[nn.Module], whole: Any) -> Any:
    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if module not in layers:
            result: tuple[Tensor, None] = whole(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
            return result
        layer: Any = module
        heads, width = query.shape[1], value.shape[3]
        turned = key.shape[3] - width
        plain = query.shape[3] - turned
        by_key, by_value = _split(layer.kv_b_proj.weight, heads, plain)
        own, places = torch.split(query, [plain, turned], 3)
        asked = torch.cat([torch.matmul(own, by_key), places], 3)
        keys, values = (x.expand(-1, heads, -1, -1) for x in (key, value))
        made = torch.nn.functional.scaled_dot_product_attention(
            asked, keys, values, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
        )
        made = torch.matmul(made, by_value.transpose(1, 2))
        return made.transpose(1, 2).contiguous(), None

    return attend
