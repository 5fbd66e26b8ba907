"""Engines through Torch-TensorRT: our operations become plugins where those take them, and aten operations else.

``torch_tensorrt`` is imported by the first call, and only then.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from tokcc.backends.aoti import callable_by_name
from tokcc.backends.feeds import Feeds
from tokcc.errors import LoweringError
from tokcc.ir.program import Program
from tokcc.kernels.decompositions import DECOMPOSITIONS
from tokcc.kernels.gpu import has_triton
from tokcc.lowering.aten import decompose, refuse_deep_sizes, refuse_loops
from tokcc.plugins_trt import PLUGINS, SMS, Operand, Plugin, write_plugins
from tokcc.plugins_trt.torch_ops import TorchPlugins

__all__ = ["Engine", "Profile", "compile_engine", "lacking", "with_plugins"]

_NAME = "torch_tensorrt"
_COUNT = itertools.count()
_NO_PLUGINS = (10, 14)
"""The TensorRT whose quick-deployable plugins are broken, says torch_tensorrt."""


@dataclass(frozen=True)
class Profile:
    """Sizes that an input may have: what is compiled for, tuned for, and allowed at most."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


@dataclass(frozen=True)
class Engine:
    """What was compiled.

    Attributes:
        path: The file: an exported program that holds the engine; loading it needs ``torch_tensorrt`` imported.
        plugins: The plugins in it, by how many nodes each serves.
        native: Nodes that became aten operations instead, and why.
    """

    path: Path
    plugins: Mapping[str, int]
    native: tuple[tuple[str, str], ...]


def lacking() -> list[str]:
    """Return what this machine lacks for engines through Torch-TensorRT, and what to do; empty when it lacks nothing.

    Nothing is imported for it: packages of other versions of torch take their process with them.
    """
    minor = ".".join(torch.__version__.split(".")[:2])
    missing = []
    if importlib.util.find_spec("torch_tensorrt") is None:
        missing.append(f"torch_tensorrt is not installed: pip install torch_tensorrt=={minor}.0")
    else:
        found = metadata.version("torch_tensorrt")
        if not found.startswith(f"{minor}."):
            missing.append(f"torch_tensorrt {found} is for another torch than {torch.__version__}: install {minor}.0")
    if importlib.util.find_spec("tensorrt") is None:
        missing.append("tensorrt is not installed: it comes with torch_tensorrt")
    if not torch.cuda.is_available():
        missing.append("torch sees no CUDA device: engines are compiled on the GPU that they are for")
    if not has_triton():
        missing.append('triton is not installed, from whose kernels plugins are written: pip install "tokcc[triton]"')
    return missing


def compile_engine(
    program: Program,
    path: Path,
    example: Feeds,
    *,
    profiles: Mapping[str, Profile] | None = None,
    sms: Sequence[int] = SMS,
    settings: Mapping[str, Any] | None = None,
) -> Engine:
    """Compile a program to a TensorRT engine and save it.

    The whole program goes into the engine, or it is refused. Plugins are written to a folder ``<name>.plugins`` beside
    the file; the engine does not need it.

    Args:
        program: The (reduced) program.
        path: The file, made here.
        example: Inputs by name.
        profiles: Sizes of inputs with dynamic ones, by name.
        sms: Architectures that the engine is for.
        settings: Further settings of ``torch_tensorrt.dynamo.compile``.

    Raises:
        LoweringError: torch_tensorrt or a device is missing, a dynamic input has no profile, or TensorRT refuses.
    """
    torch_tensorrt = _torch_tensorrt()
    given = _inputs(torch_tensorrt, program, example, profiles or {})
    namespace = f"tokcc_trt{next(_COUNT)}"
    exported, operations, native = with_plugins(program, namespace, sms=sms)
    named = callable_by_name(program, exported, example)
    folder = path.with_name(f"{path.stem}.plugins")
    for file in write_plugins(operations.uses, folder, sms=sms, namespace=namespace):
        if file.suffix == ".py" and file.stem in PLUGINS:
            _register(torch_tensorrt, file, f"{namespace}::{file.stem}")
    keywords = dict(zip(named.example_inputs[1], given, strict=True))
    try:
        module = torch_tensorrt.dynamo.compile(
            named,
            kwarg_inputs=keywords,
            **{"require_full_compilation": True, "min_block_size": 1, **(settings or {})},
        )
        torch_tensorrt.save(module, str(path), output_format="exported_program", retrace=False)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise LoweringError(
            "Torch-TensorRT does not compile the program",
            found=" ".join(str(error).split())[:300],
            help="--backend tensorrt writes an ONNX graph for TensorRT's own tools",
        ) from error
    counts = {op: sum(use.op == op for use in operations.uses) for op in sorted({use.op for use in operations.uses})}
    return Engine(path, counts, tuple(native))


def with_plugins(
    program: Program, namespace: str, *, sms: Sequence[int] = SMS
) -> tuple[ExportedProgram, TorchPlugins, list[tuple[str, str]]]:
    """Return a program with plugins' operations where those take ours, and aten operations else.

    Args:
        program: The program; it is not changed.
        namespace: Of the plugins' operations, a new one.
        sms: Architectures that the engine is for.

    Returns:
        The program, the operations, whose ``uses`` say what is needed, and the nodes that no plugin takes, with why.

    Raises:
        LoweringError: An operation is a loop, or sizes are out of reach.
    """
    refuse_loops(program, _NAME, "--backend onnx")
    refuse_deep_sizes(program, _NAME, "--backend onnx")
    # torch takes programs for functional: a cache that is written over would be one that it may read later.
    plugins = [plugin for plugin in PLUGINS.values() if plugin.functional]
    operations = TorchPlugins(namespace, plugins)
    native: list[tuple[str, str]] = []
    forms = {}
    for plugin in plugins:
        name = plugin.replaces.removeprefix("tokcc::")
        forms[name] = _form(plugin, DECOMPOSITIONS[name], operations, native, sms)
    return decompose(program, forms=forms), operations, native


def _form(
    plugin: Plugin,
    otherwise: Callable[..., Any],
    operations: TorchPlugins,
    native: list[tuple[str, str]],
    sms: Sequence[int],
) -> Callable[..., Any]:
    def form(*arguments: Any) -> Any:
        try:
            call = plugin.arguments(*arguments)
            inputs = {name: x if x is None else x.to(plugin.wanted(name) or x.dtype) for name, x in call.inputs.items()}
            given = {k: None if x is None else Operand(x.dtype, tuple(x.shape)) for k, x in inputs.items()}
            use = plugin.takes(given, call.attributes, sms=sms)
        except LoweringError as error:
            native.append((plugin.op, f"{error.what}: needed {error.needed}, found {error.found}"))
            return otherwise(*arguments)
        return operations.call(plugin, use, {k: None if x is None else x.contiguous() for k, x in inputs.items()})

    return form


def _torch_tensorrt() -> Any:
    missing = lacking()
    if missing:
        raise LoweringError(
            "engines through Torch-TensorRT cannot be compiled here",
            needed="torch_tensorrt for this torch, TensorRT and a CUDA device",
            found="; ".join(missing),
            help="--backend tensorrt writes files that are compiled elsewhere",
        )
    try:
        module = importlib.import_module("torch_tensorrt")
        tensorrt = importlib.import_module("tensorrt")
    except (ImportError, OSError) as error:
        raise LoweringError(
            "torch_tensorrt does not load",
            found=str(error),
            help="install TensorRT's libraries of the version that torch_tensorrt asks for",
        ) from error
    version = tuple(int(part) for part in tensorrt.__version__.split(".")[:2])
    if version < (10, 7) or version == _NO_PLUGINS:
        raise LoweringError(
            "this TensorRT has no quick-deployable plugins",
            needed="10.7 or newer, and not 10.14",
            found=tensorrt.__version__,
            help="install the TensorRT that torch_tensorrt asks for",
        )
    return module


def _inputs(torch_tensorrt: Any, program: Program, example: Feeds, profiles: Mapping[str, Profile]) -> list[Any]:
    """Return the inputs as torch_tensorrt describes them, in order."""
    given = []
    for node in program.user_inputs:
        name, fake = program.public_name(node), node.meta["val"]
        dynamic = [axis for axis, size in enumerate(fake.shape) if not isinstance(size, int)]
        profile = profiles.get(name)
        if profile is None and dynamic:
            raise LoweringError(
                f"no sizes are given for the dynamic input `{name}`",
                needed=f"its smallest, usual and largest shape: axes {', '.join(map(str, dynamic))} are dynamic",
                found="none",
                help="give --min-shapes, --opt-shapes and --max-shapes for it",
            )
        dtype = example[name].dtype
        if profile is None:
            given.append(torch_tensorrt.Input(shape=tuple(fake.shape), dtype=dtype))
            continue
        for axis, sizes in enumerate(zip(profile.min, profile.opt, profile.max, strict=True)):
            fixed = axis not in dynamic and set(sizes) != {fake.shape[axis]}
            if fixed or not sizes[0] <= sizes[1] <= sizes[2]:
                raise LoweringError(
                    f"the sizes of axis {axis} of `{name}` do not fit the program",
                    needed=f"{fake.shape[axis]} three times" if fixed else "smallest <= usual <= largest",
                    found=", ".join(map(str, sizes)),
                )
        given.append(
            torch_tensorrt.Input(min_shape=profile.min, opt_shape=profile.opt, max_shape=profile.max, dtype=dtype)
        )
    return given


def _register(torch_tensorrt: Any, file: Path, plugin: str) -> None:
    """Import a plugin's module, which registers it, and let torch_tensorrt know."""
    name = f"{plugin.replace('::', '_')}_plugin"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    torch_tensorrt.dynamo.conversion.plugins.generate_plugin_converter(plugin, supports_dynamic_shapes=True)
