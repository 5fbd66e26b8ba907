"""The program around the pipeline: help, exit codes, error messages, JSON, and the commands that need no model."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import tokcc
from tokcc import errors
from tokcc.cli import app, main
from tokcc.cli.doctor import PACKAGES, TORCH_TENSORRT, Found, Package, backend_states, probe
from tokcc.cli.shapes import parse_shapes, shape_range
from tokcc.config import load_policy
from tokcc.errors import TokccError, UsageError
from tokcc.passes.methods import library

COMMANDS = ("compile", "inspect", "gallery", "presets", "verify", "run", "bench", "report", "calibrate", "doctor")


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Stands in for the pipeline, to test what the command line does with what it gets."""
    module = ModuleType("tokcc.pipeline")
    monkeypatch.setitem(sys.modules, "tokcc.pipeline", module)
    monkeypatch.setattr(tokcc, "pipeline", module, raising=False)
    return module


def failing(error: BaseException) -> Any:
    def fail(*args: Any, **options: Any) -> Any:
        raise error

    return fail


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_every_command_has_an_example_and_the_common_options(self, command: str) -> None:
        result = run(command, "--help")
        assert result.exit_code == 0
        assert f"Example: tokcc {command}" in result.output
        assert all(option in result.output for option in ("--json", "--quiet", "--verbose"))

    def test_program(self) -> None:
        result = run("--help")
        assert all(command in result.output for command in COMMANDS)
        assert run("--version").output == f"tokcc {tokcc.__version__}\n"

    def test_compile_has_the_options_of_the_design(self) -> None:
        text = run("compile", "--help").output
        options = (
            "policy output backend calib input dynamic min-shapes opt-shapes max-shapes opset dtype atol rtol gate "
            "task dry-run force seed allow-pickle no-calibrate"
        )
        assert all(f"--{option}" in text for option in options.split())

    def test_help_is_fast_because_torch_is_not_imported(self) -> None:
        code = "import sys, tokcc.cli as c; c.main(['--help']); sys.exit(int('torch' in sys.modules))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
        assert done.returncode == 0

    def test_python_m(self) -> None:
        done = subprocess.run([sys.executable, "-m", "tokcc", "--version"], capture_output=True, text=True, check=True)
        assert done.stdout == f"tokcc {tokcc.__version__}\n"


class TestFailures:
    @pytest.mark.parametrize(
        "kind", [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, TokccError)]
    )
    def test_exit_codes_and_messages(self, pipeline: ModuleType, kind: type[TokccError]) -> None:
        error = kind("cannot [do] it", policy="p.yaml:4  step 1", needed="[B, 64]", help="try `x`")
        pipeline.compile = failing(error)  # type: ignore[attr-defined]
        result = run("compile", "m.pt", "-p", "tome", "-o", "out")
        assert result.exit_code == kind.exit_code
        assert f"error[{kind.__name__}]: cannot [do] it" in result.stderr
        assert "  needed  [B, 64]\n" in result.stderr
        assert "Traceback" not in result.stderr
        assert result.stdout == ""

    def test_verbose_adds_the_traceback(self, pipeline: ModuleType) -> None:
        pipeline.inspect = failing(UsageError("x"))  # type: ignore[attr-defined]
        assert "Traceback" in run("inspect", "m.pt", "--verbose").stderr

    def test_json_errors(self, pipeline: ModuleType) -> None:
        pipeline.compile = failing(errors.AxisError("cannot", node="view_12"))  # type: ignore[attr-defined]
        result = run("compile", "m.pt", "-p", "tome", "-o", "out", "--json")
        assert json.loads(result.stdout)["error"] == {
            "type": "AxisError",
            "what": "cannot",
            "stage": "propagate",
            "node": "view_12",
            "exit_code": 4,
        }

    def test_a_crash_is_short(self, pipeline: ModuleType) -> None:
        pipeline.inspect = failing(ZeroDivisionError("oops"))  # type: ignore[attr-defined]
        result = run("inspect", "m.pt")
        assert result.exit_code == 1
        assert "tokcc crashed: ZeroDivisionError: oops" in result.stderr
        assert "--verbose" in result.stderr
        assert "Traceback" not in result.stderr
        assert "Traceback" in run("inspect", "m.pt", "-v").stderr
        assert json.loads(run("inspect", "m.pt", "--json").stdout)["error"]["exit_code"] == 1

    def test_ctrl_c(self, pipeline: ModuleType) -> None:
        pipeline.inspect = failing(KeyboardInterrupt())  # type: ignore[attr-defined]
        result = run("inspect", "m.pt")
        assert result.exit_code == 130
        assert "interrupted" in result.stderr

    @pytest.mark.parametrize(
        "arguments", [("compil",), ("compile",), ("compile", "m", "--backend", "tvm"), ("--nope",)]
    )
    def test_usage(self, arguments: tuple[str, ...]) -> None:
        assert run(*arguments).exit_code == 2

    def test_main_returns_the_code(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["presets", "--show", "nope"]) == 2
        assert main(["presets", "--quiet"]) == 0
        assert main(["nope"]) == 2
        assert capsys.readouterr().out == ""

    def test_what_libraries_print_is_not_the_result(self, pipeline: ModuleType) -> None:
        class Inspection:
            def to_dict(self) -> dict[str, int]:
                print("noise")
                return {"blocks": 12}

        pipeline.inspect = lambda *args, **options: Inspection()  # type: ignore[attr-defined]
        result = run("inspect", "m.pt", "--json")
        assert json.loads(result.stdout) == {"blocks": 12}
        assert "noise" in result.stderr
        assert "blocks: 12" in run("inspect", "m.pt").stdout

    def test_a_reader_that_goes_away(self) -> None:
        read, write = os.pipe()
        os.close(read)
        with os.fdopen(write, "wb") as closed:
            command = [sys.executable, "-m", "tokcc", "presets", "--json"]
            done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, check=False)
        assert "Traceback" not in done.stderr


class TestCompile:
    def test_without_a_policy_it_says_what_fits(self, pipeline: ModuleType) -> None:
        class Inspection:
            def to_dict(self) -> dict[str, Any]:
                return {"presets": [{"name": "tome", "fits": True}, {"name": "evit", "fits": False}]}

        pipeline.inspect = lambda *args, **options: Inspection()  # type: ignore[attr-defined]
        result = run("compile", "m.pt", "-o", "out")
        assert result.exit_code == 2
        assert "tome" in result.stdout
        assert "--policy is missing" in result.stderr

    def test_without_an_output(self, pipeline: ModuleType) -> None:
        result = run("compile", "m.pt", "-p", "tome")
        assert result.exit_code == 2
        assert "--output is missing" in result.stderr

    def test_gates_need_measuring(self, pipeline: ModuleType) -> None:
        result = run("compile", "m.pt", "-p", "tome", "-o", "out", "--no-calibrate", "--gate", "speedup>=1")
        assert result.exit_code == 2

    def test_options_arrive(self, pipeline: ModuleType) -> None:
        class Plan:
            def to_dict(self) -> dict[str, Any]:
                return {"layers": [{"layer": 3, "tokens": "197 -> 184"}]}

        calls: list[tuple[Any, dict[str, Any]]] = []

        def compile_model(*args: Any, **options: Any) -> Plan:
            calls.append((args, options))
            return Plan()

        pipeline.compile = compile_model  # type: ignore[attr-defined]
        text = (
            "compile m.pt -p tome --dry-run --backend onnx --backend pt2 --input x=float32[2,3] --dynamic x:0=1..8 "
            "--min-shapes y:1x3 --opt-shapes y:2x3 --max-shapes y:4x3 --gate speedup>=1.2 --opset 20 --atol 1e-3 "
            "--calib data --task feature-extraction --seed 7 --keep-baseline --allow-pickle --device cuda "
            "--aoti-option freezing=false --aoti-option cpp.simdlen=256 --tensorrt-option plugins=true"
        )
        result = run(*text.split())
        assert result.exit_code == 0, result.stderr
        assert "197 -> 184" in result.stdout
        ((args, options),) = calls
        assert args == ("m.pt", "tome")
        del options["progress"]
        assert options == {
            "inputs": ("x=float32[2,3]",),
            "dynamic": ("x:0=1..8",),
            "shapes": {"y": ((1, 3), (2, 3), (4, 3))},
            "tensorrt": {"plugins": True},
            "device": "cuda",
            "aoti": {"freezing": False, "cpp.simdlen": 256},
            "task": "feature-extraction",
            "allow_pickle": True,
            "backends": ("onnx", "pt2"),
            "output": None,
            "calibration": Path("data"),
            "gates": ["speedup>=1.2"],
            "opset": 20,
            "dtype": None,
            "atol": 1e-3,
            "rtol": None,
            "force": False,
            "seed": 7,
            "calibrate": True,
            "keep_baseline": True,
            "dry_run": True,
        }


class TestShapes:
    def test_names_with_colons_and_dots(self) -> None:
        assert parse_shapes("x:0:1x3, past.0.key:4", "--min-shapes") == {"x:0": (1, 3), "past.0.key": (4,)}

    @pytest.mark.parametrize("text", ["", "x", "x:", "x:0x3", "x:ax3", ":1x3", "x:1,x:2"])
    def test_malformed(self, text: str) -> None:
        with pytest.raises(UsageError, match="--min-shapes"):
            parse_shapes(text, "--min-shapes")

    @pytest.mark.parametrize(
        "three", [("x:1", "x:1", None), ("x:2", "x:1", "x:3"), ("x:1", "x:1x1", "x:2"), ("x:1", "x:1", "y:1")]
    )
    def test_three_that_do_not_agree(self, three: tuple[str, str, str | None]) -> None:
        with pytest.raises(UsageError):
            shape_range(*three)

    def test_none(self) -> None:
        assert shape_range(None, None, None) is None


class TestPresets:
    def test_json(self) -> None:
        rows = json.loads(run("presets", "--json").stdout)
        assert [row["name"] for row in rows] == sorted(library())
        assert all({"name", "nodes", "needs", "fidelity", "paper"} <= row.keys() for row in rows)

    def test_table(self) -> None:
        lines = run("presets").stdout.splitlines()
        assert lines[0].split() == ["name", "nodes", "needs", "fidelity", "paper"]
        assert len(lines) == 1 + len(library())

    @pytest.mark.parametrize("name", library())
    def test_what_is_shown_is_a_policy_file(self, name: str, tmp_path: Path) -> None:
        path = tmp_path / "policy.yaml"
        path.write_text(run("presets", "--show", name).stdout)
        shown = load_policy(path, presets={}).policy
        assert shown.to_dict() == load_policy(name, presets=library()).policy.to_dict()
        assert json.loads(run("presets", "--show", name, "--json").stdout)["policy"] == yaml.safe_load(path.read_text())

    def test_unknown(self) -> None:
        result = run("presets", "--show", "tomee")
        assert result.exit_code == 2
        assert "did you mean `tome`?" in result.stderr


class TestDoctor:
    def test_packages_are_tried_in_a_process_of_their_own(self) -> None:
        works = probe(Package("yaml", "policies", "pip install pyyaml", "module.__name__"))
        assert (works.state, works.detail) == ("works", "yaml")
        assert works.version
        assert probe(Package("no_such_module", "x", "pip install it")).help == "pip install it"

    def test_a_broken_package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "broken_one.py").write_text("raise ImportError('libnvinfer.so.11 is missing')")
        (tmp_path / "killer_one.py").write_text("import os; os.abort()")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        found = probe(Package("broken_one", "x", "reinstall"))
        assert (found.state, found.detail) == ("broken", "ImportError: libnvinfer.so.11 is missing")
        assert probe(Package("killer_one", "x", "reinstall")).state == "broken"

    def test_backends_follow_from_packages(self) -> None:
        found = {package.module: Found(package.module, "works", "1", "", "CUDA", "") for package in PACKAGES}
        found[TORCH_TENSORRT.module] = Found(TORCH_TENSORRT.module, "works", "1", "", "", "")
        states = {state.name: state.state for state in backend_states(found)}
        assert states["onnx"] == states["pt2"] == states["tensorrt"] == states["torch_tensorrt"] == "works"
        processor = {**found, "torch": Found("torch", "works", "1", "", "CPU only", "")}
        states = {state.name: state.state for state in backend_states(processor)}
        assert (states["onnx"], states["tensorrt"]) == ("works", "builds only")
        missing = {name: Found(name, "missing", "", "", "", "") for name in ("onnxruntime", "tensorrt", "tensorrt_rtx")}
        states = {state.name: state.state for state in backend_states({**found, **missing})}
        assert (states["onnx"], states["tensorrt"]) == ("builds only", "builds only")
        broken = {**found, "torch": Found("torch", "broken", "", "", "", "")}
        assert {state.state for state in backend_states(broken)} == {"unavailable"}

    @pytest.mark.parametrize(
        ("state", "detail", "why"),
        [
            ("works", "triton is not installed", "triton is not installed"),
            ("broken", "ImportError: no libtorch", "it does not import: ImportError: no libtorch"),
        ],
    )
    def test_torch_tensorrt_says_itself_what_it_lacks(self, state: Any, detail: str, why: str) -> None:
        found = {package.module: Found(package.module, "works", "1", "", "", "") for package in PACKAGES}
        found[TORCH_TENSORRT.module] = Found(TORCH_TENSORRT.module, state, "1", "", detail, "")
        last = backend_states(found)[-1]
        assert (last.name, last.state, last.why) == ("torch_tensorrt", "unavailable", why)

    def test_aoti_needs_a_compiler(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        packages = (*PACKAGES, TORCH_TENSORRT)
        found = {package.module: Found(package.module, "works", "1", "", "", "") for package in packages}
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
        state = next(state for state in backend_states(found) if state.name == "aoti")
        assert state.state == "unavailable"
        assert "apt install g++" in state.why
        compiler = tmp_path / "clang++"
        compiler.write_text("#!/bin/sh\n")
        compiler.chmod(0o755)
        state = next(state for state in backend_states(found) if state.name == "aoti")
        assert (state.state, state.why) == ("works", "")

    @pytest.mark.slow
    def test_command(self) -> None:
        data = json.loads(run("doctor", "--json").stdout)
        assert {each["name"] for each in data["packages"]} == {package.module for package in PACKAGES}
        if importlib.util.find_spec("torch_tensorrt") is None:
            assert "torch_tensorrt is not installed" in data["backends"][-1]["why"]
        shown = run("doctor", "--quiet")
        assert (shown.exit_code, shown.output) == (0, "")
