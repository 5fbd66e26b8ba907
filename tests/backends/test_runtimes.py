"""One engine file, three runtimes: ONNX Runtime, OpenVINO, and onnx's own evaluator.

What a runtime cannot do is asserted here and stated in docs/runtimes.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from tests.zoo import ZOO, ZooModel
from tests.zoo.matrix import reduced
from tokcc.backends.onnx import build_onnx
from tokcc.backends.ort import Session
from tokcc.ir.program import Program
from tokcc.testing import trace

# torch's own pytree copies a deprecated class in run_decompositions.
pytestmark = pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning")

Arrays = dict[str, npt.NDArray[Any]]
LIMIT = 2e-5


@dataclass(frozen=True)
class Engine:
    """A graph that every runtime is asked to run.

    Attributes:
        model: Zoo entry.
        preset: Policy.
        dynamic: With symbolic axes.
        long_gather: It gathers single elements along more than 64 positions, which onnx's evaluator cannot.
    """

    model: str
    preset: str
    dynamic: bool
    long_gather: bool = False

    def __str__(self) -> str:
        return f"{self.model}-{self.preset}-{'dynamic' if self.dynamic else 'static'}"


ENGINES = [
    Engine("vit", "tome", True),
    Engine("vit", "evit", False),
    Engine("vit", "divprune", True),  # the Loop
    Engine("vit_classifier", "uniform", True),
    Engine("bert", "power-bert", True, long_gather=True),
    Engine("bert", "tome", True, long_gather=True),
    Engine("whisper_encoder", "a-tome", False, long_gather=True),
]
SLOW = [
    Engine("vit", "none", True),
    Engine("vit", "tome", False),
    Engine("vit", "evit", True),
    Engine("vit", "pitome", True),
    Engine("vit", "zero-tprune", True, long_gather=True),
    Engine("bert", "none", True, long_gather=True),
    Engine("bert", "ltp", True, long_gather=True),
    Engine("whisper_encoder", "a-tome", True, long_gather=True),
    Engine("torch_encoder_nbc_post", "tome", True),
    Engine("dinov2_registers", "evit", True),
]
BOTH = [*ENGINES, *(pytest.param(engine, marks=pytest.mark.slow) for engine in SLOW)]


@cache
def traced(model: str, dynamic: bool) -> Program:
    entry = ZOO[model]
    return trace(entry.build(), entry.inputs(3 if dynamic else 1), entry.dynamic_shapes() if dynamic else None)


@cache
def built(engine: Engine) -> onnx.ModelProto:
    _, sliced, _, _ = reduced(traced(engine.model, engine.dynamic), engine.preset)
    return ir.to_proto(build_onnx(sliced))


def inputs_of(engine: Engine) -> tuple[ZooModel, dict[str, torch.Tensor], Arrays]:
    entry = ZOO[engine.model]
    inputs = entry.inputs(2 if engine.dynamic else 1, seed=7)
    return entry, inputs, {name: value.numpy() for name, value in inputs.items()}


def compare(entry: ZooModel, inputs: dict[str, torch.Tensor], got: Arrays, want: Arrays) -> None:
    """Rows of padding are left out: a model promises nothing there, and ties of padding are in no order."""
    assert set(got) == set(want)
    for name, value in want.items():
        assert got[name].shape == value.shape
        found, expected = (entry.defined(name, torch.from_numpy(x), inputs) for x in (got[name], value))
        assert float((found - expected).abs().max()) <= LIMIT * float(expected.abs().max()), name


@pytest.fixture
def onnxruntime_outputs(tmp_path: Path) -> Any:
    def run(engine: Engine) -> Arrays:
        path = tmp_path / "model.onnx"
        onnx.save(built(engine), path)
        return Session(path, threads=1).run(inputs_of(engine)[2])

    return run


@pytest.mark.parametrize("engine", BOTH, ids=str)
def test_openvino(engine: Engine, onnxruntime_outputs: Any) -> None:
    """OpenVINO takes all of them; tied scores it orders its own way, and only padding has tied scores here."""
    openvino = pytest.importorskip("openvino", reason="the extra `openvino` is not installed")
    entry, inputs, feeds = inputs_of(engine)
    core = openvino.Core()
    network = core.read_model(built(engine).SerializeToString())
    compiled = core.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
    result = compiled(feeds)
    names = [output.name for output in built(engine).graph.output]
    got = {name: np.array(result[compiled.output(name)]) for name in names}
    compare(entry, inputs, got, onnxruntime_outputs(engine))


class GatherElements(OpRun):
    """onnx's own is made of ``np.choose``, which takes at most 64 choices."""

    def _run(self, data: Any, indices: Any, axis: int | None = None) -> tuple[Any]:
        return (np.take_along_axis(data, indices, axis=axis or 0),)


def evaluate(model: onnx.ModelProto, feeds: Mapping[str, Any], mended: bool) -> Arrays:
    evaluator = ReferenceEvaluator(model, new_ops=[GatherElements] if mended else None)
    names = [output.name for output in model.graph.output]
    return dict(zip(names, evaluator.run(None, dict(feeds)), strict=True))


@pytest.mark.parametrize("engine", BOTH, ids=str)
def test_onnx_reference_evaluator(engine: Engine, onnxruntime_outputs: Any) -> None:
    entry, inputs, feeds = inputs_of(engine)
    model = built(engine)
    if engine.long_gather:
        with pytest.raises(ValueError, match="cannot reshape array"):
            evaluate(model, feeds, mended=False)
    compare(entry, inputs, evaluate(model, feeds, mended=engine.long_gather), onnxruntime_outputs(engine))


def test_the_documented_table_is_this_one() -> None:
    """docs/runtimes.md has a row for every engine that is run here."""
    text = (Path(__file__).parents[2] / "docs" / "runtimes.md").read_text(encoding="utf-8")
    for engine in (*ENGINES, *SLOW):
        shape = "dynamic" if engine.dynamic else "static"
        evaluator = "needs `GatherElements` mended" if engine.long_gather else "equal"
        assert f"| `{engine.model}` + `{engine.preset}`, {shape} | equal | equal | {evaluator} |" in text


def test_integer_scores_are_sorted_exactly_below_2_to_the_24() -> None:
    """Why places of padding are below that: OpenVINO takes 2**30 and 2**30 + 1 for one, and mixed up real tokens."""
    from tokcc.passes import matching

    assert matching._SOURCE < 2**24
