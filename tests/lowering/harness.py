"""One operation at a time: run it with torch, lower it, run that in ONNX Runtime.

A case's body is written once against the builder: with tensors it computes what is expected, with graph nodes it makes
the program that is lowered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from tokcc.backends.onnx import build_onnx
from tokcc.ir.builder import Builder, EagerBuilder, GraphBuilder
from tokcc.ir.edit import fake_mode_of
from tokcc.ir.own_sizes import with_own_sizes
from tokcc.ir.program import Program
from tokcc.ir.symbols import SizeWatch
from tokcc.passes.outputs import OutputPlan
from tokcc.passes.propagate import finish

__all__ = ["Case", "Input", "check", "program_of", "session_of"]

TRACED = {"B": 3, "N": 6, "M": 5}
BINDINGS: tuple[Mapping[str, int], ...] = (TRACED, {"B": 1, "N": 4, "M": 7}, {"B": 2, "N": 9, "M": 4})

Body = Callable[..., Any]


@dataclass(frozen=True)
class Input:
    """A random input.

    Attributes:
        shape: Sizes; letters are symbolic where a case is run with dynamic axes.
        kind: ``float``, ``positive``, ``int`` (-9..9), ``nonzero`` (ints), ``bool``, ``index`` (below ``high``),
            ``unique`` (indices without repetition in the last axis, below ``high``).
        high: A number or a letter.
    """

    shape: tuple[int | str, ...]
    kind: str = "float"
    high: int | str = 0

    def make(self, sizes: Mapping[str, int], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        shape = [sizes[s] if isinstance(s, str) else s for s in self.shape]
        high = sizes[self.high] if isinstance(self.high, str) else self.high
        if self.kind == "float":
            return torch.randn(shape, generator=generator).to(dtype)
        if self.kind == "positive":
            return (torch.rand(shape, generator=generator) + 0.5).to(dtype)
        if self.kind == "bool":
            return torch.rand(shape, generator=generator) < 0.6
        if self.kind == "index":
            return torch.randint(0, high, shape, generator=generator)
        if self.kind == "unique":
            noise = torch.rand([*shape[:-1], high], generator=generator)
            return noise.argsort(dim=-1)[..., : shape[-1]].contiguous()
        numbers = torch.randint(-9, 10, shape, generator=generator)
        return torch.where(numbers == 0, 4, numbers) if self.kind == "nonzero" else numbers


@dataclass(frozen=True)
class Case:
    """Inputs and what is done with them.

    Attributes:
        name: Id.
        body: ``body(builder, *handles)`` gives a handle, or a tuple of them.
        inputs: Inputs.
        half: Run it in fp16 too.
        opset: Of the engine.
    """

    name: str
    body: Body = field(repr=False)
    inputs: tuple[Input, ...]
    half: bool = False
    opset: int = 18

    @property
    def symbolic(self) -> bool:
        return any(isinstance(s, str) for i in self.inputs for s in i.shape)


class _Skeleton(nn.Module):
    """Takes the inputs and gives them back: what is traced for its placeholders only."""

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return [x.clone() for x in inputs]


@cache
def _skeleton(inputs: tuple[Input, ...], dtype: torch.dtype, dynamic: bool) -> Program:
    made = [i.make(TRACED, torch.Generator().manual_seed(0), dtype) for i in inputs]
    dims = {letter: Dim(letter, min=1, max=64) for letter in TRACED}
    shapes = [{a: dims[s] for a, s in enumerate(i.shape) if isinstance(s, str)} for i in inputs]
    exported = torch.export.export(_Skeleton(), (made,), dynamic_shapes=(shapes,) if dynamic else None, strict=False)
    return Program.from_exported(exported)


@cache
def program_of(case: Case, *, dtype: torch.dtype = torch.float32, dynamic: bool = False) -> Program:
    """Return the program of a case."""
    skeleton = with_own_sizes(_skeleton(case.inputs, dtype, dynamic))
    builder = GraphBuilder(fake_mode_of(skeleton))
    handles = [builder.placeholder(node) for node in skeleton.user_inputs]
    results = _tuple(case.body(builder, *handles))
    env = fake_mode_of(skeleton).shape_env
    if env is not None and any(known.is_number for known in env.replacements.values()):
        # Torch's own fake of this operation fixed a size. A reduction is refused for it; here the lowering is tried.
        builder.inputs = SizeWatch(None)
    names = tuple(f"y{i}" for i in range(len(results)))
    skeleton = _with_outputs(skeleton, len(results))
    return finish(skeleton, builder, OutputPlan(names, ("full",) * len(names), None, results))


def _with_outputs(program: Program, count: int) -> Program:
    signature = program.signature
    outputs = [signature.output_specs[0]] * count
    return program.with_graph(program.graph, type(signature)(list(signature.input_specs), outputs))


def _tuple(result: Any) -> tuple[Any, ...]:
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def session_of(model: ir.Model) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Check a model with onnx's own checker and load it; returns a function of its inputs, in order."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        feeds = {spec.name: x.numpy() for spec, x in zip(session.get_inputs(), inputs, strict=True)}
        return [torch.from_numpy(np.array(y)) for y in session.run(None, feeds)]

    return run


def check(case: Case, *, dtype: torch.dtype = torch.float32, dynamic: bool = False) -> set[Any]:
    """Compare a case with torch on every binding of its letters.

    Returns:
        The operations that were lowered.
    """
    program = program_of(case, dtype=dtype, dynamic=dynamic)
    targets = {node.target for node in program.graph.nodes if isinstance(node, fx.Node) and node.op == "call_function"}
    run = session_of(build_onnx(program, opset=case.opset))
    eager: Builder = EagerBuilder()
    for seed, sizes in enumerate(BINDINGS if dynamic else (TRACED,)):
        inputs = [i.make(sizes, torch.Generator().manual_seed(seed + 10 * n), dtype) for n, i in enumerate(case.inputs)]
        with torch.no_grad():
            expected = _tuple(case.body(eager, *inputs))
        for got, want in zip(run(inputs), expected, strict=True):
            assert got.dtype == want.dtype, (case.name, got.dtype, want.dtype)
            assert got.shape == want.shape, (case.name, got.shape, want.shape)
            loose = 5e-3 if dtype == torch.float16 else 2e-5
            torch.testing.assert_close(
                got, want, rtol=loose, atol=loose, equal_nan=True, msg=lambda m: f"{case.name}: {m}"
            )
    return targets
