"""The written file: names, axes, metadata, external data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from tests.zoo import ZOO
from tokcc.backends import onnx as backend
from tokcc.backends.onnx import build_onnx, save_onnx
from tokcc.backends.ort import Session
from tokcc.errors import LoweringError
from tokcc.ir.program import Program
from tokcc.testing import reduce_program, run_program, trace

# torch's own pytree copies a deprecated class in run_decompositions.
pytestmark = pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning")


def save(program: Program, folder: Path, **kwargs: Any) -> tuple[Path, list[Path]]:
    path = folder / "model.onnx"
    return path, save_onnx(build_onnx(program), path, **kwargs)


def assert_same(program: Program, path: Path, inputs: dict[str, Tensor]) -> None:
    """The file gives what the program gives, under the program's names."""
    got = Session(path, threads=1).run({name: value.numpy() for name, value in inputs.items()})
    assert tuple(got) == program.output_names
    for value, want in zip(got.values(), run_program(program, inputs), strict=True):
        torch.testing.assert_close(torch.from_numpy(np.array(value)), want, rtol=1e-5, atol=1e-5)


def dims(value: Any) -> list[Any]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("preset", ["none", "uniform"])
def test_names_and_axes_are_the_models(preset: str, tmp_path: Path) -> None:
    entry = ZOO["bert"]
    program, _ = reduce_program(trace(entry.build(), entry.inputs(3), entry.dynamic_shapes()), preset)
    path, _ = save(program, tmp_path)
    graph = onnx.load(path).graph
    assert [i.name for i in graph.input] == ["input_ids", "attention_mask"]
    assert [o.name for o in graph.output] == list(entry.outputs)
    (batch, length), (same_batch, same_length) = (dims(i) for i in graph.input)
    assert isinstance(batch, str)
    assert isinstance(length, str)
    assert (batch, length) == (same_batch, same_length)
    assert batch != length
    tokens, pooled = (dims(o) for o in graph.output)
    assert tokens == [batch, length, 64]
    assert pooled == [batch, 64]
    assert_same(program, path, entry.inputs(2, 14, seed=9))


def test_static_axes_are_numbers(tmp_path: Path) -> None:
    entry = ZOO["vit_classifier"]
    path, _ = save(trace(entry.build(), entry.inputs(2)), tmp_path)
    graph = onnx.load(path).graph
    assert dims(graph.input[0]) == [2, 3, 32, 32]
    assert dims(graph.output[0]) == [2, 10]


def test_reduced_outputs_have_their_new_length(tmp_path: Path) -> None:
    policy = {"version": 1, "outputs": {"last_hidden_state": "reduced"}, "steps": [{"preset": "uniform", "keep": 0.5}]}
    entry = ZOO["vit"]
    program, plan = reduce_program(trace(entry.build(), entry.inputs(1)), policy)
    path, _ = save(program, tmp_path)
    shapes = {o.name: dims(o) for o in onnx.load(path).graph.output}
    assert shapes["last_hidden_state"][1] == plan.made[-1].size
    assert_same(program, path, entry.inputs(1, seed=2))


class Twice(nn.Module):
    """Outputs of every kind: computed, the same twice, an input, a parameter, a constant, and nested ones."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(4.0))

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = x * self.weight
        return {"y": y, "again": y, "same": x, "weight": self.weight + 0, "nested": {"a": y + 1, "b": [y - 1]}}


def test_outputs_of_every_kind(tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    program = trace(Twice(), {"x": x}, {"x": {0: Dim("n", min=1, max=9)}})
    assert program.output_names == ("y", "again", "same", "weight", "nested.a", "nested.b.0")
    path, _ = save(program, tmp_path)
    onnx.checker.check_model(str(path), full_check=True)
    assert_same(program, path, {"x": x})
    assert_same(program, path, {"x": x[:1]})


class Clash(nn.Module):
    """Names that are taken: an output called like its input, like a parameter, like a node."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(4.0))

    def forward(self, x: Tensor, add: Tensor) -> dict[str, Any]:
        return {"x": x + add, "weight": x * self.weight, "Add_out": x - add, "add": add}


def test_names_that_are_taken(tmp_path: Path) -> None:
    """Outputs keep their names before weights and values; only an input's name cannot be given twice."""
    inputs = {"x": torch.randn(2, 4), "add": torch.randn(2, 4)}
    program = trace(Clash(), inputs)
    assert program.output_names == ("x_out", "weight", "Add_out", "add_out")
    path, _ = save(program, tmp_path)
    onnx.checker.check_model(str(path), full_check=True)
    assert_same(program, path, inputs)


class Plain(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: Tensor) -> Any:
        made = tuple(x + i for i in range(self.count))
        return made[0] if self.count == 1 else made


@pytest.mark.parametrize(("count", "names"), [(1, ("output",)), (2, ("output_0", "output_1"))])
def test_outputs_without_names(count: int, names: tuple[str, ...], tmp_path: Path) -> None:
    program = trace(Plain(count), {"x": torch.randn(2)})
    assert program.output_names == names
    path, _ = save(program, tmp_path)
    assert_same(program, path, {"x": torch.randn(2)})


class Unused(nn.Module):
    def forward(self, x: Tensor, ignored: Tensor) -> dict[str, Tensor]:
        return {"y": x + 1}


def test_an_input_that_nothing_reads_is_kept(tmp_path: Path) -> None:
    """Callers feed it."""
    inputs = {"x": torch.randn(2), "ignored": torch.randn(3)}
    program = trace(Unused(), inputs)
    path, _ = save(program, tmp_path)
    assert [i.name for i in onnx.load(path).graph.input] == ["x", "ignored"]
    assert_same(program, path, inputs)


def test_metadata(tmp_path: Path) -> None:
    entry = ZOO["vit_classifier"]
    program = trace(entry.build(), entry.inputs(1))
    model = build_onnx(program, metadata={"policy": "tome", "tokens": {"before": 65, "after": [52, 39]}})
    save_onnx(model, tmp_path / "model.onnx")
    proto = onnx.load(tmp_path / "model.onnx")
    found = {entry.key: entry.value for entry in proto.metadata_props}
    assert found["policy"] == "tome"
    assert json.loads(found["tokens"]) == {"before": 65, "after": [52, 39]}
    assert proto.producer_name == "tokcc"


def test_weights_keep_their_names(tmp_path: Path) -> None:
    """A matrix of a linear layer is stored transposed, and says so."""
    entry = ZOO["vit_classifier"]
    path, _ = save(trace(entry.build(), entry.inputs(1)), tmp_path)
    stored = {i.name: i for i in onnx.load(path).graph.initializer}
    state = entry.build().state_dict()
    name = "model.classifier.weight"
    assert name in stored or f"{name}.transposed" in stored
    biases = [n for n in state if n.endswith(".bias")]
    assert set(biases) <= set(stored)
    for key, initializer in stored.items():
        if key.endswith(".transposed"):
            value = torch.from_numpy(onnx.numpy_helper.to_array(initializer).copy())
            assert torch.equal(value, state[key.removesuffix(".transposed")].t())


@pytest.mark.parametrize("external", [True, False])
def test_external_data(external: bool, tmp_path: Path) -> None:
    entry = ZOO["vit_classifier"]
    program, _ = reduce_program(trace(entry.build(), entry.inputs(1)), "tome")
    path, files = save(program, tmp_path, external=external)
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert files == ([path, path.with_name("model.onnx.data")] if external else [path])
    assert (path.stat().st_size < 500_000) == external
    assert_same(program, path, entry.inputs(1, seed=4))
    onnx.checker.check_model(str(path), full_check=True)


def test_large_weights_go_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = ZOO["vit_classifier"]
    program = trace(entry.build(), entry.inputs(1))
    monkeypatch.setattr(backend, "EXTERNAL_BYTES", 10_000)
    _, files = save(program, tmp_path)
    assert [file.name for file in files] == ["model.onnx", "model.onnx.data"]
    assert backend.EXTERNAL_BYTES == 10_000


def test_the_limit_is_below_what_a_protobuf_holds() -> None:
    assert backend.EXTERNAL_BYTES < 2**31 - 2**26


class Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.special.i0(x)
        return out


def test_what_cannot_be_lowered_says_where() -> None:
    program = trace(Odd(), {"x": torch.randn(2)})
    with pytest.raises(LoweringError, match="has no ONNX form") as caught:
        build_onnx(program)
    assert caught.value.node
    assert caught.value.help


def test_half_precision_models(tmp_path: Path) -> None:
    entry = ZOO["vit_classifier"]
    inputs = {name: value.half() for name, value in entry.inputs(1).items()}
    program, _ = reduce_program(trace(entry.build().half(), inputs), "tome")
    path, _ = save(program, tmp_path)
    graph = onnx.load(path).graph
    assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    got = Session(path, threads=1).run({name: value.numpy() for name, value in inputs.items()})
    (want,) = run_program(program, inputs)
    assert got["logits"].dtype == np.float16
    torch.testing.assert_close(torch.from_numpy(got["logits"]).float(), want.float(), rtol=0, atol=5e-2)


def test_a_model_is_the_same_every_time() -> None:
    """The same program gives the same bytes: what a bundle's hash is good for."""
    entry = ZOO["bert_classifier"]
    first, second = (
        ir.to_proto(build_onnx(trace(entry.build(), entry.inputs(1)))).SerializeToString(deterministic=True)
        for _ in range(2)
    )
    assert first == second
