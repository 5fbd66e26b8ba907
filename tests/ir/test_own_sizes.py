"""Programs of one trace with sizes of their own: what one learns does not reach the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tokcc.ir.own_sizes import with_own_sizes
from tokcc.ir.program import Program
from tokcc.ir.verify import verify
from tokcc.testing import run_program, trace


class Two(nn.Module):
    """Two inputs of free lengths, a size that is computed, and an operation with several outputs."""

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        best, places = first.relu().topk(2, 1)
        joined = torch.cat([first, second], 1)
        return joined.reshape(joined.shape[0], -1, 2, 2), best.sum(1) + places.sum(1)


INPUTS = {"first": torch.randn(2, 6, 4), "second": torch.randn(2, 6, 4)}


@pytest.fixture
def program() -> Program:
    lengths = {name: {1: torch.export.Dim(f"{name}_length", min=2)} for name in INPUTS}
    return trace(Two(), INPUTS, lengths)


def values(program: Program) -> list[Any]:
    return [node.meta["val"] for node in program.graph.nodes if "val" in node.meta]


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors(item)]
    return [value] if isinstance(value, Tensor) else []


def test_it_is_the_same_program(program: Program) -> None:
    own = with_own_sizes(program)
    verify(own, "with_own_sizes")
    assert [node.name for node in own.graph.nodes] == [node.name for node in program.graph.nodes]
    assert [str(value) for value in values(own)] == [str(value) for value in values(program)]
    for mine, other in zip(tensors(values(own)), tensors(values(program)), strict=True):
        assert (mine.dtype, mine.device, mine.requires_grad) == (other.dtype, other.device, other.requires_grad)
        assert [str(stride) for stride in mine.stride()] == [str(stride) for stride in other.stride()]
    assert any(isinstance(value, list | tuple) for value in values(own))
    for mine, other in zip(run_program(own, INPUTS), run_program(program, INPUTS), strict=True):
        assert torch.equal(mine, other)


def test_all_values_of_one_program_have_one_mode(program: Program) -> None:
    found = tensors(values(with_own_sizes(program)))
    assert len({id(fake.fake_mode) for fake in found}) == 1  # type: ignore[attr-defined]  # a fake tensor has one
    before = {id(fake.fake_mode) for fake in tensors(values(program))}  # type: ignore[attr-defined]
    assert id(found[0].fake_mode) not in before  # type: ignore[attr-defined]


def test_what_one_learns_stays_there(program: Program) -> None:
    one, other = with_own_sizes(program), with_own_sizes(program)
    first, second = (node.meta["val"].shape[1] for node in one.user_inputs)
    assert not first.node.shape_env.replacements
    torch._check(first == second)
    torch._check(first <= 9)
    assert first.node.expr == second.node.expr
    for untouched in (other, program):
        left, right = (node.meta["val"].shape[1] for node in untouched.user_inputs)
        assert left.node.expr != right.node.expr
        bounds = left.node.shape_env.var_to_range[left.node.expr]
        assert (bounds.lower, bounds.upper > 9) == (2, True)


def test_it_knows_what_was_known(program: Program) -> None:
    """A size that the trace found equal to another one is that one still."""
    first, second = (node.meta["val"].shape[1] for node in program.user_inputs)
    torch._check(first == second)
    left, right = (node.meta["val"].shape[1] for node in with_own_sizes(program).user_inputs)
    assert left.node.expr == right.node.expr


def test_programs_without_free_sizes() -> None:
    program = trace(Two(), INPUTS)
    own = with_own_sizes(program)
    verify(own, "with_own_sizes")
    assert [str(value) for value in values(own)] == [str(value) for value in values(program)]
