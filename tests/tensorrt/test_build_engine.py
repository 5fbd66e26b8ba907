"""``build_engine.py``: what it refuses by itself, and what TensorRT for RTX makes of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from tests.tensorrt.rtx import build, needs_rtx
from tokcc.backends.tensorrt import build_engine
from tokcc.backends.tensorrt.build_engine import BuildError, check_profiles

SCRIPT = Path(build_engine.__file__)


class Network:
    """The inputs of a network."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        self._inputs = [SimpleNamespace(name=name, shape=shape) for name, shape in shapes.items()]
        self.num_inputs = len(shapes)

    def get_input(self, number: int) -> Any:
        return self._inputs[number]


def profile(**shapes: Any) -> list[dict[str, Any]]:
    return [{"name": "p", "shapes": {n: dict(zip(("min", "opt", "max"), s, strict=True)) for n, s in shapes.items()}}]


class TestProfiles:
    @pytest.mark.parametrize(
        ("given", "said"),
        [
            (profile(x=([1, 8], [2, 8], [4, 8]), y=([1], [1], [1])), "no input `y`"),
            (profile(), "no shapes for `x`"),
            (profile(x=([1], [1], [1])), "`x` has 2 axes"),
            (profile(x=([4, 8], [2, 8], [1, 8])), "axis 0: min <= opt <= max"),
            (profile(x=([1, 4], [1, 8], [1, 8])), "axis 1 is 8 in the model"),
        ],
    )
    def test_what_tensorrt_takes_in_silence_is_refused(self, given: list[dict[str, Any]], said: str) -> None:
        with pytest.raises(BuildError, match=said):
            check_profiles(Network(x=(-1, 8)), given)

    def test_fixed_inputs_need_none(self) -> None:
        check_profiles(Network(x=(-1, 8), fixed=(1, 2)), profile(x=([1, 8], [2, 8], [4, 8])))


def graph(path: Path, nodes: list[onnx.NodeProto], inputs: Any, outputs: Any, constants: Any = ()) -> None:
    made = helper.make_graph(nodes, "g", inputs, outputs, list(constants))
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)


def top_k(folder: Path, k: int) -> None:
    """TopK of 5 * k / 5 of an axis of any length."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "n"])
    y = helper.make_tensor_value_info("y", TensorProto.INT64, ["batch", "k"])
    nodes = [
        helper.make_node("Shape", ["x"], ["n"], start=1, end=2),
        helper.make_node("Min", ["n", "most"], ["k"]),
        helper.make_node("TopK", ["x", "k"], ["v", "y"], axis=1),
    ]
    graph(folder / "model.onnx", nodes, [x], [y], [helper.make_tensor("most", TensorProto.INT64, [1], [k])])
    profiles = {"profiles": profile(x=([1, 16], [1, 64], [1, 8192]))}
    (folder / "profiles.json").write_text(json.dumps(profiles))
    (folder / "build_engine.py").write_bytes(SCRIPT.read_bytes())


@needs_rtx
@pytest.mark.trt
class TestBuilder:
    def test_an_engine_is_written(self, tmp_path: Path) -> None:
        top_k(tmp_path, 3840)
        found = build(tmp_path, targets=("8.0",))
        assert found["ok"], found
        assert (tmp_path / "model.plan").stat().st_size == found["bytes"] > 1000

    def test_a_k_that_fails_at_run_time_fails_the_build(self, tmp_path: Path) -> None:
        top_k(tmp_path, 4096)
        found = build(tmp_path, targets=("8.0",))
        assert not found["ok"]
        assert "exceeds the maximum value allowed" in found["error"]
        assert not (tmp_path / "model.plan").exists()

    def test_a_truncated_model(self, tmp_path: Path) -> None:
        top_k(tmp_path, 8)
        model = tmp_path / "model.onnx"
        model.write_bytes(model.read_bytes()[:40])
        found = build(tmp_path, targets=("8.0",))
        assert not found["ok"]
        assert "parser" in found["error"]

    def test_a_gpu_that_it_cannot_build_for(self, tmp_path: Path) -> None:
        top_k(tmp_path, 8)
        found = build(tmp_path, targets=("9.0",))
        assert "SM90 is unknown" in found["error"]


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "build_engine.py", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


class TestMessages:
    def test_what_is_not_there(self, tmp_path: Path) -> None:
        (tmp_path / "build_engine.py").write_bytes(SCRIPT.read_bytes())
        done = run(tmp_path)
        assert done.returncode == 1
        assert "model.onnx is not there" in done.stderr

    def test_plugins_are_not_for_rtx(self, tmp_path: Path) -> None:
        (tmp_path / "build_engine.py").write_bytes(SCRIPT.read_bytes())
        done = run(tmp_path, "--plugins", "--rtx", "--json")
        assert done.returncode == 1
        assert "no such plugins" in json.loads(done.stdout)["error"]
