"""Counted work equals the published counts and counting by hand."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.zoo import ZOO
from tokcc.analysis.ledger import ledger
from tokcc.ir.program import Program
from tokcc.testing import plan_for, reduce_program, trace

# torch's own pytree copies a deprecated class in run_decompositions.
pytestmark = pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning")

DEPTH, TOKENS = 12, 197
TOME = {"preset": "tome", "r": 3}


class Encoder(nn.Module):
    """The blocks of a ViT and nothing else; weights without numbers, for only shapes count."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        layer: Any = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.layers = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.cat([self.cls.expand(tokens.shape[0], -1, -1), tokens], 1)
        out: Tensor = self.layers(x)
        return out[:, 0]


@cache
def vit(width: int, heads: int) -> tuple[Program, dict[str, tuple[int, ...]]]:
    inputs = {"tokens": torch.zeros(1, TOKENS - 1, width)}
    return trace(Encoder(width, heads), inputs), {"tokens": (1, TOKENS - 1, width)}


def giga_macs(width: int, heads: int, policy: Any) -> float:
    """Multiply-adds of the blocks, without what tokcc inserts (the papers do not count it)."""
    program, shapes = vit(width, heads)
    reduced, plan = reduce_program(program, policy)
    counted = ledger(reduced, plan.sites, shapes)
    return (sum(block.flops for block in counted.blocks) - counted.inserted.flops) / 2e9


def tome(r: int) -> dict[str, Any]:
    return {"version": 1, "steps": [{"preset": "tome", "r": r}]}


SMALL = [("none", 4.541), (tome(8), 3.358), (tome(13), 2.645), (tome(16), 2.233), ("evit", 2.971)]
BASE = [("none", 17.447), (tome(8), 12.988), (tome(13), 10.251), (tome(16), 8.655), ("evit", 11.494)]


@pytest.mark.parametrize(("policy", "expected"), SMALL)
def test_published_counts_of_vit_s(policy: Any, expected: float) -> None:
    assert giga_macs(384, 6, policy) == pytest.approx(expected, abs=6e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "expected"), BASE)
def test_published_counts_of_vit_b(policy: Any, expected: float) -> None:
    assert giga_macs(768, 12, policy) == pytest.approx(expected, abs=6e-4)


def test_blocks_are_counted_each() -> None:
    program, shapes = vit(384, 6)
    counted = ledger(program, plan_for(program, "none").sites, shapes)
    assert len(counted.blocks) == DEPTH
    one = 2 * (12 * TOKENS * 384**2 + 2 * TOKENS**2 * 384)
    assert [block.flops for block in counted.blocks] == [one] * DEPTH
    assert counted.inserted.flops == 0
    assert counted.inserted.bytes == 0
    assert counted.total.flops == DEPTH * one
    assert all(block.bytes > 0 for block in counted.blocks)


def test_counts_grow_with_the_batch() -> None:
    entry = ZOO["vit_classifier"]
    program = trace(entry.build(), entry.inputs(3), entry.dynamic_shapes())
    reduced, plan = reduce_program(program, "tome")
    one, four = (
        ledger(reduced, plan.sites, {name: tuple(x.shape) for name, x in entry.inputs(batch).items()})
        for batch in (1, 4)
    )
    assert four.total.flops == 4 * one.total.flops
    assert four.inserted.flops == 4 * one.inserted.flops > 0


def test_lengths_are_bound() -> None:
    entry = ZOO["bert"]
    program = trace(entry.build(), entry.inputs(3), entry.dynamic_shapes())
    sites = plan_for(program, "none").sites
    short, long = (
        ledger(program, sites, {name: tuple(x.shape) for name, x in entry.inputs(1, n).items()}) for n in (10, 20)
    )
    for n, counted in ((10, short), (20, long)):
        assert counted.blocks[0].flops == 2 * (4 * n * 64**2 + 2 * n * 64 * 128 + 2 * n * n * 64)


def test_the_embedding_is_in_no_block() -> None:
    entry = ZOO["vit_classifier"]
    program = trace(entry.build(), entry.inputs(1))
    counted = ledger(program, plan_for(program, "none").sites, {"pixel_values": (1, 3, 32, 32)})
    outside = counted.total.flops - sum(block.flops for block in counted.blocks)
    assert outside == 2 * (64 * 64 * 3 * 4 * 4 + 64 * 10)  # patches and classifier


@pytest.mark.parametrize("length", [9, 10, 20])
def test_tome_of_any_length_counts_as_of_that_length(length: int) -> None:
    """Every second token is taken from a place on of which torch cannot prove that it is not negative."""
    entry = ZOO["bert"]
    inputs = entry.inputs(2, length)
    shapes = {name: tuple(x.shape) for name, x in inputs.items()}
    counted = []
    for axes in (entry.dynamic_shapes(), None):
        reduced, plan = reduce_program(trace(entry.build(), inputs, axes), {"version": 1, "steps": [TOME]})
        counted.append(ledger(reduced, plan.sites, shapes))
    free, fixed = counted
    assert [block.flops for block in free.blocks] == [block.flops for block in fixed.blocks]
    assert free.inserted.flops == fixed.inserted.flops > 0
