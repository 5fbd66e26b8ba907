"""A program in bfloat16 as one in float32: the same numbers, rounded less on their way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from tokcc.ir.program import Program
from tokcc.ir.symbols import size_oblivious

__all__ = ["widened"]

_NARROW, _WIDE = torch.bfloat16, torch.float32


def widened(program: Program) -> Program:
    """Return a program that computes in float32 what this one does in bfloat16; itself where it does nothing so.

    The numbers that a graph of this program would hold are those that it holds: weights, and the factors and terms that
    operations in bfloat16 have as arguments, are rounded.
    """
    nodes = list(program.graph.nodes)
    if not any(_is_narrow(value) for node in nodes for value in _leaves(node.meta.get("val"))):
        return program
    copied = program.copied()
    for node in copied.graph.nodes:
        rounded = any(_is_narrow(value) for value in _leaves(node.meta.get("val")))
        node.args = fx.node.map_aggregate(node.args, _rounded if rounded else _wide_type)
        node.kwargs = fx.node.map_aggregate(node.kwargs, _rounded if rounded else _wide_type)
        if "val" in node.meta:
            node.meta = {**node.meta, "val": _wide(node.meta["val"])}
    return replace(copied, state_dict=_all(program.state_dict), constants=_all(program.constants))


def _is_narrow(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == _NARROW


def _leaves(value: Any) -> list[Any]:
    return [leaf for item in value for leaf in _leaves(item)] if isinstance(value, list | tuple) else [value]


def _wide_type(argument: Any) -> Any:
    return _WIDE if argument is _NARROW else argument


def _rounded(argument: Any) -> Any:
    return float(torch.tensor(argument, dtype=_NARROW)) if isinstance(argument, float) else _wide_type(argument)


def _wide(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_wide(item) for item in value)
    if not _is_narrow(value):
        return value
    if isinstance(value, FakeTensor):
        with torch.no_grad(), size_oblivious():
            made = torch.empty_strided(value.shape, value.stride(), dtype=_WIDE, device="meta")
        return FakeTensor(value.fake_mode, made, value.device)
    wide = value.detach().to(_WIDE)
    return torch.nn.Parameter(wide, value.requires_grad) if isinstance(value, torch.nn.Parameter) else wide


def _all(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _wide(value) for name, value in tensors.items()}
