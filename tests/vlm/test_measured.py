"""Parts that are measured while they are compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.vlm.bundles import compiled
from tokcc.errors import UsageError
from tokcc.pipeline import bench, decoder_speed

POLICY = {"version": 1, "name": "both", "steps": [{"preset": "h2o", "tokens": 12}]}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "qwen2-vl"])
def test_reports_with_timings(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_speed, "CONTEXTS", (16, 40))
    bundle = compiled(family, tmp_path / "out", POLICY, calibrate=True, keep_baseline=True)
    decoder = bundle.part("decoder").report
    assert [point.tokens for point in decoder.break_even] == [16, 40]
    assert [(row.tokens_in, row.tokens_out) for row in decoder.layers] == [(40, 12)] * 2
    assert bundle.part("vision_encoder").report.latency is not None
    assert bundle.part("embed_tokens").report.latency is None
    assert bench(bundle.part("decoder"), runs=2).latency.speedup.median > 0
    assert bench(bundle.part("vision_encoder"), runs=2).latency.speedup.median > 0
    with pytest.raises(UsageError, match="one by one"):
        bench(bundle)


@pytest.mark.slow
def test_calibration_data_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_speed, "CONTEXTS", (16,))
    pixels = np.random.default_rng(0).standard_normal((4, 3, 32, 32)).astype(np.float32)
    policy = {"version": 1, "name": "p", "steps": [{"preset": "tome", "r": 2}]}
    data = {"vision_encoder": {"pixel_values": pixels}}
    bundle = compiled("llava", tmp_path / "out", policy, calibrate=True, calibration=data)
    fidelity = bundle.part("vision_encoder").report.fidelity
    assert fidelity is not None
    assert 0 < fidelity.outputs[0].cosine_mean < 1


@pytest.mark.parametrize("data", [["text"], {"encoder": ["text"]}])
def test_data_that_names_no_part(data: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="which part it is for"):
        compiled("llava", tmp_path / "out", calibrate=True, calibration=data)
