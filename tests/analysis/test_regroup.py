"""Property tests of the reshape rule: factors travel, tokens are never split."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.analysis.oracle import make_program
from tokcc.analysis.context import Context
from tokcc.analysis.rules.views import regroup
from tokcc.errors import AxisError
from tokcc.ir.builder import EagerBuilder
from tokcc.ir.space import Axis, Factor, TokenSpace

# Sizes that coincide on purpose.
SIZES = st.sampled_from([1, 2, 2, 3, 4, 6, 8])


@st.composite
def fused(draw: st.DrawFn) -> tuple[list[Factor], list[list[Factor]], list[list[Factor]]]:
    """Factors in order, and two ways to fuse neighbours."""
    count = draw(st.integers(2, 6))
    factors = [Factor(None, draw(SIZES)) for _ in range(count)]
    batch = TokenSpace("batch", 2, draw(st.sampled_from([2, 3, 4])), is_batch=True)
    tokens = TokenSpace("tokens", 5, draw(st.sampled_from([2, 5, 6, 7])))
    places = draw(st.permutations(range(count)))[:2]
    for place, space in zip(places, (batch, tokens), strict=True):
        factors[place] = Factor(space, space.old)
    return factors, draw(_grouping(factors)), draw(_grouping(factors))


@st.composite
def _grouping(draw: st.DrawFn, factors: list[Factor]) -> list[list[Factor]]:
    groups: list[list[Factor]] = [[factors[0]]]
    for factor in factors[1:]:
        if draw(st.booleans()):
            groups.append([factor])
        else:
            groups[-1].append(factor)
    return groups


def _size(axis: Axis | list[Factor]) -> int:
    return math.prod(f.old for f in axis)


def _tagged(axes: list[Axis] | list[list[Factor]]) -> list[TokenSpace]:
    return [f.space for axis in axes for f in axis if f.space is not None]


def _context() -> Context:
    program = make_program(lambda x: x.reshape(4, 2), [torch.zeros(8)])
    return Context(EagerBuilder(), node=list(program.graph.nodes)[1])


CTX = _context()


@given(fused())
@settings(max_examples=200, deadline=None)
def test_fusing_and_splitting_along_factors(case: tuple[list[Factor], list[list[Factor]], list[list[Factor]]]) -> None:
    """A reshape between two ways to fuse the same factors keeps every tagged factor, in order, at the right axis."""
    factors, source, target = case
    axes = [tuple(f for f in group if f.space is not None or f.old != 1) for group in source]
    shape = [_size(group) for group in target]
    found = regroup(CTX, axes, shape)
    assert [_size(axis) for axis in found] == shape
    assert _tagged(list(found)) == _tagged([factors])
    for axis, group in zip(found, target, strict=True):
        before = {id(f.space) for f in axis if f.space is not None}
        assert before == {id(f.space) for f in group if f.space is not None}
        assert not any(a.space is None and b.space is None for a, b in pairwise(axis))


@given(fused(), st.integers(2, 6))
@settings(max_examples=200, deadline=None)
def test_tokens_are_atomic(case: tuple[list[Factor], list[list[Factor]], list[list[Factor]]], width: int) -> None:
    """Whatever a reshape asks for: either each tagged factor stays whole, or it is refused."""
    factors, source, _ = case
    axes = [tuple(group) for group in source]
    total = math.prod(f.old for f in factors)
    shapes = [[total], [total // width, width], [width, total // width], [1, total, 1]]
    for shape in shapes:
        if math.prod(shape) != total:
            continue
        try:
            found = regroup(CTX, axes, shape)
        except AxisError:
            continue
        assert [_size(axis) for axis in found] == shape
        assert _tagged(list(found)) == _tagged([factors])


@pytest.mark.parametrize("shape", [[2, 3, 2, 8], [6, 2, 8], [2, 2, 24], [2, 6, 2, 4], [4, 3, 8]])
def test_windows_are_refused(shape: list[int]) -> None:
    batch, tokens = TokenSpace("batch", 2, 2, is_batch=True), TokenSpace("tokens", 4, 6)
    axes = [(Factor(batch, 2),), (Factor(tokens, 6),), (Factor(None, 8),)]
    if shape == [2, 6, 2, 4]:
        assert _tagged(list(regroup(CTX, axes, shape))) == [batch, tokens]
        return
    with pytest.raises(AxisError, match="reshape"):
        regroup(CTX, axes, shape)


def test_a_batch_of_one_keeps_its_axis() -> None:
    batch, tokens = TokenSpace("batch", 1, 1, is_batch=True), TokenSpace("tokens", 4, 6)
    axes = [(Factor(batch, 1),), (Factor(tokens, 6),), (Factor(None, 8),)]
    for shape in ([1, 6, 2, 4], [1, 1, 6, 8], [6, 8], [1, 48]):
        found = regroup(CTX, axes, shape)
        assert _tagged(list(found)) == [batch, tokens]
        assert [_size(axis) for axis in found] == shape
