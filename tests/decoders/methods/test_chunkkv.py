"""ChunkKV against its formula: the best whole chunks, the incomplete one and the window, the same in all heads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.decoders.engine import assert_equals_alone
from tests.decoders.methods.cuts import cut_of
from tests.decoders.oracle import Call, Rule
from tokcc.passes.cache.selectors.chunks import Chunks


def rule(capacity: int, chunk: int, window: int) -> Rule:
    def evict(call: Call) -> Tensor | None:
        if call.new == 1 or call.total <= capacity:
            return None
        rows = range(max(0, call.new - window), call.new)
        size = call.probs.shape[0] // call.key.shape[0]
        worth = [sum(float(head[i, j]) / size for head in call.probs for i in rows) for j in range(call.total)]
        whole = (call.total - window) // chunk
        chunks = [range(c * chunk, (c + 1) * chunk) for c in range(whole)]
        order = sorted(range(whole), key=lambda c: (-sum(worth[j] for j in chunks[c]) / chunk, c))
        kept = list(range(whole * chunk, call.total))
        for c in order:
            kept += chunks[c][: capacity - len(kept)]
        return torch.tensor([sorted(kept)] * call.key.shape[0])

    return evict


def policy(**given: object) -> dict[str, object]:
    return {"version": 1, "name": "chunkkv", "steps": [{"preset": "chunkkv", **given}]}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_equals_the_formula(family: str, tmp_path: Path) -> None:
    given = policy(tokens=8, chunk=3, window=2)
    calls, padding = (17, 1, 1, 5, *[1] * 24), (0, 3, 5)
    assert_equals_alone(family, given, rule(8, 3, 2), tmp_path, calls=calls, padding=padding)


def test_the_usual_calls(tmp_path: Path) -> None:
    assert_equals_alone("llama", policy(tokens=6, chunk=2, window=2), rule(6, 2, 2), tmp_path)


def test_chunks_of_one_token_are_tokens(tmp_path: Path) -> None:
    assert_equals_alone("llama", policy(tokens=7, chunk=1, window=3), rule(7, 1, 3), tmp_path)


def test_a_capacity_that_does_not_bind(tmp_path: Path) -> None:
    assert_equals_alone("llama", policy(tokens=200), None, tmp_path)


def test_chunks_stay_whole() -> None:
    """Rows whose tokens fill their chunks: aligned chunks and the window, whatever the padding."""
    generator = torch.Generator().manual_seed(0)
    cut = cut_of(torch.randn(2, 2, 26, 4, generator=generator), capacity=14, padding=(0, 8), recent=2)
    index = Chunks(length=4).select(cut, torch.rand(2, 2, 26, generator=generator)).index
    for row, padding in enumerate((0, 8)):
        kept = [int(j) - padding for j in index[row, 0]]
        assert index[row, 0].tolist() == index[row, 1].tolist()
        assert kept[-2:] == [24 - padding, 25 - padding]
        chunks = [kept[i : i + 4] for i in range(0, 12, 4)]
        assert all(c == list(range(c[0], c[0] + 4)) and c[0] % 4 == 0 for c in chunks)
