"""``tokcc::recurrence`` against a sum over paths: what each update has left after all decays behind it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokcc.kernels import recurrence


def brute_force(decay: Tensor, update: Tensor) -> Tensor:
    """``[T, W]``: state t is the sum over s <= t of update s times all decays from s + 1 to t."""
    steps = len(decay)
    states = torch.zeros_like(update)
    for t in range(steps):
        for s in range(t + 1):
            states[t] += update[s] * decay[s + 1 : t + 1].prod(0)
    return states


@given(st.integers(1, 9), st.integers(0, 2), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_equals_brute_force(steps: int, axis: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = [2, 3]
    shape.insert(axis, steps)
    decay, update = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    flat = [x.movedim(axis, 0).reshape(steps, -1) for x in (decay, update)]
    wanted = brute_force(*flat).reshape(steps, 2, 3).movedim(0, axis)
    torch.testing.assert_close(recurrence(decay, update, axis), wanted)
    torch.testing.assert_close(recurrence(decay, update, axis - 3), wanted)


@given(st.integers(1, 6), st.integers(0, 2), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_a_given_state_is_an_update_before_the_first(steps: int, axis: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    decay, update = (torch.randn(steps + 1, 2, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    wanted = brute_force(decay.flatten(1), update.flatten(1)).reshape(steps + 1, 2, 3)[1:].movedim(0, axis)
    parts = (x[1:].movedim(0, axis) for x in (decay, update))
    torch.testing.assert_close(recurrence(*parts, axis, update[0]), wanted)


def test_nothing_decays_or_everything_does() -> None:
    x = torch.randn(2, 5, 3)
    torch.testing.assert_close(recurrence(torch.ones_like(x), x, 1), x.cumsum(1))
    torch.testing.assert_close(recurrence(torch.zeros_like(x), x, 1), x)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        recurrence(torch.ones(3, 1), torch.ones(3, 2), 0)
    with pytest.raises(ValueError, match="first state"):
        recurrence(torch.ones(3, 2), torch.ones(3, 2), 0, torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("axis", [0, -1])
def test_opcheck(dtype: torch.dtype, axis: int) -> None:
    given = (torch.rand(2, 5, 3).to(dtype), torch.rand(2, 5, 3).to(dtype), axis)
    torch.library.opcheck(recurrence, given)
    torch.library.opcheck(recurrence, (*given, given[0].select(axis, 0).clone()))
