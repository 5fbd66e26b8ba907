"""A program whose sizes are its own: what is found of them while it is rebuilt does not reach other programs.

torch keeps what it knows of symbolic sizes (ranges, which are equal) in one place for a whole trace. Two programs made
of one trace would read each other's findings: a size that had to equal another one in the first is that one in the
second, too, where it need not be.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._ordered_set import OrderedSet

from tokcc.ir.program import Program
from tokcc.ir.symbols import size_oblivious

__all__ = ["with_own_sizes"]


def with_own_sizes(program: Program) -> Program:
    """Return the program over a graph of its own, whose sizes know what they knew and tell nobody what they learn."""
    copied = program.copied()
    fakes = _Fakes()
    for node in copied.graph.nodes:
        if "val" in node.meta:
            node.meta = {**node.meta, "val": fakes.own(node.meta["val"])}
    return copied


class _Fakes:
    """Copies of the values of one program; all of one environment go to one other."""

    def __init__(self) -> None:
        self._modes: dict[int, tuple[FakeTensorMode, FakeTensorMode]] = {}
        self._environments: dict[int, tuple[ShapeEnv, ShapeEnv]] = {}

    def own(self, value: Any) -> Any:
        """Return a value of a node, or what it is made of, as another program has it."""
        if isinstance(value, list | tuple):
            return type(value)(self.own(item) for item in value)
        if isinstance(value, FakeTensor):
            return self._tensor(value)
        if isinstance(value, torch.SymInt | torch.SymBool | torch.SymFloat):
            return self._number(value)
        return value

    def _tensor(self, fake: FakeTensor) -> Any:
        if fake.fake_mode.shape_env is None:
            return fake
        sizes, strides = ([self.own(size) for size in sizes] for sizes in (fake.shape, fake.stride()))
        with torch.no_grad(), size_oblivious():
            made = torch.empty_strided(sizes, strides, dtype=fake.dtype, device="meta")
        made.requires_grad_(fake.requires_grad)
        return FakeTensor(self._mode(fake.fake_mode), made, fake.device)

    def _number(self, number: Any) -> Any:
        node = copy.copy(number.node)
        node.shape_env = self._environment(node.shape_env)
        return type(number)(node)

    def _mode(self, mode: FakeTensorMode) -> FakeTensorMode:
        if id(mode) not in self._modes:
            made = FakeTensorMode(
                allow_fallback_kernels=mode.allow_fallback_kernels,
                allow_non_fake_inputs=mode.allow_non_fake_inputs,
                shape_env=self._environment(mode.shape_env),
                static_shapes=mode.static_shapes,
            )
            self._modes[id(mode)] = (mode, made)
        return self._modes[id(mode)][1]

    def _environment(self, environment: Any) -> Any:
        if id(environment) not in self._environments:
            self._environments[id(environment)] = (environment, _copied(environment))
        return self._environments[id(environment)][1]


def _copied(environment: ShapeEnv) -> ShapeEnv:
    """Return an environment that knows as much and has lists and dictionaries of its own."""
    made = copy.copy(environment)
    for name, value in vars(environment).items():
        if isinstance(value, OrderedSet):
            setattr(made, name, OrderedSet(value))
        elif isinstance(value, dict):
            mine = copy.copy(value)
            mine.update((key, list(item)) for key, item in value.items() if type(item) is list)
            setattr(made, name, mine)
        elif isinstance(value, list | set):
            setattr(made, name, copy.copy(value))
    made.fake_tensor_cache = {}  # holds tensors of the other one
    return made
