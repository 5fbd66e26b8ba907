"""The pipeline as a library: what compile promises about its engines, and what reduce gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch.export import ExportedProgram

import tokcc
import tokcc.kernels
from tests.cli.tiny_vit import build, pixels
from tokcc.backends.bundle import Bundle
from tokcc.backends.onnx import build_onnx, save_onnx
from tokcc.config import load_policy
from tokcc.errors import LoweringError, ParityError, UsageError
from tokcc.passes.methods import library
from tokcc.pipeline import DryRun, rebuild_report, verify
from tokcc.testing import trace


@pytest.fixture(scope="module")
def exported() -> ExportedProgram:
    return torch.export.export(build(), (pixels(),), strict=False)


def engine_of(model: Any, policy: Any, out: Path, **options: Any) -> Bundle:
    bundle = tokcc.compile(model, policy, output=out, calibrate=False, **options)
    assert isinstance(bundle, Bundle)
    return bundle


def outputs(bundle: Bundle, batch: int = 2) -> dict[str, Any]:
    return bundle.run({"pixels": pixels(batch, seed=5).numpy()})


class TestPublicNames:
    def test_they_are_pinned(self) -> None:
        assert tokcc.__all__ == [
            "Bundle",
            "Policy",
            "TokccError",
            "__version__",
            "compile",
            "inspect",
            "presets",
            "reduce",
        ]
        for name in tokcc.__all__:
            assert getattr(tokcc, name) is not None
        with pytest.raises(AttributeError, match="nothing"):
            _ = tokcc.nothing

    def test_presets(self) -> None:
        presets = tokcc.presets()
        assert set(presets) == set(library())
        assert all(isinstance(policy, tokcc.Policy) for policy in presets.values())


class TestCompile:
    def test_a_module(self, tmp_path: Path) -> None:
        bundle = tokcc.compile(
            build(),
            policy="evit",
            example_inputs=(pixels(),),
            output=tmp_path / "out",
            calibration=[{"pixels": pixels(4, seed=2).numpy()}],
            gates={"cosine": ">=-1", "ideal_speedup": ">=1"},
        )
        report = bundle.report
        assert [gate.passed for gate in report.gates] == [True, True]
        assert report.fidelity is not None
        assert bundle.engine("onnx") == tmp_path / "out" / "model.onnx"
        assert verify(bundle).passed

    def test_stages(self, exported: ExportedProgram, tmp_path: Path) -> None:
        seen: list[str] = []

        class Listener:
            @contextmanager
            def stage(self, name: str, total: int | None = None) -> Iterator[Any]:
                seen.append(name)
                yield lambda units: None

        bundle = engine_of(exported, "evit", tmp_path / "out", progress=Listener(), keep_baseline=True)
        assert seen == [
            "load",
            "capture",
            "annotate",
            "plan",
            "insert and propagate",
            "slice",
            "run the reference",
            "lower to ONNX",
            "parity",
            "lower the baseline",
            "write the report",
        ]
        assert set(bundle.report.stages) == set(seen) - {"write the report"}

    def test_missed_gates_do_not_raise(self, exported: ExportedProgram, tmp_path: Path) -> None:
        bundle = engine_of(exported, "evit", tmp_path / "out", gates=["ideal_speedup>=100"])
        assert bundle.manifest.state == "speed_gate_missed"

    def test_the_same_bytes_twice(self, exported: ExportedProgram, tmp_path: Path) -> None:
        one, two = (engine_of(build(), "tome", tmp_path / name, example_inputs=(pixels(),)) for name in ("a", "b"))
        assert one.engine("onnx").read_bytes() == two.engine("onnx").read_bytes()
        assert (one.path / "policy.lock.yaml").read_bytes() == (two.path / "policy.lock.yaml").read_bytes()

    @pytest.mark.parametrize("policy", ["evit", "tome", {"steps": [{"preset": "evit", "at": {"layers": [-1]}}]}])
    def test_the_lock_replays(self, exported: ExportedProgram, tmp_path: Path, policy: Any) -> None:
        first = engine_of(exported, policy, tmp_path / "first")
        second = engine_of(exported, first.path / "policy.lock.yaml", tmp_path / "second")
        assert second.engine("onnx").read_bytes() == first.engine("onnx").read_bytes()
        assert (second.path / "policy.lock.yaml").read_text() == (first.path / "policy.lock.yaml").read_text()

    @pytest.mark.parametrize(
        "step",
        [{"preset": "evit", "budget": {"keep": 1.0}}, {"preset": "tome", "r": 0}, {"preset": "uniform", "keep": 1}],
    )
    def test_a_budget_of_nothing_changes_nothing(
        self, exported: ExportedProgram, tmp_path: Path, step: dict[str, Any]
    ) -> None:
        bundle = engine_of(exported, {"steps": [step]}, tmp_path / "out", keep_baseline=True)
        names = [node.name for node in onnx.load(bundle.engine("onnx")).graph.node]
        assert not [name for name in names if "tokcc" in name]
        got = outputs(bundle)
        session = onnxruntime.InferenceSession(bundle.path / "baseline.onnx", providers=["CPUExecutionProvider"])
        want = session.run(None, {"pixels": pixels(seed=5).numpy()})
        for name, value in zip([o.name for o in session.get_outputs()], want, strict=True):
            np.testing.assert_allclose(got[name], value, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("dynamic", [(), ("pixels:0=1..8",)])
    def test_reduced_by_nothing(self, tmp_path: Path, dynamic: tuple[str, ...]) -> None:
        """The engine has the index whatever is reduced."""
        policy = {"steps": [], "outputs": {"*": "reduced"}}
        bundle = engine_of(build(), policy, tmp_path / "out", example_inputs=(pixels(),), dynamic=dynamic)
        found = outputs(bundle)
        assert list(found) == ["logits", "tokens", "tokens.token_index"]
        assert found["tokens.token_index"].tolist() == [list(range(found["tokens"].shape[1]))] * 2
        assert verify(bundle).passed

    def test_dry_run(self, exported: ExportedProgram) -> None:
        plan = tokcc.compile(exported, "evit", dry_run=True)
        assert isinstance(plan, DryRun)
        assert plan.to_dict()["policy"] == "evit"

    def test_slicing_is_lossless(self, exported: ExportedProgram, tmp_path: Path) -> None:
        policy = {"steps": [], "outputs": {"tokens": {"rows": [0]}}}
        whole = engine_of(exported, policy, tmp_path / "whole", slicing=False)
        sliced = engine_of(exported, policy, tmp_path / "sliced")
        assert (sliced.report.totals.flops_after or 0) < (whole.report.totals.flops_after or 0)
        for name, value in outputs(whole).items():
            np.testing.assert_allclose(outputs(sliced)[name], value, rtol=1e-4, atol=1e-5)

    def test_what_must_be_given(self, exported: ExportedProgram, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="no output folder"):
            tokcc.compile(exported, "evit")
        with pytest.raises(LoweringError, match="tvm"):
            tokcc.compile(exported, "evit", output=tmp_path / "out", backends=("tvm",))
        with pytest.raises(UsageError, match="no backend"):
            tokcc.compile(exported, "evit", output=tmp_path / "out", backends=())
        assert list(tmp_path.iterdir()) == []

    def test_a_wrong_lowering_leaves_nothing(
        self, exported: ExportedProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from tokcc.lowering.onnx import table

        known = table.lowerings()

        def slightly_off(t: Any, node: Any, *args: Any, **kwargs: Any) -> Any:
            value = known[node.target](t, node, *args, **kwargs)
            return t.op("Mul", value, t.value(1.01, torch.float32))

        wrong = {**known, torch.ops.aten.layer_norm.default: slightly_off}
        monkeypatch.setattr(table, "lowerings", lambda: wrong)
        with pytest.raises(ParityError, match="output `") as caught:
            engine_of(exported, "none", tmp_path / "out")
        assert caught.value.exit_code == 6
        assert list(tmp_path.iterdir()) == []

    def test_another_tolerance(self, exported: ExportedProgram, tmp_path: Path) -> None:
        with pytest.raises(ParityError):
            engine_of(exported, "none", tmp_path / "out", atol=0.0, rtol=0.0)


class TestReduce:
    @pytest.mark.parametrize("policy", ["evit", "tome"])
    def test_it_holds_our_operations_and_can_be_kept(
        self, exported: ExportedProgram, tmp_path: Path, policy: str
    ) -> None:
        reduced = tokcc.reduce(exported, policy)
        assert isinstance(reduced, ExportedProgram)
        assert any(str(node.target).startswith("tokcc.") for node in reduced.graph.nodes)
        torch.export.save(reduced, tmp_path / "reduced.pt2")
        again = torch.export.load(tmp_path / "reduced.pt2")
        x = pixels(seed=5)
        with torch.no_grad():
            want, got = reduced.module()(x), again.module()(x)
        assert list(want) == ["logits", "tokens"]
        torch.testing.assert_close(got, want)

    def test_the_engine_equals_it(self, exported: ExportedProgram, tmp_path: Path) -> None:
        with torch.no_grad():
            want = tokcc.reduce(exported, "tome").module()(pixels(seed=5))
        got = outputs(engine_of(exported, "tome", tmp_path / "out"))
        for name, value in want.items():
            np.testing.assert_allclose(got[name], value.numpy(), rtol=1e-3, atol=1e-4)

    def test_without_steps_it_is_the_model(self, exported: ExportedProgram) -> None:
        with torch.no_grad():
            got = tokcc.reduce(exported, "none").module()(pixels(seed=5))
            torch.testing.assert_close(got, build()(pixels(seed=5)))

    def test_the_oracle_is_not_touched_by_what_is_lowered(self) -> None:
        """Constant folding edits in place; the program that parity is judged by must stay whole."""
        from tokcc.pipeline.reducing import reduce_program
        from tokcc.pipeline.stages import Stages

        program = trace(build(), {"pixels": pixels()})
        reduced = reduce_program(program, load_policy("evit", presets=library()), Stages())
        assert reduced.sliced.graph is not reduced.program.graph
        for each in (reduced.original, reduced.program, reduced.sliced):
            each.to_exported().module()(pixels=pixels())


class TestInspect:
    def test_as_data(self, exported: ExportedProgram) -> None:
        found = tokcc.inspect(exported).to_dict()
        assert found["special_tokens"] == {"first": 1, "last": 0}
        assert found["outputs"] == ["logits", "tokens"]

    def test_a_preset_that_would_do_nothing_does_not_fit(self, exported: ExportedProgram) -> None:
        rows = {row["preset"]: row for row in tokcc.inspect(exported).presets()}
        assert rows["evit"]["fits"]
        for row in rows.values():
            assert row["fits"] == bool(row["layers"])
            assert row["why"]


class TestFiles:
    def test_weights_beside_the_model(self, tmp_path: Path) -> None:
        model = build_onnx(trace(build(), {"pixels": pixels()}))
        x = {"pixels": pixels(seed=5).numpy()}
        inside = save_onnx(model, tmp_path / "inside.onnx")
        beside = save_onnx(model, tmp_path / "beside.onnx", external=True)
        assert [path.name for path in inside] == ["inside.onnx"]
        assert [path.name for path in beside] == ["beside.onnx", "beside.onnx.data"]
        assert all(path.is_file() for path in beside)
        made = [
            onnxruntime.InferenceSession(paths[0], providers=["CPUExecutionProvider"]).run(None, x)
            for paths in (inside, beside)
        ]
        for one, two in zip(*made, strict=True):
            np.testing.assert_array_equal(one, two)

    def test_a_report_is_made_again(self, exported: ExportedProgram, tmp_path: Path) -> None:
        bundle = engine_of(exported, "evit", tmp_path / "out")
        before = bundle.engine("onnx").read_bytes()
        (bundle.path / "report.html").unlink()
        renewed = rebuild_report(bundle)
        renewed.verify()
        assert renewed.engine("onnx").read_bytes() == before
        assert (renewed.path / "report.html").is_file()
