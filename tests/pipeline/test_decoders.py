"""Decoders through the whole pipeline: from a folder to a bundle with a report, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import tokcc
from tests.decoders.tiny import model_of
from tokcc.backends.ort import Session
from tokcc.errors import PlanError, PolicyError, UsageError
from tokcc.pipeline import decoding
from tokcc.report.summary import next_steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    model_of("llama", "sdpa").save_pretrained(path)
    return path


def policy(**keys: Any) -> dict[str, Any]:
    return {"version": 1, "name": "p", "steps": [{"preset": "h2o", **keys}]}


def test_a_folder_becomes_a_bundle(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_CONTEXTS", (16, 40))
    bundle = tokcc.compile(folder, policy(tokens=12), output=tmp_path / "out")
    engine = onnx.load(bundle.engine("onnx"))
    assert [i.name for i in engine.graph.input][:5] == [
        "input_ids",
        "attention_mask",
        "position_ids",
        "past_key_values.0.key",
        "past_key_values.0.value",
    ]
    assert [o.name for o in engine.graph.output][:3] == ["logits", "present.0.key", "present.0.value"]
    assert {node.domain for node in engine.graph.node} == {""}
    report = bundle.report
    assert report.parity.passed
    assert report.parity.batches >= 8
    assert [(row.tokens_in, row.tokens_out) for row in report.layers] == [(40, 12)] * 3
    # Two heads of 16 in fp32, keys and values; the engine also holds a score for each entry.
    assert report.layers[0].kv_bytes_before == 40 * 2 * 2 * 16 * 4
    assert report.layers[0].kv_bytes_after == 12 * 2 * (2 * 16 + 1) * 4
    assert [point.tokens for point in report.break_even] == [16, 40]
    assert report.latency is not None
    assert next_steps(report, "out")[-3].command == 'tokcc run out "Once upon a time"'


def test_the_whole_cache_without_a_policy(folder: Path, tmp_path: Path) -> None:
    bundle = tokcc.compile(folder, "none", output=tmp_path / "out", calibrate=False)
    session = Session(bundle.engine("onnx"))
    ids = np.arange(3, 13)[None]
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(10)[None]}
    for name in session.inputs[3:]:
        feeds[name] = np.zeros((1, 2, 0, 16), np.float32)
    with torch.no_grad():
        wanted = model_of("llama")(input_ids=torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(session.run(feeds)["logits"], wanted, atol=2e-4 * float(np.abs(wanted).max()))


def test_the_head_runs_on_the_last_token(folder: Path, tmp_path: Path) -> None:
    wanted = {**policy(tokens=12), "outputs": {"logits": "last_token"}}
    one = tokcc.compile(folder, wanted, output=tmp_path / "one", calibrate=False)
    all_rows = tokcc.compile(folder, policy(tokens=12), output=tmp_path / "all", calibrate=False)
    ids = np.arange(3, 23)[None]
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(20)[None]}
    results = []
    for bundle in (one, all_rows):
        session = Session(bundle.engine("onnx"))
        empty = {name: np.zeros((1, 2, 0, 1 if "score" in name else 16), np.float32) for name in session.inputs[3:]}
        results.append(session.run({**feeds, **empty}))
    assert results[0]["logits"].shape[1] == 1
    np.testing.assert_allclose(results[0]["logits"], results[1]["logits"][:, -1:], rtol=0, atol=1e-5)
    graph = onnx.load(one.engine("onnx")).graph
    assert graph.output[0].type.tensor_type.shape.dim[1].dim_value == 1


@pytest.mark.parametrize("outputs", [{"logits": "reduced"}, {"logit": "last_token"}])
def test_refused_output_contracts(folder: Path, tmp_path: Path, outputs: dict[str, str]) -> None:
    with pytest.raises(PlanError, match="logit"):
        tokcc.compile(folder, {**policy(tokens=12), "outputs": outputs}, output=tmp_path / "out")


def test_dry_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_CONTEXTS", (40,))
    plan = tokcc.compile(folder, policy(tokens=12), dry_run=True).to_dict()
    assert [(row["tokens_in"], row["tokens_out"]) for row in plan["layers"]] == [(40, 12)] * 3


def test_calibration_data_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="calibration data of decoders"):
        tokcc.compile(folder, policy(tokens=12), output=tmp_path / "out", calibration=["some text"])
    assert not (tmp_path / "out").exists()


def test_inspect(folder: Path) -> None:
    found = tokcc.inspect(folder).to_dict()
    assert found["kind"] == "decoder"
    assert found["padding_mask"] == "attention_mask"
    row = {"heads": 4, "kv_heads": 2, "width": 16, "sees": "all", "rotary": "yes"}
    assert found["layers"] == [{"layer": i, **row} for i in range(3)]
    fits = {row["preset"]: row["layers"] for row in found["presets"] if row["fits"]}
    assert fits["h2o"] == "0,1,2"
    assert fits["knorm"] == "2"
    assert "tome" not in fits


def test_reduce_gives_the_eager_oracle(folder: Path) -> None:
    program = tokcc.reduce(folder, policy(tokens=12))
    targets = {node.target for node in program.graph.nodes}
    assert torch.ops.tokcc.cached_attention.default in targets
    assert torch.ops.tokcc.retain_slots.default in targets


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"budget": {"kv": {"sinks": 2, "recent": 2, "heavy": 0}}, "at": {"layers": [7]}}, "layer"),
        ({"tokens": 4, "select": {"kind": "best", "sinks": 3, "recent": 2}}, "more than those are protected"),
        ({"budget": {"remove": 3}}, "not a cache capacity"),
    ],
)
def test_refused_plans(folder: Path, tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        tokcc.compile(folder, policy(**keys), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fixed_slots(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="layout `slots`"):
        tokcc.compile(folder, {**policy(tokens=12), "kv": {"layout": "slots"}}, output=tmp_path / "out")


def test_a_budget_of_nothing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="tokens"):
        tokcc.compile(folder, policy(tokens=0), output=tmp_path / "out")


def test_pruning_a_decoder(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="not available for decoders"):
        tokcc.compile(folder, "tome", output=tmp_path / "out")


def test_evicting_from_an_encoder(tmp_path: Path) -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    with pytest.raises(PlanError, match="no key-value cache"):
        tokcc.compile(encoder, "h2o", example_inputs=(torch.randn(2, 9, 16),), output=tmp_path / "out")
