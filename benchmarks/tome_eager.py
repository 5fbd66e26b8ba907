"""ToMe the way research code does it: the model's Python is patched, and the patched model is exported as it is.

This is the alternative a user has without tokcc, so it is what an engine of tokcc is compared with. Written from the
paper (arXiv 2210.09461): bipartite matching of keys averaged over heads, the ``r`` best pairs merged by a size-weighted
mean through ``gather`` and ``scatter_reduce``, sizes added to the attention logits, order [unmerged | destinations].
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.nn import functional
from transformers.models.vit.modeling_vit import ViTLayer

from benchmarks.engines import Model
from benchmarks.vits import Classifier


class TomeClassifier(nn.Module):
    """A :class:`~benchmarks.vits.Classifier` whose blocks merge ``r`` tokens after attention; weights are shared.

    Args:
        model: The model to patch.
        r: Tokens merged per block.
    """

    def __init__(self, model: Classifier, r: int) -> None:
        super().__init__()
        self.model = model
        self.r = r

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Classify images ``[B, 3, S, S]``."""
        vit = self.model.backbone
        hidden = vit.embeddings(pixel_values)
        sizes = torch.ones_like(hidden[..., :1])
        for layer in vit.layers:
            hidden, sizes = block(cast(ViTLayer, layer), hidden, sizes, self.r)
        logits: torch.Tensor = self.model.head(vit.layernorm(hidden)[:, 0])
        return logits


def block(layer: ViTLayer, x: torch.Tensor, sizes: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One transformer block with a merge between attention and MLP."""
    attended, metric = attention(layer, layer.layernorm_before(x), sizes)
    x, sizes = merge(x + attended, sizes, metric, r)
    return x + layer.mlp(layer.layernorm_after(x)), sizes


def attention(layer: ViTLayer, x: torch.Tensor, sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with sizes added to the logits; also returns the keys' mean over heads ``[B, N, d]``."""
    part = layer.attention
    B, N, D = x.shape
    query, key, value = (
        project(x).reshape(B, N, part.num_attention_heads, part.head_dim).transpose(1, 2)
        for project in (part.q_proj, part.k_proj, part.v_proj)
    )
    logits = query @ key.transpose(-2, -1) * part.scaling + sizes.log()[:, None, None, :, 0]
    mixed = (logits.softmax(dim=-1) @ value).transpose(1, 2).reshape(B, N, D)
    return part.o_proj(mixed), key.mean(dim=1)


def merge(x: torch.Tensor, sizes: torch.Tensor, metric: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge ``r`` even positions into their most similar odd positions; position 0 (CLS) stays alone."""
    N = x.shape[1]
    r = min(r, (N - 1) // 2)
    if r <= 0:
        return x, sizes
    metric = functional.normalize(metric, dim=-1)
    similarity = metric[:, ::2] @ metric[:, 1::2].transpose(-1, -2)
    is_cls = torch.arange(similarity.shape[1], device=x.device)[None, :, None] == 0
    best, partner = similarity.masked_fill(is_cls, -torch.inf).max(dim=-1)
    order = best.argsort(dim=-1, descending=True)[..., None]
    source = order[:, :r]
    rest = order[:, r:].sort(dim=1).values  # CLS first again
    target = partner[..., None].gather(1, source)

    def summed(values: torch.Tensor) -> torch.Tensor:
        even, odd = values[:, ::2], values[:, 1::2]
        width = values.shape[-1]
        kept = even.gather(1, rest.expand(-1, -1, width))
        moved = even.gather(1, source.expand(-1, -1, width))
        return torch.cat([kept, odd.scatter_reduce(1, target.expand(-1, -1, width), moved, reduce="sum")], dim=1)

    merged = summed(sizes)
    return summed(x * sizes) / merged, merged


def patched(model: Model, r: int) -> Model:
    """The model with ToMe patched into its Python, ready for a plain export."""
    if not isinstance(model.module, Classifier):
        raise TypeError(f"only benchmarks.vits.Classifier can be patched, found {type(model.module).__name__}")
    module = TomeClassifier(model.module, r)
    module.train(False)
    return Model(f"{model.name}-eager-tome", module, model.args, model.inputs, model.outputs)
