"""Decoders through the whole pipeline: from a folder to a bundle with a report, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import tokcc
from tests.decoders.tiny import model_of
from tokcc.backends.bundle import Bundle
from tokcc.backends.generation import Generator
from tokcc.backends.ort import Session
from tokcc.config import load_policy
from tokcc.errors import PlanError, PolicyError
from tokcc.passes.methods import library
from tokcc.pipeline import decoder_speed
from tokcc.pipeline.bundles import bench, verify
from tokcc.pipeline.decoding import prompt_flops
from tokcc.pipeline.reducing import reduce_program
from tokcc.pipeline.request import ModelRequest
from tokcc.pipeline.stages import Stages
from tokcc.report.findings import findings
from tokcc.report.summary import next_steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    model_of("llama", "sdpa").save_pretrained(path)
    return path


def policy(**keys: Any) -> dict[str, Any]:
    return {"version": 1, "name": "p", "steps": [{"preset": "h2o", **keys}]}


@pytest.fixture(scope="module")
def merged(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Heavy hitters in a cache that is cut after every call."""
    bundle: Bundle = tokcc.compile(
        folder, policy(tokens=12), output=tmp_path_factory.mktemp("merged") / "out", calibrate=False
    )
    return bundle


def test_a_folder_becomes_a_bundle(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_speed, "CONTEXTS", (16, 40))
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


def test_sparse_prompts_are_timed_as_prompts(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a policy leaves single tokens as they are: the figure is that of a prompt in one call."""
    monkeypatch.setattr(decoder_speed, "CONTEXTS", (16, 40))
    step = {"preset": "xattention", "block": 8, "key_block": 8, "stride": 4, "length": 24}
    sparse = {"version": 1, "name": "p", "steps": [step]}
    bundle = tokcc.compile(folder, sparse, output=tmp_path / "out", keep_baseline=True)
    report = bundle.report
    assert report.decoding is not None
    assert [point.tokens for point in report.decoding.prompts] == [16, 40]
    assert [point.label for point in report.break_even] == ["a prompt of 16", "a prompt of 40"]
    assert report.latency is not None
    assert report.latency.shapes["input_ids"] == (1, 40)
    assert report.totals.shapes["input_ids"] == (1, 40)
    assert report.totals.flops_after != report.totals.flops_before
    assert {row.site for row in report.layers} == {"attention"}
    assert not any("caches are not smaller" in line for line in findings(report))
    again = bench(bundle, runs=1)
    assert again.decoding is not None
    assert [point.runs for point in again.decoding.prompts] == [1, 1]


def test_lists_of_all_blocks_have_flops(folder: Path) -> None:
    """How long they may be is told by the mask, and by no size of an input alone."""
    step = {"preset": "minference", "block": 8, "length": 24, "columns": 4, "distances": 4, "first": 1, "near": 1}
    _, program = ModelRequest(folder, task="text-generation").open(Stages())
    policy = load_policy({"version": 1, "name": "p", "steps": [step]}, presets=library())
    before, after = prompt_flops(reduce_program(program, policy, Stages()), 64)
    assert 0 < before < after  # all blocks at most, and what chooses them


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


def test_the_head_runs_on_the_last_token(folder: Path, merged: Bundle, tmp_path: Path) -> None:
    wanted = {**policy(tokens=12), "outputs": {"logits": "last_token"}}
    one = tokcc.compile(folder, wanted, output=tmp_path / "one", calibrate=False)
    ids = np.arange(3, 23)[None]
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(20)[None]}
    results = []
    for bundle in (one, merged):
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
    monkeypatch.setattr(decoder_speed, "CONTEXTS", (40,))
    plan = tokcc.compile(folder, policy(tokens=12), dry_run=True).to_dict()
    assert [(row["tokens_in"], row["tokens_out"]) for row in plan["layers"]] == [(40, 12)] * 3


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


def slots(preset: str, **keys: Any) -> dict[str, Any]:
    return {"version": 1, "name": "p", "steps": [{"preset": preset, "tokens": 12, **keys}], "kv": {"layout": "slots"}}


def test_fixed_slots(folder: Path, merged: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command takes them, and the loop generates what it does with the other layout."""
    monkeypatch.setattr(decoder_speed, "CONTEXTS", (16, 40))
    bundle = tokcc.compile(folder, slots("h2o"), output=tmp_path / "out", keep_baseline=True)
    report = bundle.report
    assert report.parity.passed
    assert [(row.tokens_in, row.tokens_out) for row in report.layers] == [(40, 12)] * 3
    # Two heads of 16 in fp32, keys and values; one row more holds the scores.
    assert report.layers[0].kv_bytes_after == 13 * 2 * 2 * 16 * 4
    assert [point.tokens for point in report.break_even] == [16, 40]
    assert verify(bundle).passed
    assert bench(bundle, runs=2).latency.speedup.median > 0
    prompts = [list(range(3, 33)), [5, 9, 11]]
    steps = Generator(bundle).stream(prompts, max_new_tokens=20, stop=())
    made = list(steps)
    assert steps.cache_bytes == 2 * 3 * 13 * 2 * 2 * 16 * 4
    assert list(Generator(merged).stream(prompts, max_new_tokens=20, stop=())) == made


def test_the_configuration_for_genai(tmp_path: Path) -> None:
    """Several tokens end a text, one of them beyond the vocabulary, and no token is for padding."""
    model = copy.deepcopy(model_of("llama", "sdpa"))
    model.config.eos_token_id = model.generation_config.eos_token_id = [2, 5, 97]
    model.config.pad_token_id = model.generation_config.pad_token_id = None
    model.save_pretrained(tmp_path / "m")
    bundle = tokcc.compile(tmp_path / "m", slots("h2o"), output=tmp_path / "out", calibrate=False)
    content = json.loads((bundle.path / "genai_config.json").read_text())
    assert content["search"] == {
        "max_length": 512,
        "do_sample": False,
        "num_beams": 1,
        "past_present_share_buffer": True,
    }
    decoder = content["model"].pop("decoder")
    assert content["model"] == {
        "type": "decoder",
        "vocab_size": 97,
        "context_length": 512,
        "bos_token_id": 1,
        "eos_token_id": [2, 5],
        "pad_token_id": 2,
    }
    names = {item.name for item in onnx.load(bundle.engine("onnx")).graph.input}
    assert set(decoder["inputs"].values()) - names == {"past_key_values.%d.key", "past_key_values.%d.value"}
    assert decoder["filename"] == "model.onnx"
    sizes = ("head_size", "hidden_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")
    assert [decoder[name] for name in sizes] == [16, 64, 4, 3, 2]
    assert "genai_config.json" in {Path(name).name for name in bundle.manifest.files}


def test_texts_longer_than_the_positions(folder: Path, tmp_path: Path) -> None:
    bundle = tokcc.compile(folder, slots("streaming-llm"), output=tmp_path / "out", calibrate=False)
    content = json.loads((bundle.path / "genai_config.json").read_text())
    assert content["model"]["context_length"] > content["search"]["max_length"] == 512


def test_the_other_layout_has_no_configuration_for_genai(merged: Bundle) -> None:
    assert not (merged.path / "genai_config.json").exists()


@pytest.mark.parametrize("preset", ["h2o", "tova"])
def test_fixed_slots_of_half_precision(preset: str, folder: Path, tmp_path: Path) -> None:
    """Scores need fp32; without any it works."""
    options = {"output": tmp_path / "out", "calibrate": False, "dtype": "float16"}
    if preset == "h2o":
        with pytest.raises(PlanError, match="does not go into fixed slots"):
            tokcc.compile(folder, slots(preset), **options)
    else:
        bundle = tokcc.compile(folder, slots(preset), **options)
        assert len(Generator(bundle).generate([[5, 6, 7]], max_new_tokens=5, stop=())[0]) == 5


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
