"""Small transformers whose forward pass is easy to write out: a ViT with a class token, a text and an audio encoder.

They are what the oracles of the methods run on, so they use nothing that has to be looked up: one fused qkv, SDPA
without a scale of its own, GELU, LayerNorm.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DEPTH", "HEADS", "WIDTH", "Audio", "Block", "Text", "Vision", "audio", "text", "vision"]

WIDTH, HEADS, DEPTH = 32, 4, 4
_LONGEST, _WORDS, _PATCH, _BINS = 256, 50, 12, 10


class Block(nn.Module):
    """Attention and MLP with residuals; the norms before them, or behind the sums."""

    def __init__(self, *, norm_first: bool) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        attended: Tensor = self.out(y.transpose(1, 2).reshape(batch, tokens, WIDTH))
        return attended

    def feed(self, x: Tensor) -> Tensor:
        fed: Tensor = self.down(F.gelu(self.up(x)))
        return fed

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.norm_first:
            x = x + self.attend(self.norm1(x), mask)
            x = x + self.feed(self.norm2(x))
        else:
            x = self.norm1(x + self.attend(x, mask))
            x = self.norm2(x + self.feed(x))
        return x


class Encoder(nn.Module):
    """What the three have in common."""

    norm_first = True

    def __init__(self, depth: int = DEPTH) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(norm_first=self.norm_first) for _ in range(depth))
        self.norm = nn.LayerNorm(WIDTH) if self.norm_first else nn.Identity()
        self.positions = nn.Parameter(torch.zeros(1, _LONGEST, WIDTH))

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, mask)
        x = self.norm(x)
        return x


class Vision(Encoder):
    """Pre-norm, class token in front; gives all tokens and a projection of the class token."""

    def __init__(self, depth: int = DEPTH) -> None:
        super().__init__(depth)
        self.patch = nn.Linear(_PATCH, WIDTH)
        self.cls = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.head = nn.Linear(WIDTH, 7)

    def embed(self, patches: Tensor) -> Tensor:
        x = torch.cat([self.cls.expand(patches.shape[0], -1, -1), self.patch(patches)], dim=1)
        return x + self.positions[:, : x.shape[1]]

    def forward(self, patches: Tensor) -> dict[str, Tensor]:
        x = self.encode(self.embed(patches))
        return {"tokens": x, "pooled": self.head(x[:, 0])}


class Text(Encoder):
    """Post-norm, with a padding mask; token 0 is the class token where ``pooled``."""

    norm_first = False

    def __init__(self, depth: int = DEPTH, *, pooled: bool = True) -> None:
        super().__init__(depth)
        self.words = nn.Embedding(_WORDS, WIDTH)
        self.embed_norm = nn.LayerNorm(WIDTH)
        self.pooler = nn.Linear(WIDTH, WIDTH) if pooled else None

    def embed(self, ids: Tensor) -> Tensor:
        x: Tensor = self.embed_norm(self.words(ids) + self.positions[:, : ids.shape[1]])
        return x

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        x = self.encode(self.embed(ids), mask[:, None, None, :].bool())
        return {"tokens": x} if self.pooler is None else {"tokens": x, "pooled": torch.tanh(self.pooler(x[:, 0]))}


class Audio(Encoder):
    """Pre-norm, no class token, no mask: frames in, frames out."""

    def __init__(self, depth: int = DEPTH) -> None:
        super().__init__(depth)
        self.frame = nn.Linear(_BINS, WIDTH)

    def embed(self, frames: Tensor) -> Tensor:
        return F.gelu(self.frame(frames)) + self.positions[:, : frames.shape[1]]

    def forward(self, frames: Tensor) -> dict[str, Tensor]:
        return {"tokens": self.encode(self.embed(frames))}


def _randomise(module: nn.Module, seed: int) -> None:
    """Seeded weights of trained-like scale: attention must be far from uniform, or rounding decides what is kept."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "qkv.weight" in name:
                parameter.copy_(1.5 * noise / math.sqrt(parameter.shape[1]))
            elif name.endswith("words.weight") or name in ("positions", "cls"):
                parameter.copy_(0.6 * noise)
            elif parameter.dim() == 2:
                parameter.copy_(noise / math.sqrt(parameter.shape[1]))
            else:
                parameter.copy_(0.1 * noise + (0 if name.endswith("bias") else 1))


@cache
def vision(depth: int = DEPTH) -> Vision:
    """Return the image encoder."""
    model = Vision(depth).eval()
    _randomise(model, 1)
    return model


@cache
def text(depth: int = DEPTH, *, pooled: bool = True) -> Text:
    """Return the text encoder."""
    model = Text(depth, pooled=pooled).eval()
    _randomise(model, 2)
    return model


@cache
def audio(depth: int = DEPTH) -> Audio:
    """Return the audio encoder."""
    model = Audio(depth).eval()
    _randomise(model, 3)
    return model


def patches(batch: int, tokens: int, seed: int = 0) -> Tensor:
    """Random patches for ``tokens`` tokens, the class token included."""
    return torch.randn(batch, tokens - 1, _PATCH, generator=torch.Generator().manual_seed(seed))


def frames(batch: int, tokens: int, seed: int = 0) -> Tensor:
    """Random frames."""
    return torch.randn(batch, tokens, _BINS, generator=torch.Generator().manual_seed(seed))


def sentences(lengths: list[int], tokens: int | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Random words, padded on the right: ids and mask."""
    tokens = tokens or max(lengths)
    mask = torch.arange(tokens)[None] < torch.tensor(lengths)[:, None]
    ids = torch.randint(1, _WORDS, (len(lengths), tokens), generator=torch.Generator().manual_seed(seed))
    return {"ids": ids * mask, "mask": mask.long()}
