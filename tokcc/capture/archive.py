"""torch.export archives: load them, and say which example inputs and dynamic axes they hold."""

from __future__ import annotations

import contextlib
import logging
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from tokcc.capture.archive_guard import refuse_code
from tokcc.capture.inputs import InputSpec, random_tensor, unknown_name
from tokcc.errors import LoadError, UsageError

__all__ = ["example_inputs_of", "input_names", "inputs_from_specs", "load_archive", "program_dtype", "program_shapes"]

_UNBOUNDED = 2**31  # torch writes a missing upper limit as int_oo, which compares greater than this


def load_archive(path: Path, *, allow_pickle: bool) -> ExportedProgram:
    """Load a ``torch.export`` archive whatever its suffix; pickles inside it only with ``allow_pickle``."""
    if not allow_pickle:
        refuse_code(path)
    try:
        with _quiet(), path.open("rb") as stream:
            return torch.export.load(stream)
    except KeyError as error:
        raise LoadError(
            f"{path} does not hold exactly one program named `model`",
            found=", ".join(_programs(path)) or "none",
            help="save one program with torch.export.save(program, path)",
        ) from error
    except Exception as error:  # torch raises whatever a damaged archive makes it meet
        lines = str(error).strip().splitlines() or [""]
        raise LoadError(
            f"torch.export cannot load {path}",
            found=f"{type(error).__name__}: {lines[0]}"[:300],
            help=f"damaged, or saved by another torch version (this is {torch.__version__}): export it again",
        ) from error


def _programs(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        return sorted(name.rpartition("/")[2] for name in archive.namelist() if "/models/" in name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from printing a traceback about what the raised error says."""
    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def example_inputs_of(program: ExportedProgram) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the example inputs that were saved with the program, or random ones of the shapes it was traced with."""
    if program.example_inputs is not None:
        args, kwargs = program.example_inputs
        return tuple(args), dict(kwargs)
    sizes = _example_sizes(program)
    generator = torch.Generator().manual_seed(0)
    leaves = []
    for name, value in _user_values(program):
        if isinstance(value, Tensor):
            dims = tuple(_evaluated(size, sizes) for size in value.shape)
            leaves.append(random_tensor(InputSpec(name, value.dtype, dims), generator))
        else:
            leaves.append(value)
    return _unflatten(program, leaves)


def inputs_from_specs(program: ExportedProgram, specs: Sequence[InputSpec]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Make random inputs of other shapes for every argument of the program."""
    names = input_names(program)
    by_name = {spec.name: spec for spec in specs}
    for name in by_name:
        if name not in names:
            raise unknown_name("--input", name, names)
    if missing := [name for name in names if name not in by_name]:
        raise UsageError(
            f"no --input for {', '.join(missing)}",
            needed=f"all inputs of the program: {', '.join(names)}",
            help="or none, to use the example inputs saved with it",
        )
    generator = torch.Generator().manual_seed(0)
    values = [random_tensor(by_name[name], generator) for name in names]
    args, kwargs = _unflatten(program, [None] * program.call_spec.in_spec.num_leaves)
    return tuple(values[: len(args)]), dict(zip(kwargs, values[len(args) :], strict=True))


def program_shapes(program: ExportedProgram) -> dict[str, Any] | None:
    """Return the dynamic axes of the program in the form that torch.export takes; None when all are static."""
    dims: dict[Any, Any] = {}
    leaves: list[dict[int, Any] | None] = []
    for _, value in _user_values(program):
        axes: dict[int, Any] = {}
        sizes: list[Any] = list(value.shape) if isinstance(value, Tensor) else []
        for axis, size in enumerate(sizes):
            if isinstance(size, torch.SymInt):
                axes[axis] = _dim(size, program, dims)
        leaves.append(axes or None)
    if not any(leaves):
        return None
    args, kwargs = _unflatten(program, leaves)
    names = input_names(program)
    return dict(zip(names, [*args, *kwargs.values()], strict=True))


def _dim(size: torch.SymInt, program: ExportedProgram, dims: dict[Any, Any]) -> Any:
    expression = size.node.expr
    if not expression.is_Symbol:
        return Dim.AUTO  # such as 2*s0: torch.export finds the relation again
    if expression not in dims:
        low, high = _bounds(program, expression)
        dims[expression] = Dim(str(expression), min=max(low, 1), max=high)
    return dims[expression]


def _evaluated(size: Any, sizes: Mapping[Any, int]) -> int:
    return int(size.node.expr.subs(sizes)) if isinstance(size, torch.SymInt) else int(size)


def _bounds(program: ExportedProgram, symbol: Any) -> tuple[int, int | None]:
    limits = program.range_constraints.get(symbol)
    if limits is None:
        return 1, None
    high = int(limits.upper) if limits.upper < _UNBOUNDED else None
    return int(limits.lower), high


def _example_sizes(program: ExportedProgram) -> dict[Any, int]:
    """Choose a size for every symbol: 2, or the nearest one that its range allows."""
    sizes = {}
    for symbol in program.range_constraints:
        low, high = _bounds(program, symbol)
        sizes[symbol] = max(low, min(2, high) if high is not None else 2)
    return sizes


def input_names(program: ExportedProgram) -> list[str]:
    """Return the argument names of the program's ``forward``, positional ones first."""
    signature = program.module_call_graph[0].signature
    if signature is not None and signature.forward_arg_names is not None:
        return list(signature.forward_arg_names)
    return [name for name, _ in _user_values(program)]


def _user_values(program: ExportedProgram) -> list[tuple[str, Any]]:
    """Return name and (fake) value of every user input, flattened."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    values = []
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            node = nodes[spec.arg.name]
            values.append((node.name, node.meta.get("val", getattr(spec.arg, "value", None))))
    return values


def _unflatten(program: ExportedProgram, leaves: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = pytree.tree_unflatten(leaves, program.call_spec.in_spec)
    return tuple(args), dict(kwargs)


def program_dtype(program: ExportedProgram) -> torch.dtype | None:
    """Return the floating type of the program's first floating weight or input."""
    weights: Mapping[str, Tensor] = program.state_dict
    values = [*weights.values(), *(value for _, value in _user_values(program))]
    return next((value.dtype for value in values if isinstance(value, Tensor) and value.is_floating_point()), None)
