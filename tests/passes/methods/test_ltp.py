"""Learned Token Pruning with fixed numbers of tokens, against its masked form (arXiv:2107.00910)."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.passes.oracle import (
    Cut,
    Feeds,
    Method,
    Model,
    Result,
    Scene,
    compare,
    drop,
    inputs_of,
    policy,
    program_of,
    received,
    reference,
    top,
)
from tests.passes.reference_models import HEADS, WIDTH, Block, Text, patches, sentences, text, vision
from tokcc.testing import reduce_program, run_program


def kept_words(layer: int, initial: int, keep: str, depth: int = 4) -> int:
    """The first layer keeps everything, then the share falls linearly to ``keep``."""
    return math.ceil((1 + (Fraction(keep) - 1) * Fraction(layer, depth - 1)) * initial)


def ltp(keep: str) -> Method:
    def method(scene: Scene) -> Cut | None:
        count = min(kept_words(scene.layer, scene.initial - 1, keep), scene.n - 1)
        return drop(scene, [0, *sorted(top(received(scene), range(1, scene.n), count))])

    return method


def check(model: Model, feeds: Feeds, keep: float, **kwargs: Any) -> list[Result]:
    def oracle(sample: Feeds) -> Result:
        return reference(model, sample, ltp(str(keep)), layers=(1, 2, 3))

    return compare(model, feeds, {"preset": "ltp", "keep": keep}, oracle, **kwargs)


def test_padded_rows_are_what_they_are_alone() -> None:
    results = check(text(), sentences([21, 13, 6]), 0.4)
    assert results[0].lengths == [17, 13, 9]


def test_images() -> None:
    check(vision(), {"patches": patches(2, 26)}, 0.5, full=True)


@torch.no_grad()
def masked_form(model: Text, ids: Tensor, keep: str) -> tuple[Tensor, list[set[int]]]:
    """As published: tokens stay and are masked as keys from the next layer on; masked rows do not vote."""
    x = model.embed(ids)[0]
    n, width = len(x), WIDTH // HEADS
    alive = [True] * n
    sets = []
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        q, k, v = (part.reshape(n, HEADS, width).transpose(0, 1) for part in block.qkv(x).split(WIDTH, dim=1))
        logits = q @ k.transpose(1, 2) / width**0.5 + torch.tensor([0.0 if a else -10000.0 for a in alive])
        probs = logits.softmax(-1)
        x = block.norm1(x + block.out((probs @ v).transpose(0, 1).reshape(n, WIDTH)))
        if layer:
            rows = torch.tensor(alive, dtype=torch.float32)[None, :, None]
            score = (probs * rows).sum((0, 1)) / (HEADS * n)
            count = kept_words(layer, n - 1, keep)
            best = top(score.tolist(), [i for i in range(1, n) if alive[i]], count)
            alive = [i == 0 or i in best for i in range(n)]
            sets.append({i for i in range(n) if alive[i]})
        x = block.norm2(x + block.down(F.gelu(block.up(x))))
    assert model.pooler is not None
    return torch.tanh(model.pooler(x[0])), sets


def test_gathered_form_equals_masked_form() -> None:
    feeds = sentences([21, 21])
    reduced, _ = reduce_program(program_of(text(), feeds), policy({"preset": "ltp", "keep": 0.3}))
    pooled = run_program(reduced, feeds)[1]
    for row, sample in enumerate(inputs_of(feeds)):
        expected, sets = masked_form(text(), sample["ids"], "0.3")
        torch.testing.assert_close(pooled[row], expected, rtol=0, atol=1e-4)
        assert sets[2] <= sets[1] <= sets[0]
