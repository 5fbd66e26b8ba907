"""The program from a model to a bundle and back, on tiny models with random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from typer.testing import CliRunner

from tests.cli.tiny_vit import CLASSES, WIDTH, build, pixels
from tokcc.backends.bundle import Bundle
from tokcc.cli import app

TINY = f"{Path(__file__).with_name('tiny_vit.py')}:model"


def run(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(part) for part in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.stderr
    assert "Traceback" not in result.output
    return result


def compiled(out: Path, *options: object, model: object = TINY, policy: object = "evit") -> Bundle:
    run("compile", model, "-p", policy, "-o", out, "--no-calibrate", *options)
    return Bundle.open(out)


def feeds(bundle: Bundle, batch: int | None = None, dtype: type = np.float32) -> dict[str, Any]:
    del bundle
    return {"pixels": pixels(batch or 2, seed=7).numpy().astype(dtype)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "some.npz"
    np.savez(path, pixels=pixels(6, seed=3).numpy())
    return path


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, data: Path) -> tuple[Path, Any]:
    """A bundle with everything that a compile can measure."""
    out = tmp_path_factory.mktemp("full") / "out"
    return out, run("compile", TINY, "-p", "evit", "-o", out, "--calib", data, "--keep-baseline")


@pytest.fixture
def bundle(full: tuple[Path, Any], tmp_path: Path) -> Path:
    """A copy, for what changes a bundle."""
    return Path(shutil.copytree(full[0], tmp_path / "out"))


class TestCompile:
    def test_the_table_at_the_end(self, full: tuple[Path, Any]) -> None:
        out, result = full
        for text in ("tokens in -> out", "17 -> 14", "ideal speedup", "realised speedup", "parity", "passed on"):
            assert text in result.stdout
        assert str(out) in result.stdout
        assert f"tokcc report {out}" in result.stdout
        assert "lower to ONNX" in result.stderr

    def test_the_bundle(self, full: tuple[Path, Any]) -> None:
        out, _ = full
        names = {path.name for path in out.iterdir()}
        assert names >= {
            "model.onnx",
            "baseline.onnx",
            "policy.lock.yaml",
            "manifest.json",
            "report.json",
            "report.html",
        }
        bundle = Bundle.open(out)
        bundle.verify()
        assert bundle.manifest.state == "ok"
        assert [c.name for c in bundle.manifest.inputs] == ["pixels"]
        assert [c.name for c in bundle.manifest.outputs] == ["logits", "tokens"]
        made = bundle.run(feeds(bundle))
        assert made["logits"].shape == (2, CLASSES)
        assert made["tokens"].shape == (2, 17, WIDTH)  # drop-in: every output keeps its shape
        engine = onnx.load(bundle.engine("onnx"))
        onnx.checker.check_model(engine, full_check=True)
        assert {i.domain for i in engine.opset_import} == {""}
        assert any(prop.key == "tokcc.policy" for prop in engine.metadata_props)

    def test_the_report(self, full: tuple[Path, Any]) -> None:
        report = Bundle.open(full[0]).report
        assert report.parity.passed
        assert report.fidelity is not None
        assert report.fidelity.samples == 6
        assert report.latency is not None
        assert report.totals.inserted_share is not None
        assert 0 < report.totals.inserted_share < 1
        assert [(row.tokens_in, row.tokens_out) for row in report.layers] == [(17, 14), (14, 12)]

    def test_json(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        result = run("compile", TINY, "-p", "none", "-o", out, "--no-calibrate", "--json")
        data = json.loads(result.stdout)
        assert data["bundle"] == str(out)
        assert data["state"] == "ok"
        assert data["engines"] == {"onnx": str(out / "model.onnx")}
        assert data["report"] == json.loads((out / "report.json").read_text())

    def test_quiet(self, tmp_path: Path) -> None:
        result = run("compile", TINY, "-p", "none", "-o", tmp_path / "out", "--no-calibrate", "-q")
        assert result.stdout == f"{tmp_path / 'out'}\n"
        assert result.stderr == ""

    def test_dry_run_writes_nothing(self, tmp_path: Path) -> None:
        result = run("compile", TINY, "-p", "evit", "-o", tmp_path / "out", "--dry-run")
        assert "tokens_out" in result.stdout
        assert list(tmp_path.iterdir()) == []
        plan = json.loads(run("compile", TINY, "-p", "evit", "--dry-run", "--json").stdout)
        assert [row["tokens_out"] for row in plan["layers"]] == [14, 12]

    def test_more_than_half_cannot_merge(self) -> None:
        plan = json.loads(run("compile", TINY, "-p", "tome", "--dry-run", "--json").stdout)
        assert [row["tokens_out"] for row in plan["layers"]] == [9, 5]
        (warning,) = plan["warnings"]
        assert "asked to remove 13 tokens at layer 0, 1, but only 8, 4 can go" in warning

    def test_without_a_policy(self) -> None:
        result = run("compile", TINY, code=2)
        assert "Token Merging (ToMe)" in result.stdout
        assert "--policy is missing" in result.stderr

    def test_force(self, tmp_path: Path) -> None:
        compiled(tmp_path / "out", policy="none")
        assert compiled(tmp_path / "out", "--force").manifest.policy == "evit"
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


class TestGates:
    def test_accuracy(self, tmp_path: Path, data: Path) -> None:
        gates = ("--gate", "cosine>=1.0", "--gate", "ideal_speedup>=1")
        result = run("compile", TINY, "-p", "evit", "-o", tmp_path / "out", "--calib", data, *gates, code=7)
        assert "gate MISSED" in result.stdout
        assert "cosine>=1.0" in result.stderr
        assert f"the bundle is kept in `{tmp_path / 'out'}`" in result.stderr
        bundle = Bundle.open(tmp_path / "out")
        bundle.verify()
        assert bundle.manifest.state == "accuracy_gate_missed"
        assert bundle.engine("onnx").is_file()

    def test_speed(self, tmp_path: Path) -> None:
        result = run("compile", TINY, "-p", "evit", "-o", tmp_path / "out", "--gate", "speedup>=1000", code=8)
        assert "speedup>=1000" in result.stderr
        assert Bundle.open(tmp_path / "out").manifest.state == "speed_gate_missed"

    def test_a_gate_on_what_nobody_measured(self, tmp_path: Path) -> None:
        result = run("compile", TINY, "-p", "none", "-o", tmp_path / "out", "--gate", "cosine>=0.1", code=7)
        assert "calib" in result.stderr


class TestOptions:
    def test_pt2(self, tmp_path: Path) -> None:
        bundle = compiled(tmp_path / "out", "--backend", "pt2", "--backend", "onnx")
        assert {check.engine for check in bundle.report.parity.checks} == {"onnx", "pt2"}
        import tokcc.kernels  # noqa: F401 - registers the operations that the archive holds

        with torch.no_grad():
            made = torch.export.load(bundle.engine("pt2")).module()(pixels(2, seed=7))
        torch.testing.assert_close(made["logits"].numpy(), bundle.run(feeds(bundle))["logits"], rtol=1e-4, atol=1e-5)

    def test_pt2_alone(self, tmp_path: Path) -> None:
        run("compile", TINY, "-p", "evit", "-o", tmp_path / "out", "--backend", "pt2")
        assert not (tmp_path / "out" / "model.onnx").exists()

    @pytest.mark.parametrize("opset", [18, *(pytest.param(n, marks=pytest.mark.slow) for n in (19, 20, 21, 22)), 23])
    def test_opset(self, tmp_path: Path, opset: int) -> None:
        bundle = compiled(tmp_path / "out", "--opset", opset)
        model = onnx.load(bundle.engine("onnx"))
        assert [i.version for i in model.opset_import] == [opset]
        onnx.checker.check_model(model, full_check=True)

    def test_float16(self, tmp_path: Path) -> None:
        bundle = compiled(tmp_path / "out", "--dtype", "float16", policy="tome")
        assert [c.dtype for c in bundle.manifest.inputs] == ["float16"]
        assert bundle.run(feeds(bundle, dtype=np.float16))["logits"].dtype == np.float16

    def test_dynamic_batch(self, tmp_path: Path) -> None:
        bundle = compiled(tmp_path / "out", "--dynamic", "pixels:0=1..8", policy="tome")
        assert isinstance(bundle.manifest.inputs[0].shape[0], str)
        many = bundle.run(feeds(bundle, batch=5))
        assert many["logits"].shape == (5, CLASSES)
        one = bundle.run({"pixels": pixels(5, seed=7).numpy()[:1]})
        np.testing.assert_allclose(one["logits"], many["logits"][:1], rtol=1e-4, atol=1e-5)

    def test_inputs_for_a_model_without(self, tmp_path: Path) -> None:
        model = TINY.replace(":model", ":bare")
        bundle = compiled(tmp_path / "out", "--input", "pixels=float32[3,3,16,16]", model=model)
        assert bundle.manifest.inputs[0].shape == (3, 3, 16, 16)

    @pytest.mark.parametrize(
        ("outputs", "names", "tokens"),
        [
            ({"tokens": "reduced"}, ["logits", "tokens", "tokens.token_index"], 12),
            ({"tokens": {"rows": [0, 2]}}, ["logits", "tokens"], 2),
            ({"tokens": "last_token"}, ["logits", "tokens"], 1),
            ({"*": "last_token"}, ["logits", "tokens"], 1),
        ],
    )
    def test_output_contracts(self, tmp_path: Path, outputs: Any, names: list[str], tokens: int) -> None:
        policy = tmp_path / "policy.yaml"
        policy.write_text(json.dumps({"version": 1, "steps": [{"preset": "evit"}], "outputs": outputs}))
        data = tmp_path / "data.npz"
        np.savez(data, pixels=pixels(4, seed=3).numpy())
        out = tmp_path / "out"
        run("compile", TINY, "-p", policy, "-o", out, "--calib", data)
        bundle = Bundle.open(out)
        made = bundle.run(feeds(bundle))
        assert list(made) == names
        assert made["tokens"].shape == (2, tokens, WIDTH)
        measured = {each.output for each in bundle.report.fidelity.outputs} if bundle.report.fidelity else set()
        assert measured >= ({"logits"} if tokens == 12 else {"logits", "tokens"})
        if tokens == 12:
            index = made["tokens.token_index"]
            assert index.dtype == np.int64
            assert index.shape == (2, 12)


class TestBundles:
    def test_verify(self, full: tuple[Path, Any]) -> None:
        assert "hashes of the manifest" in run("verify", full[0]).stdout
        assert json.loads(run("verify", full[0], "--json").stdout)["parity"]["passed"]

    def test_verify_finds_another_engine(self, bundle: Path) -> None:
        (bundle / "model.onnx").write_bytes((bundle / "baseline.onnx").read_bytes())
        assert "`model.onnx` is changed" in run("verify", bundle, code=5).stderr

    def test_bench(self, full: tuple[Path, Any]) -> None:
        result = run("bench", full[0], "--runs", 3)
        assert "speedup" in result.stdout
        assert "interleaved" in result.stdout
        data = json.loads(run("bench", full[0], "--runs", 3, "--json").stdout)
        assert data["latency"]["runs"] == 3
        run("bench", full[0], "--runs", 1, "--against", full[0] / "baseline.onnx")

    def test_bench_without_anything_to_compare_with(self, bundle: Path) -> None:
        (bundle / "baseline.onnx").unlink()
        assert "--keep-baseline" in run("bench", bundle, code=2).stderr

    def test_bench_of_a_fixed_batch(self, full: tuple[Path, Any]) -> None:
        assert "batch size of this engine is fixed" in run("bench", full[0], "--batch", 9, code=2).stderr

    def test_report(self, bundle: Path) -> None:
        assert str(bundle / "report.html") in run("report", bundle).stdout
        page = (bundle / "report.html").read_text()
        (bundle / "report.html").unlink()
        run("report", bundle)
        assert (bundle / "report.html").read_text()[:200] == page[:200]
        Bundle.open(bundle).verify()
        run("report", bundle, "--rebuild")

    def test_calibrate(self, bundle: Path, data: Path) -> None:
        before = (bundle / "model.onnx").read_bytes()
        run("calibrate", bundle, "--data", data)
        result = run("calibrate", bundle, "--data", data, "--gate", "cosine>=1.0", code=7)
        assert "cosine>=1.0" in result.stderr
        opened = Bundle.open(bundle)
        opened.verify()
        assert opened.manifest.state == "accuracy_gate_missed"
        assert (bundle / "model.onnx").read_bytes() == before

    def test_calibrate_without_a_baseline(self, tmp_path: Path, data: Path) -> None:
        compiled(tmp_path / "out")
        assert "--keep-baseline" in run("calibrate", tmp_path / "out", "--data", data, code=2).stderr

    def test_inspect(self) -> None:
        data = json.loads(run("inspect", TINY, "--json").stdout)
        assert data["tokens"] == "17"
        assert [layer["layer"] for layer in data["layers"]] == [0, 1]
        assert {row["preset"]: row["fits"] for row in data["presets"]}["evit"]
        assert "special_tokens" in run("inspect", TINY).stdout


class TestHuggingFace:
    def test_vit(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        config = transformers.ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            image_size=16,
            patch_size=4,
            num_labels=3,
        )
        transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
        bundle = compiled(tmp_path / "out", "--task", "image-classification", model=tmp_path / "vit", policy="tome")
        names = [c.name for c in bundle.manifest.inputs], [c.name for c in bundle.manifest.outputs]
        assert names == (["pixel_values"], ["logits"])
        session = onnxruntime.InferenceSession(bundle.engine("onnx"), providers=["CPUExecutionProvider"])
        (logits,) = session.run(None, {"pixel_values": pixels(3).numpy()})
        assert logits.shape == (3, 3)

    def test_bert_with_padding(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        config = transformers.BertConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            vocab_size=30,
            max_position_embeddings=16,
        )
        transformers.BertModel(config).save_pretrained(tmp_path / "bert")
        policy = tmp_path / "policy.yaml"
        policy.write_text("steps:\n- preset: power-bert\n")
        bundle = compiled(tmp_path / "out", model=tmp_path / "bert", policy=policy)
        assert bundle.report.parity.passed
        shapes = [c.shape for c in bundle.manifest.inputs]
        assert all(isinstance(size, str) for shape in shapes for size in shape)


def test_the_engine_is_near_the_model(full: tuple[Path, Any]) -> None:
    """With so small a share of tokens dropped the answer must still be recognisably that of the model."""
    bundle = Bundle.open(full[0])
    with torch.no_grad():
        want = build()(pixels(2, seed=7))["logits"].numpy()
    got = bundle.run(feeds(bundle))["logits"]
    assert np.corrcoef(want.ravel(), got.ravel())[0, 1] > 0.9
