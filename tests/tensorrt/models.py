"""Tiny models and what their TensorRT folders are made from."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from tests.cli.tiny_vit import WIDTH, Block
from tests.decoders import tiny
from tokcc.config import LoadedPolicy, load_policy
from tokcc.ir.program import Program
from tokcc.passes.methods import library
from tokcc.pipeline.reducing import Reduced, reduce_program
from tokcc.pipeline.stages import Stages
from tokcc.testing import trace

__all__ = ["LONGEST", "WIDTH", "decoder", "encoder", "image_shapes", "policy_of", "text_shapes"]

LONGEST = 9000


def policy_of(source: Any) -> LoadedPolicy:
    return load_policy(source, presets=library())


class Sequences(nn.Module):
    """Two blocks over a sequence ``[B, N, WIDTH]`` without positions, pooled by its first token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, src: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            src = block(src)
        return src[:, 0]


@cache
def _sequences() -> Program:
    axes = {0: Dim("batch", min=1, max=64), 1: Dim("sequence", min=1, max=LONGEST)}
    return trace(Sequences().eval(), {"src": torch.randn(2, 21, WIDTH)}, {"src": axes})


def encoder(source: Any) -> tuple[Reduced, LoadedPolicy]:
    """Reduce an encoder of sequences of any length up to `LONGEST`, ``[B, N, WIDTH]``."""
    policy = policy_of(source)
    return reduce_program(_sequences(), policy, Stages()), policy


def decoder(source: Any, family: str = "llama") -> tuple[Reduced, LoadedPolicy]:
    policy = policy_of(source)
    return reduce_program(tiny.program_of(family), policy, Stages()), policy


def image_shapes(low: int, usual: int, high: int) -> dict[str, Any]:
    return {"pixel_values": tuple((batch, 3, 32, 32) for batch in (low, usual, high))}


def text_shapes(new: tuple[int, int, int], text: tuple[int, int, int]) -> dict[str, Any]:
    return {
        "input_ids": tuple((batch, size) for batch, size in zip((1, 2, 4), new, strict=True)),
        "attention_mask": tuple((batch, size) for batch, size in zip((1, 2, 4), text, strict=True)),
    }
