"""The verifier refuses broken programs, naming the pass and the node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.export.graph_signature import ExportGraphSignature, InputKind

from tokcc.errors import VerifyError
from tokcc.ir.program import Program
from tokcc.ir.verify import verify
from tokcc.testing import trace

aten = torch.ops.aten


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("table", torch.randn(7, 8))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.linear(x) + self.table
        return {"y": y.relu(), "mean": y.mean(1)}


@pytest.fixture
def program() -> Program:
    return trace(Model(), {"x": torch.randn(2, 7, 8)})


def _call(program: Program, target: object) -> torch.fx.Node:
    return next(node for node in program.graph.nodes if node.target is target)


def test_a_traced_program_is_well_formed(program: Program) -> None:
    verify(program, "clean")


def no_fake(program: Program) -> Program:
    del _call(program, aten.relu.default).meta["val"]
    return program


def wrong_order(program: Program) -> Program:
    _call(program, aten.linear.default).append(_call(program, aten.linear.default))
    first = next(node for node in program.graph.nodes if node.op == "call_function")
    first.prepend(_call(program, aten.relu.default))
    return program


def mutation(program: Program) -> Program:
    _call(program, aten.relu.default).target = aten.relu_.default
    return program


def module_call(program: Program) -> Program:
    node = _call(program, aten.relu.default)
    node.op, node.target = "call_method", "relu"
    return program


def renamed_placeholder(program: Program) -> Program:
    program.user_inputs[0].name = "other"
    return program


def missing_placeholder(program: Program) -> Program:
    signature = program.signature
    fewer = ExportGraphSignature(signature.input_specs[:-1], signature.output_specs)
    return replace(program, signature=fewer)


def missing_tensor(program: Program) -> Program:
    state = {name: value for name, value in program.state_dict.items() if name != "table"}
    return replace(program, state_dict=state)


def other_shape(program: Program) -> Program:
    return replace(program, state_dict={**program.state_dict, "table": torch.zeros(6, 8)})


def other_dtype(program: Program) -> Program:
    return replace(program, state_dict={**program.state_dict, "table": torch.zeros(7, 8, dtype=torch.float64)})


def state_behind_inputs(program: Program) -> Program:
    specs = list(program.signature.input_specs)
    user = next(i for i, spec in enumerate(specs) if spec.kind is InputKind.USER_INPUT)
    specs.insert(0, specs.pop(user))
    first = next(iter(program.graph.nodes))
    first.prepend(program.user_inputs[0])
    return replace(program, signature=ExportGraphSignature(specs, program.signature.output_specs))


def missing_output(program: Program) -> Program:
    program.output_node.args = (tuple(program.output_values[:1]),)
    return program


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (no_fake, "without a fake value"),
        (wrong_order, "malformed graph"),
        (mutation, "mutates its operands"),
        (module_call, "call_method"),
        (renamed_placeholder, "in the signature"),
        (missing_placeholder, "placeholders and signature disagree"),
        (missing_tensor, "no tensor for table"),
        (other_shape, "recorded otherwise"),
        (other_dtype, "recorded otherwise"),
        (state_behind_inputs, "follows a user input"),
        (missing_output, "outputs and signature disagree"),
    ],
)
def test_refused(program: Program, spoil: Callable[[Program], Program], what: str) -> None:
    spoiled = spoil(program)
    with pytest.raises(VerifyError) as caught:
        verify(spoiled, "SomePass")
    assert what in str(caught.value)
    assert "SomePass" in str(caught.value) or "placeholders and signature" in caught.value.what


def test_outputs_must_be_the_ones_of_the_signature(program: Program) -> None:
    first, second = program.output_values
    program.output_node.args = ((second, first),)
    with pytest.raises(VerifyError, match="output"):
        verify(program, "SomePass")
