"""A tiny image encoder as a user would hand it over: ``tiny_vit.py:model``."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, SIDE, PATCH, CLASSES = 16, 2, 4, 4, 5


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.activation: Callable[[Tensor], Tensor] = F.gelu
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, WIDTH)
        x = x + self.out(y)
        return x + self.down(self.activation(self.up(self.norm2(x))))


class TinyViT(nn.Module):
    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, SIDE * SIDE + 1, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return {"logits": self.head(x[:, 0]), "tokens": x}


class ConvOverTokens(TinyViT):
    """A depthwise convolution over the grid of tokens in every block."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        x = self.patch(pixels).flatten(2).transpose(1, 2) + self.positions[:, 1:]
        for block in self.blocks:
            x = block(x)
            grid = x.transpose(1, 2).reshape(x.shape[0], WIDTH, SIDE, SIDE)
            x = x + self.mix(grid).flatten(2).transpose(1, 2)
        return {"pooled": self.norm(x).mean(1)}


class OddOperation(TinyViT):
    """An operation that no axis rule and no lowering knows, in every block; no class token."""

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        x = self.patch(pixels).flatten(2).transpose(1, 2) + self.positions[:, 1:]
        for block in self.blocks:
            block.activation = odd  # type: ignore[assignment]  # blocks are modules to the type checker
            x = block(x)
        return {"pooled": self.norm(x).mean(1)}


def odd(x: Tensor) -> Tensor:
    return torch.cummax(x, -1)[0]


def pixels(batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, SIDE * PATCH, SIDE * PATCH, generator=torch.Generator().manual_seed(seed))


def build(kind: type[TinyViT] = TinyViT) -> TinyViT:
    torch.manual_seed(0)
    return kind().eval()


def model() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return build(), (pixels(),)


def bare() -> nn.Module:
    """Without example inputs."""
    return build()


def conv_over_tokens() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return build(ConvOverTokens), (pixels(),)


def odd_operation() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return build(OddOperation), (pixels(),)
