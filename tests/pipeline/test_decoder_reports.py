"""What the report of a decoder says, against numbers that are found without tokcc."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from tests.decoders.bundles import compiled, model_folder
from tests.decoders.methods import test_streaming_llm as streaming
from tests.decoders.oracle import run_alone
from tests.decoders.tiny import VOCABULARY, model_of
from tokcc import pipeline
from tokcc.backends.bundle import Bundle
from tokcc.backends.generation import DecoderEngine
from tokcc.cli import app
from tokcc.errors import UsageError
from tokcc.pipeline import decoder_quality, decoder_speed, decoding, reading
from tokcc.pipeline.decoder_speed import weight_bytes
from tokcc.pipeline.occupancy import follow
from tokcc.pipeline.reading import positions_beside
from tokcc.report.measure import measure
from tokcc.report.schema import Report
from tokcc.report.terminal import to_text

PIECE = 24
LAYERS, HEADS, WIDTH = 3, 2, 16
TOKEN = LAYERS * HEADS * 2 * WIDTH * 4
"""Bytes of a token in the whole cache."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("llama"))


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    """Short pieces and contexts, few rounds."""

    def few(candidates: Any, **options: Any) -> Any:
        return measure(candidates, **{**options, "budget_s": 0.0})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder_speed, "measure", few)
        patch.setattr(decoding, "SHORTEST", 2 * PIECE)
        patch.setattr(decoder_speed, "CONTEXTS", (32, 60, 150))
        patch.setattr(decoder_quality, "TEXT_CONTEXTS", (48, 100))
        for module in (decoder_quality, decoder_speed, reading):
            patch.setattr(module, "PIECE", PIECE)
        yield


def words(ids: np.ndarray) -> str:
    return " ".join(f"w{i}" for i in ids)


def some_ids(count: int = 110, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCABULARY, count)


def keep_positions(tokens: int, **keys: Any) -> dict[str, Any]:
    step = {"preset": "streaming-llm", "tokens": tokens, "positions": "keep", **keys}
    return {"version": 1, "name": "streaming", "steps": [step]}


def surprise(logits: Tensor, ids: np.ndarray) -> float:
    chosen = logits.double().log_softmax(-1)[torch.arange(len(ids) - 1), torch.from_numpy(ids[1:])]
    return math.exp(-float(chosen.mean()))


@pytest.fixture(scope="module")
def bundle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """StreamingLLM with true positions, without measurements, with its baseline."""
    return compiled(folder, tmp_path_factory.mktemp("b") / "out", keep_positions(12), keep_baseline=True)


@pytest.fixture(scope="module")
def calibrated(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("calibrated")
    shutil.copytree(bundle.path, folder / "out")
    copy = pipeline.rebuild_report(Bundle.open(folder / "out"))
    (folder / "text.txt").write_text(words(some_ids()))
    return pipeline.calibrate(copy, folder / "text.txt", gates=["perplexity_ratio<=100", "kl<=0.0001"])


def test_text_is_what_transformers_gives(calibrated: Bundle) -> None:
    """Perplexity, agreement and divergence of both engines, computed without tokcc."""
    ids, found = some_ids(), calibrated.report.decoding
    assert found is not None
    assert [point.context for point in found.text] == [48, 100]
    for point in found.text:
        read = ids[: point.context]
        lengths = [PIECE] * (point.context // PIECE) + ([point.context % PIECE] if point.context % PIECE else [])
        # The second context goes on behind the first.
        lengths = lengths if point.context == 48 else [24, 24, 24, 24, 4]
        with torch.no_grad():
            whole = model_of("llama")(input_ids=torch.from_numpy(read)[None]).logits[0]
        less = run_alone(model_of("llama"), torch.from_numpy(read), lengths, streaming.rule(12, 4)).logits
        assert point.predicted == point.context - 1
        assert point.perplexity_before == pytest.approx(surprise(whole, read), rel=1e-4)
        assert point.perplexity_after == pytest.approx(surprise(less, read), rel=1e-4)
        assert point.top1_agreement == pytest.approx(float((whole.argmax(-1) == less.argmax(-1)).double().mean()))
        p, q = whole.double().log_softmax(-1), less.double().log_softmax(-1)
        assert point.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert found.text[-1].top1_agreement != 1
    fidelity = calibrated.report.fidelity
    assert fidelity is not None
    assert (fidelity.samples, fidelity.source) == (100, "text.txt")
    assert fidelity.metrics[0].after == found.text[-1].perplexity_after
    assert fidelity.outputs[0].kl == found.text[-1].kl


def test_gates_read_it(calibrated: Bundle) -> None:
    met, missed = calibrated.report.gates
    assert met.passed
    assert not missed.passed
    assert calibrated.manifest.state == "accuracy_gate_missed"


def test_caches_are_measured(calibrated: Bundle) -> None:
    found = calibrated.report.decoding
    assert found is not None
    assert [point.context for point in found.points] == [32, 60, 150]
    for point in found.points:
        assert point.cache_bytes_before == point.context * TOKEN
        assert point.cache_bytes_after == 12 * TOKEN
        moved = (found.weight_bytes_before + point.context * TOKEN) / (found.weight_bytes_after + 12 * TOKEN)
        assert point.bound == pytest.approx(moved)
        assert point.tokens_per_second_after == pytest.approx(1 / point.seconds_after)
    firsts = [point.first_token_after for point in found.points]
    assert firsts == sorted(firsts)
    assert [point.tokens for point in calibrated.report.break_even] == [32, 60, 150]


def test_weights_are_those_that_a_step_reads(bundle: Bundle) -> None:
    """All but the embedding, of which a step takes a row; the head is another table here."""
    parameters = sum(p.numel() for p in model_of("llama").parameters()) - VOCABULARY * 64
    assert weight_bytes(bundle.engine("onnx")) == pytest.approx(parameters * 4, rel=0.01)


def test_an_engine_inside_a_branch_reads_weights_too(tmp_path: Path) -> None:
    def weight(name: str) -> onnx.TensorProto:
        return onnx.numpy_helper.from_array(np.ones((2, 3), np.float32), name)

    branch = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["a", "a"], ["y"])],
        "branch",
        [],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2, 3])],
    )
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("If", ["c"], ["out"], then_branch=branch, else_branch=branch),
            onnx.helper.make_node("Gather", ["table", "i"], ["row"]),
        ],
        "g",
        [
            onnx.helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, []),
            onnx.helper.make_tensor_value_info("i", onnx.TensorProto.INT64, []),
        ],
        [onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [2, 3])],
        [weight("a"), weight("table"), weight("unused")],
    )
    onnx.save(onnx.helper.make_model(graph), tmp_path / "m.onnx")
    assert weight_bytes(tmp_path / "m.onnx") == 2 * 3 * 4


def test_what_is_left_of_a_prompt(calibrated: Bundle) -> None:
    """Sinks and the most recent tokens, exactly."""
    found = calibrated.report.decoding
    assert found is not None
    assert found.occupancy is not None
    assert (found.occupancy.context, found.occupancy.cell) == (64, 1)
    wanted = tuple([1.0] * 4 + [0.0] * 52 + [1.0] * 8)
    assert [(row.layer, row.kept) for row in found.occupancy.layers] == [(i, wanted) for i in range(LAYERS)]
    figure = next(f for f in calibrated.report.figures if f.name == "occupancy")
    assert (calibrated.path / figure.path).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("policy", "unknown"),
    [
        ({"preset": "streaming-llm", "tokens": 12}, ()),  # keys are turned by their place: found by their values
        ({"preset": "h2o", "tokens": 12}, ()),
        ({"preset": "agent-memory-q4"}, (0, 1, 2)),
        pytest.param({"preset": "elastic-cache-vlm", "tokens": 40}, (0, 1, 2), marks=pytest.mark.slow),
    ],
)
def test_caches_that_are_followed_or_not(
    policy: dict[str, Any], unknown: tuple[int, ...], bundle: Bundle, folder: Path, tmp_path: Path
) -> None:
    other = compiled(folder, tmp_path / "out", {"version": 1, "name": "p", "steps": [policy]})
    baseline, engine = DecoderEngine(bundle.path / "baseline.onnx"), DecoderEngine(other)
    ids = np.random.default_rng(0).permutation(np.arange(3, VOCABULARY))[:50]
    found = follow(baseline, engine, ids)
    assert found.unknown == unknown
    if unknown:
        assert found.facts() is None
        assert "leaves out layers 0, 1, 2" in (found.note or "")
    elif policy["preset"] == "h2o":
        trace_counts = {layer: flags.sum(1).tolist() for layer, flags in found.kept.items()}
        assert trace_counts == {layer: [12, 12] for layer in range(LAYERS)}
    else:
        kept = [*range(4), *range(42, 50)]
        assert all(np.flatnonzero(row).tolist() == kept for flags in found.kept.values() for row in flags)


def test_heavy_hitters_are_the_oracles(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    from tests.decoders.methods import test_h2o as h2o

    other = compiled(folder, tmp_path / "out", "h2o")
    ids = np.random.default_rng(0).permutation(np.arange(3, VOCABULARY))[:50]
    found = follow(DecoderEngine(bundle.path / "baseline.onnx"), DecoderEngine(other), ids)
    trace = run_alone(model_of("llama"), torch.from_numpy(ids), [50], h2o.rule(12, 6))
    for layer, positions in enumerate(trace.positions[-1]):
        assert [np.flatnonzero(row).tolist() for row in found.kept[layer]] == positions.tolist()


def test_equal_entries_are_not_guessed(bundle: Bundle) -> None:
    """A model without positions gives equal tokens equal keys; here the same key stands at two places."""

    class Twins(DecoderEngine):
        def read(self, *args: Any) -> tuple[Any, dict[str, Any]]:
            logits, past = super().read(*args)
            changed = {name: value.copy() for name, value in past.items()}
            for part in ("key", "value"):
                changed[f"past_key_values.1.{part}"][:, :, 1] = changed[f"past_key_values.1.{part}"][:, :, 0]
            return logits, changed

    found = follow(Twins(bundle.path / "baseline.onnx"), DecoderEngine(bundle), some_ids(50))
    assert found.unknown == (1,)
    facts = found.facts()
    assert facts is not None
    assert [row.layer for row in facts.layers] == [0, 2]


def test_compile_measures_everything(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    ids = some_ids(120)
    (tmp_path / "texts" / "a.txt").write_text(words(ids[:70]))
    (tmp_path / "texts" / "b.txt").write_text(words(ids[70:]))
    out = compiled(folder, tmp_path / "out", "h2o", calibrate=True, calibration=tmp_path / "texts")
    report = out.report
    assert [(row.tokens_in, row.tokens_out) for row in report.layers] == [(150, 12)] * LAYERS
    assert report.layers[0].kv_bytes_after == 12 * HEADS * (2 * WIDTH + 1) * 4  # with the scores
    assert report.decoding is not None
    assert report.decoding.points[-1].cache_bytes_after == sum(row.kv_bytes_after or 0 for row in report.layers)
    assert report.totals.shapes["attention_mask"] == (1, 151)
    assert report.totals.realised_speedup is not None
    assert report.decoding.tokens == "texts, then random tokens"
    with torch.no_grad():
        whole = model_of("llama")(input_ids=torch.from_numpy(ids[:100])[None]).logits[0]
    assert report.decoding.text[-1].perplexity_before == pytest.approx(surprise(whole, ids[:100]), rel=1e-4)
    page, said = (out.path / "report.html").read_text(), to_text(report, bundle="out")
    for heading in ("By length of the context", "On the text", "Copied needles", "What the caches keep of a prompt"):
        assert heading in page
    assert "texts, 100 tokens" in said
    assert "0-2  h2o" in said
    assert Report.parse(report.to_json()) == report
    assert {figure.name for figure in report.figures} == {"latency", "contexts", "occupancy"}


@pytest.mark.slow
def test_several_tensors_and_fixed_slots(folder: Path, tmp_path: Path) -> None:
    steps = [{"preset": "agent-memory-q4"}]
    report = compiled(folder, tmp_path / "q", {"version": 1, "name": "q", "steps": steps}, calibrate=True).report
    assert report.decoding is not None
    # Codes of 4 bits, and a step and a least number in fp16 for each token.
    assert report.decoding.points[-1].cache_bytes_after == 150 * LAYERS * HEADS * 2 * (8 + 2 * 2)
    assert any("leaves out layers 0, 1, 2" in note for note in report.notes)
    slots = {"version": 1, "name": "s", "steps": [{"preset": "tova", "tokens": 12}], "kv": {"layout": "slots"}}
    out = compiled(folder, tmp_path / "s", slots, calibrate=True)
    report = out.report
    assert report.decoding is not None
    buffers = sum(value.nbytes for value in DecoderEngine(out).empty_past(1).values())
    assert {point.cache_bytes_after for point in report.decoding.points} == {buffers}
    assert report.decoding.occupancy is not None


def test_a_policy_that_has_nothing_to_do_yet_is_warned_of(folder: Path, tmp_path: Path) -> None:
    report = compiled(folder, tmp_path / "out", keep_positions(300), calibrate=True, calibration=some_ids(110)).report
    assert any("fidelity was not put to the test" in warning for warning in report.warnings)
    assert any("not smaller after 150 tokens" in warning for warning in report.warnings)
    assert any("keep everything of a prompt" in note for note in report.notes), report.notes
    assert report.fidelity is not None
    assert report.fidelity.outputs[0].top1_agreement == 1


def test_contexts_end_with_the_positions(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_speed, "CONTEXTS", (32, 511, 512, 1024))
    report = compiled(folder, tmp_path / "out", "h2o", calibrate=True).report
    assert report.decoding is not None
    assert [point.context for point in report.decoding.points] == [32, 511]
    assert positions_beside(tmp_path / "out" / "model.onnx") == 512


@pytest.mark.slow
def test_bench(bundle: Bundle) -> None:
    found = pipeline.bench(bundle, runs=2, batch=3)
    assert found.decoding is not None
    assert [point.runs for point in found.decoding.points] == [2, 2, 2]
    assert found.decoding.points[-1].cache_bytes_before == 3 * 150 * TOKEN
    assert found.latency.batch_size == 3
    assert json.loads(json.dumps(found.to_dict()))["decoding"]["points"][0]["context"] == 32
    shown = CliRunner().invoke(app, ["bench", str(bundle.path), "--runs", "2"])
    assert shown.exit_code == 0
    assert "tokens/s" in shown.output


def test_a_report_of_before_is_still_read(bundle: Bundle) -> None:
    raw = json.loads(bundle.report.to_json())
    del raw["decoding"]
    assert Report.parse(json.dumps(raw)).decoding is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", words(some_ids(30)), "too short"),
        ("a.txt", "  \n", "no text"),
        ("a.png", "x", "not for decoders"),
        ("missing.txt", None, "does not exist"),
        ("empty", "folder", "no texts in"),
        ("a.npz", {"ids": some_ids(200)}, "no token ids"),
        ("a.npz", {"input_ids": np.ones((2, 200), np.float32)}, "not calibration data"),
        ("a.npy", np.ones((1, 2, 300), np.int64), "not calibration data"),
        ("a.npz", {"input_ids": some_ids(300) + 90}, "not in the model's vocabulary"),
        ("a.npz", {"input_ids": -some_ids(300)}, "not in the model's vocabulary"),
    ],
)
def test_bad_data(name: str, content: Any, message: str, bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / name
    if isinstance(content, dict):
        np.savez(path, **content)
    elif isinstance(content, np.ndarray):
        np.save(path, content)
    elif content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=message):
        pipeline.calibrate(bundle, path)


@pytest.mark.slow
def test_data_of_other_forms(bundle: Bundle, tmp_path: Path) -> None:
    """Ids from a file or from Python are what the words are."""
    ids = some_ids(600)
    np.save(tmp_path / "a.npy", ids)
    np.savez(tmp_path / "a.npz", input_ids=ids.reshape(2, 300), attention_mask=np.ones((2, 300)))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": words(part)}) for part in (ids[:200], ids[200:])))
    forms = [tmp_path / "a.npy", tmp_path / "a.npz", tmp_path / "a.jsonl", {"input_ids": ids}, ids, [words(ids)]]
    found = [pipeline.calibrate(bundle, form).report.decoding for form in (*forms, torch.from_numpy(ids))]
    assert len({each.text for each in found if each is not None}) == 1


@pytest.mark.slow
def test_no_tokenizer(folder: Path, tmp_path: Path) -> None:
    bare = model_folder(tmp_path / "m", tokenizer=False)
    (tmp_path / "t.txt").write_text(words(some_ids(600)))
    with pytest.raises(UsageError, match="needs the model's tokenizer"):
        compiled(bare, tmp_path / "out", "h2o", calibrate=True, calibration=tmp_path / "t.txt")
    assert not (tmp_path / "out").exists()
    options = ["--policy", "h2o", "--task", "text-generation", "-o", str(tmp_path / "out")]
    shown = CliRunner().invoke(app, ["compile", str(bare), *options, "--calib", str(tmp_path / "t.txt")])
    assert shown.exit_code == UsageError.exit_code
    with_ids = compiled(bare, tmp_path / "out", "h2o", calibrate=True, calibration=some_ids(600))
    assert with_ids.report.fidelity is not None


@pytest.mark.slow
def test_the_last_tokens_logits_are_not_enough(folder: Path, tmp_path: Path) -> None:
    policy = {**keep_positions(12), "outputs": {"logits": "last_token"}}
    with pytest.raises(UsageError, match="last token alone"):
        compiled(folder, tmp_path / "out", policy, calibrate=True, calibration=some_ids(600))
    out = compiled(folder, tmp_path / "out", policy, calibrate=True, keep_baseline=True)
    assert out.report.decoding is not None
    assert out.report.decoding.needles  # one token after the other
    with pytest.raises(UsageError, match="last token alone"):
        pipeline.calibrate(out, some_ids(600))


def test_positions_that_do_not_suffice(bundle: Bundle) -> None:
    copy = Bundle.open(bundle.path)
    config = copy.path / "config.json"
    known = config.read_text()
    try:
        config.write_text(json.dumps({**json.loads(known), "max_position_embeddings": PIECE}))
        with pytest.raises(UsageError, match="too few positions"):
            pipeline.calibrate(copy, some_ids(600))
    finally:
        config.write_text(known)
