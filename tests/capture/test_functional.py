"""Graphs that are rewritten without a second trace come out as torch's own decomposition has them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from tests.decoders.tiny import model_of
from tokcc.capture import functional as module
from tokcc.capture.export import clean
from tokcc.capture.functional import functional
from tokcc.capture.hf_decoder import CausalDecoder, decoder_dynamic, decoder_inputs
from tokcc.ir.program import Program
from tokcc.testing import run_program

aten = torch.ops.aten
# torch's own pytree copies a deprecated class in run_decompositions.
pytestmark = pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning")

X = torch.randn(2, 6, 8)


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, fn: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Any:
        return self.fn(x)


def exported(fn: Callable[[Tensor], Any], *, dynamic: bool) -> ExportedProgram:
    sizes = {"x": {0: Dim("batch", min=2, max=16), 1: Dim("tokens", min=2, max=32)}} if dynamic else None
    with torch.no_grad():
        return torch.export.export(Function(fn).eval(), (), {"x": X}, dynamic_shapes=sizes, strict=False)


def shape_of(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(shape_of(each) for each in value)
    return (value.dtype, tuple(map(str, value.shape))) if isinstance(value, Tensor) else str(value)


def described(program: Program) -> list[Any]:
    """What a graph computes: without the names of its nodes and constants, and without how it comes by sizes."""
    known: dict[fx.Node, Any] = {}
    count = itertools.count()
    lines = []
    for node in program.graph.nodes:
        value, tensor = node.meta.get("val"), program.tensor_of(node)
        args = list(fx.node.map_arg(node.args, lambda n: ("node", known[n])))
        if node.op == "output":
            lines.append(str(args))
        elif isinstance(value, torch.SymInt):
            known[node] = str(value)
        elif node.op == "placeholder":
            known[node] = tensor.tolist() if tensor is not None and "folded" in node.name else node.name
        else:
            known[node] = next(count)
            options = {key: kept for key, kept in node.kwargs.items() if key not in ("device", "layout", "pin_memory")}
            if node.target in (aten.reshape.default, aten.expand.default):
                del args[1]  # its fake says it
            lines.append((str(node.target), str(args), str(options), shape_of(value)))
    return lines


def assert_same(program: ExportedProgram, monkeypatch: pytest.MonkeyPatch) -> None:
    decomposed = program.run_decompositions({})
    with monkeypatch.context() as patch:
        patch.setattr(ExportedProgram, "run_decompositions", lambda *_: pytest.fail("traced again"))
        rewritten = functional(program)
    assert rewritten.verifiers == decomposed.verifiers
    ours, theirs = (clean(Program.from_exported(each)) for each in (rewritten, decomposed))
    assert described(ours) == described(theirs)
    assert ours.output_names == theirs.output_names


def masked(x: Tensor) -> Tensor:
    mask = torch.zeros_like(x[:, :, 0])
    mask.masked_fill_(x[:, :, 1] > 0, -1.0)
    return x + mask[..., None]


FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "reshape": lambda x: x.transpose(1, 2).reshape(x.shape[0], 4, -1).sum(1),
    "view": lambda x: x.view(x.shape[0], -1, 2, 4) * 2,
    "flatten": lambda x: x[:, None].expand(-1, 3, -1, -1).flatten(1, 2) + 1,
    "flatten the last": lambda x: x.unflatten(-1, (2, 4)).flatten(2).relu(),
    "flatten a number": lambda x: x.sum().flatten() * x[0, 0, 0].flatten(),
    "unflatten": lambda x: x.unflatten(-1, (2, -1)).transpose(1, 2) * 3,
    "chunk": lambda x: [part * 2 for part in x.chunk(2, -1)],
    "casts": lambda x: (x.to(torch.float64) * 2).to(torch.float32).to(torch.float32).to("cpu") + x.to(x.device),
    "expand_as": lambda x: x[:, :1].expand_as(x) * x,
    "transposed": lambda x: x @ (x[0, :2] * 2).T,
    "copies": lambda x: x.contiguous().clone() + torch.dropout(x, 0.5, False),
    "in place": lambda x: (x * 2).add_(1).relu_(),
    "a mask in place": masked,
}


@pytest.mark.parametrize(
    "dynamic", [pytest.param(False, marks=pytest.mark.slow, id="fixed"), pytest.param(True, id="dynamic")]
)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_equals_the_second_trace(name: str, dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    program = exported(FUNCTIONS[name], dynamic=dynamic)
    assert_same(program, monkeypatch)
    before = [node.format_node() for node in program.graph.nodes]
    got = run_program(Program.from_exported(functional(program)), {"x": X})
    wanted = FUNCTIONS[name](X)
    for one, other in zip(got, wanted if isinstance(wanted, list) else [wanted], strict=True):
        torch.testing.assert_close(one, other)
    assert [node.format_node() for node in program.graph.nodes] == before


def test_equals_the_second_trace_of_a_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama", "sdpa")
    inputs = decoder_inputs(model, model.config, torch.float32)
    with torch.no_grad():
        program = torch.export.export(
            CausalDecoder(model).eval(), (), inputs, dynamic_shapes=decoder_dynamic(inputs), strict=False
        )
    assert_same(program, monkeypatch)


def test_equals_the_second_trace_of_an_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=16, patch_size=4
    )
    images = {"pixel_values": torch.randn(2, 3, 16, 16)}
    with torch.no_grad():
        program = torch.export.export(transformers.ViTModel(config).eval(), (), images, strict=False)
    assert_same(program, monkeypatch)


def in_place_on_a_view(x: Tensor) -> Tensor:
    twice = x * 2
    twice[:, 0] += 1
    return twice


def in_place_with_another_reader(x: Tensor) -> Tensor:
    twice = x * 2
    view = twice.transpose(1, 2)
    twice.add_(1)
    return view.mT @ twice.mT


def uneven(x: Tensor) -> list[Tensor]:
    return [part * 2 for part in x.chunk(3, -1)]


@pytest.mark.parametrize("fn", [in_place_on_a_view, in_place_with_another_reader, uneven])
def test_others_are_left_to_torch(fn: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    program = exported(fn, dynamic=False)
    traced = []
    decompose = ExportedProgram.run_decompositions
    monkeypatch.setattr(
        ExportedProgram, "run_decompositions", lambda self, table: traced.append(table) or decompose(self, table)
    )
    got = run_program(Program.from_exported(module.functional(program)), {"x": X})
    wanted = fn(X)
    assert traced == [{}]
    for one, other in zip(got, wanted if isinstance(wanted, list) else [wanted], strict=True):
        torch.testing.assert_close(one, other)
