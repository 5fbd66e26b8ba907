"""AudioKV: two classes of heads, and a low-pass filter against numpy's Fourier transform."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.decoders.masked import Seen, assert_equals_masked
from tests.decoders.methods.cuts import cut_of
from tokcc.passes.cache.scores.low_pass_window import LowPassWindow
from tokcc.passes.cache.scores.window_attention import WindowAttention

WINDOW = 4


def low_pass(row: list[float], blend: float, band: float) -> list[float]:
    if not row:
        return row
    bins = np.fft.rfft(np.asarray(row))
    kept = math.ceil(round(band * (len(row) // 2 + 1), 9))
    bins[kept:] = 0
    slow = np.fft.irfft(bins, len(row))
    return [max(0.0, float((1 - blend) * a + blend * b)) for a, b in zip(row, slow, strict=True)]


@pytest.mark.parametrize("total", [9, 10, 33, 64])
@pytest.mark.parametrize("band", [0.1, 0.35, 1.0])
def test_equals_the_transform(total: int, band: float) -> None:
    """Odd and even lengths, padded rows, one frequency and all of them."""
    key = torch.randn(2, 2, total, 8, generator=torch.Generator().manual_seed(total))
    cut = cut_of(key, padding=(0, 3))
    plain = WindowAttention(window=WINDOW, pool="none").emit(cut)
    made = LowPassWindow(window=WINDOW, pool="none", blend=0.5, band=band).emit(cut)
    for row, padding in enumerate((0, 3)):
        for head in range(2):
            given = plain[row, head, padding : total - WINDOW].tolist()
            wanted = torch.tensor(low_pass(given, 0.5, band))
            torch.testing.assert_close(made[row, head, padding : total - WINDOW], wanted, atol=1e-5, rtol=1e-4)
    assert float(made[:, :, total - WINDOW :].abs().max()) == 0


def test_no_blend_is_the_window_itself() -> None:
    cut = cut_of(torch.randn(1, 2, 20, 8, generator=torch.Generator().manual_seed(0)))
    score = LowPassWindow(window=WINDOW, pool="none", blend=0.0).emit(cut)
    torch.testing.assert_close(score, WindowAttention(window=WINDOW, pool="none").emit(cut))


def rule(capacities: list[list[int]], blend: float, band: float) -> object:
    def evict(seen: Seen) -> None:
        if seen.new == 1:
            return
        total = seen.key.shape[1]
        for head, capacity in enumerate(capacities[seen.layer]):
            if total <= capacity:
                continue
            rows = range(max(0, seen.new - WINDOW), seen.new)
            count = seen.grouped.shape[1]
            sums = [sum(float(p[i, j]) for p in seen.grouped[head] for i in rows) / count for j in range(total)]
            score = low_pass(sums[:-WINDOW], blend, band)
            order = sorted(range(len(score)), key=lambda j: (-score[j], j))
            for j in order[capacity - WINDOW :]:
                seen.weight[head, j] = 0

    return evict


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_two_classes_of_heads(family: str, tmp_path: Path) -> None:
    path = tmp_path / "audio.json"
    path.write_text(json.dumps({"audio": [[0.9, 0.1], [0.2, 0.3], [0.8, 0.7]]}))
    step = {"preset": "audiokv", "profile": str(path), "high": 12, "low": 7, "window": WINDOW, "band": 0.3}
    given = {"version": 1, "name": "audiokv", "steps": [step]}
    expected = rule([[12, 7], [7, 7], [12, 12]], 0.5, 0.3)
    _, last = assert_equals_masked(family, given, expected, tmp_path, calls=(21, *[1] * 64))
    assert last["present.0.key"].shape[2] == 12 + 64
    assert last["present.0.key_1"].shape[2] == 7 + 64
