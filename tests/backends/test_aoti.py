"""Packages of AOTInductor: equal to the oracle, loaded where tokcc is not, and nothing wrong without an error."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from typer.testing import CliRunner

import tokcc
from tests.cli.signals import heed_signals
from tests.cli.tiny_vit import build, pixels
from tests.zoo import ZOO
from tokcc.backends.aoti import AotiOptions, AotiSession, _copy_shared_constants, lacking, package
from tokcc.backends.bundle import Bundle
from tokcc.cli import app
from tokcc.errors import LoweringError, UsageError
from tokcc.pipeline import DryRun, bench, verify
from tokcc.report.summary import speed_lines
from tokcc.testing import trace

# torch's own pytree copies a deprecated class in run_decompositions.
pytestmark = pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning")

ROOT = Path(__file__).parents[2]
GREEDY = "divprune"

WITHOUT_TOKCC = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "tokcc":
            raise ImportError(f"{name} is not to be imported here")

sys.meta_path.insert(0, Refuse())
import numpy, torch
model = torch._inductor.aoti_load_package(sys.argv[1])
feeds = {name: torch.from_numpy(value) for name, value in numpy.load(sys.argv[2]).items()}
found = model(**feeds)
numpy.savez(sys.argv[3], **{name: value.numpy() for name, value in found.items()})
assert not [name for name in sys.modules if name.split(".")[0] == "tokcc"]
"""


TOME = {"version": 1, "steps": [{"preset": "tome", "r": 2}]}


def tiny(folder: Path, policy: Any = "tome", **options: Any) -> Bundle:
    batch = torch.export.Dim("batch", min=1, max=9)
    options = {"calibrate": False, "dynamic_shapes": {"pixels": {0: batch}}, "backends": ("aoti",), **options}
    bundle = tokcc.compile(build(), policy, example_inputs=(pixels(),), output=folder / "out", **options)
    assert isinstance(bundle, Bundle)
    return bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny(tmp_path_factory.mktemp("aoti"))


def elsewhere(
    bundle: Bundle, feeds: dict[str, npt.NDArray[Any]], folder: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the package in a fresh process that refuses to import tokcc, in an empty folder."""
    np.savez(folder / "in.npz", **feeds)  # type: ignore[arg-type]  # numpy's stub takes no mapping
    keep = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", WITHOUT_TOKCC, bundle.engine("aoti").resolve(), folder / "in.npz", folder / "out"]
    return subprocess.run(
        list(map(str, command)), cwd=folder, env={**keep, **environment}, capture_output=True, text=True, check=False
    )


def eager(policy: Any, feeds: dict[str, torch.Tensor]) -> dict[str, npt.NDArray[Any]]:
    """The reduced program, run by torch operation by operation."""
    found = tokcc.reduce(build(), policy, example_inputs=tuple(feeds.values())).module()(*feeds.values())
    return {name: value.detach().numpy() for name, value in found.items()}


class TestPackage:
    """One compile for all of them."""

    @pytest.mark.parametrize("batch", [1, 2, 7])
    def test_it_equals_the_eager_reduced_model(self, bundle: Bundle, batch: int) -> None:
        x = pixels(batch, seed=4)
        want, got = eager("tome", {"pixels": x}), bundle.run({"pixels": x.numpy()})
        assert list(got) == ["logits", "tokens"]
        for name, value in got.items():
            np.testing.assert_allclose(value, want[name], rtol=1e-5, atol=1e-5)

    def test_report_and_manifest_know_it(self, bundle: Bundle) -> None:
        assert {(check.engine, check.output) for check in bundle.report.parity.checks} == {
            ("aoti", "logits"),
            ("aoti", "tokens"),
        }
        assert bundle.report.parity.passed
        assert bundle.engine("aoti").name == "model.aoti.pt2"
        assert bundle.manifest.ranges == {"batch": (1, 9)}
        details = bundle.manifest.backends["aoti"].details
        assert details["device"] == "cpu"
        assert details["torch"] == torch.__version__
        assert details["freezing"] is True
        assert details["isa"] == AotiSession(bundle.engine("aoti")).metadata["AOTI_CPU_ISA"]
        assert "tome" in AotiSession(bundle.engine("aoti")).metadata["tokcc.policy"]

    def test_the_bundle_is_whole_and_verifies(self, bundle: Bundle) -> None:
        bundle.verify()
        assert [path.name for path in bundle.path.iterdir() if path.name.startswith(".")] == []
        parity = verify(bundle)
        assert parity.passed
        assert {check.engine for check in parity.checks} == {"aoti"}

    def test_a_fresh_process_without_tokcc(self, bundle: Bundle, tmp_path: Path) -> None:
        feeds = {"pixels": pixels(3, seed=8).numpy()}
        done = elsewhere(bundle, feeds, tmp_path)
        assert done.returncode == 0, done.stderr
        got, want = np.load(tmp_path / "out.npz"), bundle.run(feeds)
        for name, value in want.items():
            np.testing.assert_array_equal(got[name], value)

    def test_torch_checks_inputs_when_asked(self, bundle: Bundle, tmp_path: Path) -> None:
        done = elsewhere(bundle, {"pixels": pixels(2)[:, :2].numpy()}, tmp_path, AOTI_RUNTIME_CHECK_INPUTS="1")
        assert done.returncode != 0
        assert "unmatched dim value at 1" in done.stderr

    @pytest.mark.parametrize(
        ("wrong", "says"),
        [
            (pixels(10), "1 to 9"),
            (pixels(2)[:, :2], "[batch, 3, 16, 16]"),
            (pixels(2)[..., :12], "[batch, 3, 16, 16]"),
            (pixels(2)[0], "[batch, 3, 16, 16]"),
            (pixels(2).double(), "float32"),
        ],
    )
    def test_a_wrong_shape_or_type_is_an_error(self, bundle: Bundle, wrong: torch.Tensor, says: str) -> None:
        with pytest.raises(UsageError) as error:
            bundle.run({"pixels": wrong.numpy()})
        assert says in str(error.value)

    def test_how_an_input_lies_in_memory_does_not_matter(self, bundle: Bundle) -> None:
        x = pixels(2, seed=5)
        other = x.to(memory_format=torch.channels_last).numpy()
        assert other.strides != x.numpy().strides
        want, got = bundle.run({"pixels": x.numpy()}), bundle.run({"pixels": other})
        np.testing.assert_array_equal(got["logits"], want["logits"])

    def test_a_cut_file_is_refused(self, bundle: Bundle, tmp_path: Path) -> None:
        cut = tmp_path / "model.aoti.pt2"
        cut.write_bytes(bundle.engine("aoti").read_bytes()[:5000])
        with pytest.raises(LoweringError, match="does not load"):
            AotiSession(cut)

    def test_a_lesser_cpu_is_told(self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        assert lacking(str(bundle.manifest.backends["aoti"].details["isa"])) is None
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
        assert lacking("AVX512 AVX512_VNNI") == "AVX512"
        assert lacking("AVX2") is None
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
        assert lacking("AVX2") == "AVX2"
        details = bundle.manifest.backends["aoti"].model_copy(update={"details": {"isa": "AVX512"}})
        opened = Bundle(bundle.path)
        opened.manifest = opened.manifest.model_copy(update={"backends": {"aoti": details}})
        with pytest.raises(UsageError, match="more instructions"):
            opened.run({"pixels": pixels().numpy()})


class TestRefused:
    def test_a_method_that_needs_a_loop(self, tmp_path: Path) -> None:
        with pytest.raises(LoweringError) as error:
            tiny(tmp_path, GREEDY)
        text = str(error.value)
        assert "tokcc::greedy_select" in text
        assert GREEDY in text
        assert "--backend onnx" in text
        assert list(tmp_path.iterdir()) == []

    def test_already_by_a_dry_run(self) -> None:
        with pytest.raises(LoweringError, match="greedy_select"):
            tokcc.compile(build(), GREEDY, example_inputs=(pixels(),), backends=("aoti",), dry_run=True)
        found = tokcc.compile(build(), "tome", example_inputs=(pixels(),), backends=("aoti",), dry_run=True)
        assert isinstance(found, DryRun)

    def test_on_the_command_line(self, tmp_path: Path) -> None:
        model = f"{ROOT / 'tests/cli/tiny_vit.py'}:model"
        arguments = ["compile", model, "-p", GREEDY, "--backend", "aoti", "-o", str(tmp_path / "out")]
        result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
        assert result.exit_code == 5, result.output
        assert "greedy_select" in result.output

    @pytest.mark.parametrize("cxx", [None, "nowhere-c++"])
    def test_no_compiler(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cxx: str | None) -> None:
        monkeypatch.setenv("PATH", str(tmp_path / "empty"))
        monkeypatch.delenv("CXX", raising=False)
        if cxx is not None:
            monkeypatch.setenv("CXX", cxx)
        with pytest.raises(LoweringError, match=r"C\+\+ compiler") as error:
            tiny(tmp_path)
        assert "apt install g++" in str(error.value)
        assert list(tmp_path.iterdir()) == []

    def test_a_compiler_that_fails(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CXX", shutil.which("false") or "false")
        program = trace(torch.nn.Linear(3, 3), {"input": torch.randn(2, 3)})
        with pytest.raises(LoweringError):
            package(program, tmp_path / "m.aoti.pt2", {"input": torch.randn(2, 3)}, AotiOptions())
        assert list(tmp_path.iterdir()) == []

    def test_inputs_that_do_not_lie_in_order(self, tmp_path: Path) -> None:
        x = torch.randn(3, 2).T
        with pytest.raises(LoweringError, match="how inputs lie in memory"):
            package(trace(torch.nn.Linear(3, 3), {"input": x}), tmp_path / "m.pt2", {"input": x}, AotiOptions())

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"device": "tpu"}, "cpu or cuda"),
            ({"aoti": {"freezing": "yes"}}, "true or false"),
            ({"aoti": {"max_autotun": True}}, "max_autotun"),
        ],
    )
    def test_options(self, tmp_path: Path, options: dict[str, Any], says: str) -> None:
        with pytest.raises(UsageError, match=says):
            tiny(tmp_path, **options)
        with pytest.raises(UsageError, match="aoti among the backends"):
            tokcc.compile(build(), "tome", example_inputs=(pixels(),), output=tmp_path / "out", device="cuda")
        assert list(tmp_path.iterdir()) == []
        assert AotiOptions.of("cpu", {"freezing": False, "max_autotune": True}) == AotiOptions(
            freezing=False, inductor={"max_autotune": True}
        )


class TestCuda:
    def test_the_bundle_has_what_builds_a_package(self, tmp_path: Path) -> None:
        bundle = tiny(tmp_path, device="cuda")
        folder = bundle.path / "aoti_cuda"
        assert sorted(path.name for path in folder.iterdir()) == ["build_cuda.py", "model.pt2"]
        assert bundle.report.parity.passed
        assert [check.engine for check in bundle.report.parity.checks] == ["aoti", "aoti"]
        assert "build_cuda.py" in " ".join(bundle.report.notes)
        assert bundle.manifest.backends["aoti"].details == {"device": "cuda", "built": False}
        with pytest.raises(UsageError, match="no aoti package yet"):
            bundle.run({"pixels": pixels().numpy()})
        if not torch.cuda.is_available():
            command = [sys.executable, str(folder / "build_cuda.py")]
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
            assert done.returncode == 1
            assert "no CUDA device" in done.stderr


def zoo_bundle(name: str, policy: Any, folder: Path, **options: Any) -> Bundle:
    entry = ZOO[name]
    example = entry.inputs(2)
    return tokcc.compile(  # type: ignore[no-any-return]  # a dry run gives something else
        entry.build(),
        policy,
        example_inputs=example,
        dynamic_shapes=entry.dynamic_shapes(),
        output=folder / "out",
        **options,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "policy"),
    [
        ("vit_classifier", "evit"),
        ("vit", "tome"),
        ("bert", "power-bert"),
        ("bert", "uniform"),
        ("vit_classifier", "none"),
    ],
)
def test_it_equals_the_onnx_engine(model: str, policy: str, tmp_path: Path) -> None:
    """Dynamic batch and, in texts, length; padding too."""
    bundle = zoo_bundle(model, policy, tmp_path, backends=("onnx", "aoti"), calibrate=False)
    assert {check.engine for check in bundle.report.parity.checks} == {"onnx", "aoti"}
    entry = ZOO[model]
    for batch, length in ((1, 9), (5, 14)):
        feeds = entry.inputs(batch, length if entry.has_length else None, seed=batch)
        arrays = {name: value.numpy() for name, value in feeds.items()}
        real = arrays.get("attention_mask")
        want, got = (bundle.run(arrays, backend) for backend in ("onnx", "aoti"))
        for name, value in want.items():
            at = real.astype(bool) if real is not None and value.ndim == 3 and value.shape[1] == real.shape[1] else ...
            np.testing.assert_allclose(got[name][at], value[at], rtol=1e-3, atol=1e-4)
    if ZOO[model].has_length:
        arrays["attention_mask"] = arrays["attention_mask"][:, :-1]
        with pytest.raises(UsageError, match="disagree"):
            bundle.run(arrays, "aoti")


@pytest.mark.parametrize("backends", [("pt2",), pytest.param(("aoti", "pt2"), marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision(dtype: str, backends: tuple[str, ...], tmp_path: Path) -> None:
    """Of a fixed batch there are constants to fold, too."""
    made = tiny(tmp_path, dtype=dtype, backends=backends, dynamic_shapes=None, policy=TOME)
    checks = list(made.report.parity.checks)
    assert {check.engine for check in checks} == set(backends)
    if "aoti" in backends:
        checks += verify(made).checks
    for check in checks:
        assert check.passed
        assert check.atol > 1e-3 * check.scale  # the tolerance is that of the type


def test_every_use_of_a_constant_gets_one_of_its_own() -> None:
    class Shared(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.arange(4.0))
            self.weight = torch.nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + self.table) * self.table - (self.table + self.weight) * self.weight

    module = torch.fx.symbolic_trace(Shared())
    table = next(iter(module.graph.find_nodes(op="get_attr")))
    for other in list(module.graph.find_nodes(op="get_attr"))[1:]:
        if other.target == table.target:
            other.replace_all_uses_with(table)
            module.graph.erase_node(other)
    assert len(table.users) == 3
    _copy_shared_constants(module)
    module.graph.lint()
    buffers = [node for node in module.graph.find_nodes(op="get_attr") if node.target != "weight"]
    assert [len(node.users) for node in buffers] == [1, 1, 1]
    assert len({getattr(module, node.target).data_ptr() for node in buffers}) == 3
    x = torch.randn(4)
    assert torch.equal(module(x), Shared()(x))


@pytest.mark.slow
def test_it_is_measured_against_a_plain_package(tmp_path: Path) -> None:
    bundle = zoo_bundle("vit_classifier", "evit", tmp_path, backends=("onnx", "aoti"), keep_baseline=True)
    report = bundle.report
    assert report.latency is not None
    assert "onnxruntime" in report.latency.runtime
    assert "AOTInductor" in report.further["aoti"].runtime
    assert report.further["aoti"].shapes == report.latency.shapes
    assert any("aoti" in label for label, _ in speed_lines(report))
    assert bundle.baseline_of("aoti").is_file()
    assert bundle.baseline.is_file()
    assert "AOTInductor" in bench(bundle, backend="aoti", runs=2).latency.runtime
    assert "onnxruntime" in bench(bundle, runs=2).latency.runtime
    plain = AotiSession(bundle.baseline_of("aoti"))
    feeds = {name: value.numpy() for name, value in ZOO["vit_classifier"].inputs(3, seed=3).items()}
    with torch.no_grad():
        want = ZOO["vit_classifier"].build()(**{name: torch.from_numpy(x) for name, x in feeds.items()})
    found = next(iter(plain.run(feeds).values()))
    reference = next(iter(want.values())) if isinstance(want, dict) else want
    np.testing.assert_allclose(found, reference, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_alone_it_is_the_engine_that_is_measured(tmp_path: Path) -> None:
    bundle = tiny(
        tmp_path, calibrate=True, calibration=[{"pixels": pixels(4, seed=2).numpy()}], aoti={"freezing": False}
    )
    report = bundle.report
    assert report.latency is not None
    assert "AOTInductor" in report.latency.runtime
    assert report.fidelity is not None
    assert report.totals.inserted_seconds is None
    assert not bundle.baseline_of("aoti").exists()
    assert bundle.manifest.backends["aoti"].details["freezing"] is False


@pytest.mark.slow
def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    model = f"{ROOT / 'tests/cli/tiny_vit.py'}:model"
    command = [sys.executable, "-m", "tokcc", "compile", model, "-p", "tome", "--backend", "aoti", "--no-calibrate"]
    command += ["-o", str(tmp_path / "out")]
    process = subprocess.Popen(command, start_new_session=True, cwd=ROOT, preexec_fn=heed_signals)
    try:
        until = time.monotonic() + 240
        while not list(tmp_path.glob(".out.tmp-*/.aoti-*/build/*")):  # the compiler is about to run
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait(60) == 130
    finally:
        process.kill()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_example_in_cpp(bundle: Bundle, tmp_path: Path) -> None:
    program = tmp_path / "run"
    make = ["make", "-C", str(ROOT / "examples/cpp_aoti"), f"PYTHON={sys.executable}", f"OUT={program}"]
    subprocess.run(make, check=True, capture_output=True)
    x = pixels(3, seed=6).numpy()
    x.tofile(tmp_path / "in.f32")

    def run(*sizes: int) -> subprocess.CompletedProcess[str]:
        command = [program, bundle.engine("aoti"), tmp_path / "in.f32", *sizes, tmp_path / "out.f32"]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)

    done = run(*x.shape)
    assert done.returncode == 0, done.stderr
    want = bundle.run({"pixels": x})["logits"]
    np.testing.assert_array_equal(np.fromfile(tmp_path / "out.f32", np.float32).reshape(want.shape), want)
    wrong = run(3, 3, 32, 8)  # as many numbers
    assert wrong.returncode == 1
    assert "unmatched dim value" in wrong.stderr
    assert json.loads((bundle.path / "manifest.json").read_text())["backends"]["aoti"]["details"]["isa"] in done.stdout
