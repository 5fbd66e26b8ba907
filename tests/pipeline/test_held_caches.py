"""Caches in a form of their own through the whole pipeline: the bundle, its report, and tokcc's own loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tokcc
from tests.decoders.tiny import model_of
from tokcc.backends.generation.decoder import DecoderEngine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    model_of("llama", "sdpa").save_pretrained(path)
    return path


WHOLE = 2 * 2 * 16 * 4
"""Bytes of a token's keys and values in one layer: two heads of 16 in fp32."""


@pytest.mark.parametrize(
    ("step", "held"),
    [
        # Half a byte a number, two fp16 for the 16 numbers of a head.
        ({"preset": "agent-memory-q4"}, 511 * 2 * 2 * (8 + 4)),
        # 496 of 511 tokens in 2 bits, in 62 blocks: fp16 grids of 16 channels, and of 8 tokens in 2 groups; lengths.
        (
            {"preset": "oscar", "group": 8, "tail": 16},
            496 * 2 * 32 // 4 + 62 * (2 * 2 * (16 + 8 * 2) + 8) * 2 + 15 * WHOLE,
        ),
    ],
)
def test_a_bundle(step: dict[str, Any], held: int, folder: Path, tmp_path: Path) -> None:
    policy = {"version": 1, "name": "p", "steps": [step]}
    bundle = tokcc.compile(folder, policy, output=tmp_path / "out", calibrate=False)
    report = bundle.report
    assert report.parity.passed
    assert [(row.step, row.tokens_in, row.tokens_out) for row in report.layers] == [(step["preset"], 511, 511)] * 3
    assert [(row.kv_bytes_before, row.kv_bytes_after) for row in report.layers] == [(511 * WHOLE, held)] * 3
    assert any("tensors of its own" in warning for warning in report.warnings)
    engine = DecoderEngine(bundle)
    assert engine.slot_bytes == 3 * WHOLE
    ids, past = np.arange(3, 43)[None].repeat(2, 0), engine.empty_past(2)
    mask = np.ones_like(ids)
    for start, stop in ((0, 20), *((i, i + 1) for i in range(20, 40))):
        logits, past = engine.call(ids[:, start:stop], mask[:, :stop], ids[:, start:stop] - 3, past)
    assert np.isfinite(logits).all()
