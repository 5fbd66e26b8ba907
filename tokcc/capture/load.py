"""Load a model, in whatever form it is given, together with what tracing it needs."""

from __future__ import annotations

import copy
import os
import pickle
import re
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from tokcc.capture import archive
from tokcc.capture.factory import is_factory, run_factory
from tokcc.capture.filekind import FileKind, ModelFile, identify
from tokcc.capture.hf import load_folder
from tokcc.capture.hf_inputs import NamedModel
from tokcc.capture.inputs import (
    AxisRange,
    InputSpec,
    bind_names,
    cast_floating,
    describe,
    dynamic_from_ranges,
    kwargs_from_specs,
    parse_dtype,
    parse_dynamic,
    parse_inputs,
    required_parameters,
    split_example_inputs,
)
from tokcc.capture.loaded import Loaded
from tokcc.capture.vlm.load import is_multimodal
from tokcc.errors import CaptureError, LoadError, UsageError

__all__ = ["Loaded", "load"]

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def load(
    model: str | os.PathLike[str] | nn.Module | ExportedProgram,
    *,
    example_inputs: Any | None = None,
    dynamic_shapes: Any | None = None,
    inputs: Sequence[str] = (),
    dynamic: Sequence[str] = (),
    task: str | None = None,
    dtype: str | torch.dtype | None = None,
    allow_pickle: bool = False,
    or_dynamic: Sequence[str] = (),
) -> Loaded:
    """Load a model.

    Args:
        model: A path, ``file.py:factory``, ``module:factory``, an `nn.Module` or an `ExportedProgram`.
        example_inputs: A tensor, a tuple of positional inputs, a dict of named ones, or (tuple, dict).
        dynamic_shapes: In `torch.export`'s form; an empty one makes every axis static.
        inputs: ``NAME=DTYPE[dims]``: random example inputs instead of given ones.
        dynamic: ``NAME:AXIS=MIN..MAX``: axes that may vary.
        task: The task of a Hugging Face folder.
        dtype: Cast the model and its floating example inputs.
        allow_pickle: Permit files that can run code when they are loaded.
        or_dynamic: Like `dynamic`, for a model that brings no dynamic axes of its own.

    Returns:
        The module in eval mode (a copy, where a module given from Python has to change) or the program, with inputs.

    Raises:
        UsageError: An option is malformed or does not fit the model.
        LoadError: The model cannot be loaded.
        CaptureError: The model does not run on its example inputs.
    """
    specs, ranges, wanted = parse_inputs(inputs), parse_dynamic(dynamic), parse_dtype(dtype)
    _refuse_both(example_inputs is not None and specs, "example_inputs", "--input (inputs=)")
    _refuse_both(dynamic_shapes is not None and ranges, "dynamic_shapes", "--dynamic (dynamic=)")
    if is_multimodal(model, task):
        raise LoadError(
            "the model reads images or sounds beside text, and is compiled in parts",
            needed="`tokcc compile`, which makes an encoder, an embedding and a decoder of it",
            help="or give one of the parts: `tokcc.capture.vlm.load.load_parts`",
        )
    loaded = _open(model, task=task, specs=specs, dtype=wanted, allow_pickle=allow_pickle)
    if loaded.exported is not None:
        _refuse_both(dynamic_shapes is not None or ranges, "dynamic axes", "an exported program, whose axes are fixed")
        return _finish_program(loaded, loaded.exported, example_inputs, specs, wanted)
    assert loaded.module is not None
    finished = _finish_module(loaded, loaded.module, example_inputs, specs, dynamic_shapes, ranges, wanted)
    if finished.dynamic_shapes is None and dynamic_shapes is None and or_dynamic:
        assert finished.module is not None
        named = bind_names(finished.module, finished.example_args, finished.example_kwargs)
        return replace(finished, dynamic_shapes=dynamic_from_ranges(parse_dynamic(or_dynamic), named))
    return finished


def _refuse_both(both: object, first: str, second: str) -> None:
    if both:
        raise UsageError(f"{first} cannot be combined with {second}", help="give one of the two")


def _open(
    model: Any, *, task: str | None, specs: Sequence[InputSpec], dtype: torch.dtype | None, allow_pickle: bool
) -> Loaded:
    """Find out which form ``model`` has and load it."""
    if isinstance(model, ExportedProgram):
        return Loaded("ExportedProgram", exported=model, task=task)
    if isinstance(model, nn.Module):
        return Loaded(type(model).__name__, module=_prepared(model, dtype, owned=False), task=task)
    if not isinstance(model, str | os.PathLike):
        raise LoadError(
            "this is not a model",
            needed="a path, `file.py:factory`, an nn.Module or an ExportedProgram",
            found=type(model).__name__,
        )
    text = os.fspath(model)
    path = Path(text)
    if path.exists() and not path.is_dir() and not path.is_file():
        raise LoadError(f"{text} is neither a file nor a folder")
    if path.is_dir() or path.suffix == ".gguf":
        path = path if path.is_dir() else path.parent
        return load_folder(path, task=task, specs=specs, dtype=dtype, allow_pickle=allow_pickle)
    if path.exists():
        file = identify(path)
        if file.kind is FileKind.EXPORTED:
            return Loaded(text, exported=archive.load_archive(path, allow_pickle=allow_pickle), task=task)
        return Loaded(text, module=_prepared(_unpickled(file, allow_pickle), dtype, owned=True), task=task)
    if is_factory(text):
        made = run_factory(text)
        args, kwargs = split_example_inputs(made.example_inputs) if made.example_inputs is not None else ((), {})
        module = _prepared(made.module, dtype, owned=True)
        return Loaded(text, module=module, example_args=args, example_kwargs=kwargs, task=task)
    looks_remote = _HUB_NAME.fullmatch(text) is not None and not path.suffix
    raise LoadError(
        f"no such file or folder: {text}",
        needed="a .pt2 archive, a pickled module, `file.py:factory`, or a Hugging Face folder",
        help=f"tokcc downloads nothing: `hf download {text} --local-dir DIR`, then give DIR" if looks_remote else None,
    )


def _unpickled(file: ModelFile, allow_pickle: bool) -> nn.Module:
    imports = ", ".join(file.content.imports[:4]) if file.content is not None else ""
    if not allow_pickle:
        raise LoadError(
            f"{file.path} is a pickle, and loading a pickle can run any code",
            needed="a torch.export archive, or --allow-pickle",
            found=f"it imports {imports}",
            help="if you trust who made the file, add --allow-pickle; better, save torch.export.export(model, inputs)",
        )
    try:
        value = torch.load(file.path, map_location="cpu", weights_only=False)
    except (Exception, SystemExit) as error:  # a pickle can raise anything
        missing = isinstance(error, ImportError | AttributeError | pickle.UnpicklingError)
        raise LoadError(
            f"cannot unpickle {file.path}",
            found=f"{type(error).__name__}: {error}"[:300],
            help="its classes must be importable here: give `file.py:factory` instead" if missing else None,
        ) from error
    if isinstance(value, nn.Module):
        return value
    inside = [str(key) for key, item in value.items() if isinstance(item, nn.Module)] if isinstance(value, dict) else []
    raise LoadError(
        f"{file.path} does not hold a module",
        needed="an nn.Module",
        found=f"{type(value).__name__}" + (f" with a module under {', '.join(inside)}" if inside else ""),
        help="save the module alone, or give `file.py:factory`",
    )


def _prepared(module: nn.Module, dtype: torch.dtype | None, *, owned: bool) -> nn.Module:
    """Return the module in eval mode and of the wanted type; one that is the caller's own is copied, not changed."""
    inner = getattr(module, "_orig_mod", None)  # what torch.compile wraps
    if isinstance(inner, nn.Module):
        module = inner
    if isinstance(module, torch.jit.ScriptModule):
        raise LoadError(
            "a TorchScript module cannot be traced by torch.export", help="give the Python module it was made from"
        )
    tensors = [*module.parameters(), *module.buffers()]
    elsewhere = next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), None)
    if elsewhere is not None:
        meta = elsewhere.type == "meta"
        raise LoadError(
            "the model has weights without values" if meta else "the model is not on the CPU",
            found=f"parameters on {elsewhere}",
            help="load the weights first" if meta else "call model.cpu() first",
        )
    training = any(layer.training for layer in module.modules())
    cast = dtype is not None and any(tensor.is_floating_point() and tensor.dtype != dtype for tensor in tensors)
    if not owned and (training or cast):
        try:
            module = copy.deepcopy(module)
        except Exception as error:  # deepcopy runs whatever the model's attributes define
            raise LoadError(
                "the model cannot be copied to put it in eval mode or another dtype",
                found=f"{type(error).__name__}: {error}"[:300],
                help="call model.eval() and model.to(dtype) yourself",
            ) from error
    module.eval()
    return module.to(dtype) if cast else module


def _finish_module(
    loaded: Loaded,
    module: nn.Module,
    example_inputs: Any | None,
    specs: Sequence[InputSpec],
    dynamic_shapes: Any | None,
    ranges: Sequence[AxisRange],
    dtype: torch.dtype | None,
) -> Loaded:
    """Settle example inputs and dynamic axes, and see that the model runs on them."""
    args, kwargs = loaded.example_args, loaded.example_kwargs
    if example_inputs is not None:
        args, kwargs = split_example_inputs(example_inputs)
    elif specs and not isinstance(module, NamedModel):  # a folder has used the specs already
        args, kwargs = (), kwargs_from_specs(module.forward, specs)
    if not args and not kwargs:
        raise _no_inputs(module)
    if dtype is not None:
        args, kwargs = cast_floating((args, kwargs), dtype)
    _check_runs(module, args, kwargs)
    if ranges:
        shapes: Any = dynamic_from_ranges(ranges, bind_names(module, args, kwargs))
    elif dynamic_shapes is not None:
        shapes = dynamic_shapes or None
    else:
        shapes = _still_dynamic(loaded.dynamic_shapes, bind_names(module, args, kwargs))
    return replace(loaded, module=module, example_args=args, example_kwargs=kwargs, dynamic_shapes=shapes)


def _still_dynamic(shapes: dict[str, Any] | None, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """Keep a folder's default axes where the inputs allow: torch.export makes an axis of size 1 static."""
    if shapes is None:
        return None

    def still(axes: Any, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return axes  # nested inputs come from the folder, never from the user
        return {axis: dim for axis, dim in (axes or {}).items() if value.shape[axis] > 1} or None

    kept = {name: still(shapes.get(name), value) for name, value in inputs.items()}
    return kept if any(kept.values()) else None


def _no_inputs(module: nn.Module) -> UsageError:
    parameters = required_parameters(module)
    name = parameters[0] if parameters else "x"
    return UsageError(
        "the model comes without example inputs",
        needed=f"an example of {', '.join(parameters)}" if parameters else "example inputs",
        help=f"add --input {name}=fp32[2,3,224,224] (your dtype and sizes), or let the factory return "
        "(module, example_inputs)",
    )


def _check_runs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    try:
        with torch.no_grad():
            module(*args, **kwargs)
    except Exception as error:  # whatever the user's model raises
        frame = traceback.extract_tb(error.__traceback__)[-1]
        lines = str(error).strip().splitlines() or [""]
        given = ", ".join(part for part in (describe(args)[1:-1] if args else "", describe(kwargs)) if part)
        raise CaptureError(
            "the model does not run on the example inputs",
            node=f"{frame.filename}:{frame.lineno}  {frame.line or ''}".rstrip(),
            needed="inputs that the model can be called with",
            found=f"{given} -> {type(error).__name__}: {lines[0]}"[:400],
            help="correct the shapes and dtypes with --input NAME=DTYPE[dims], or the example inputs",
        ) from error


def _finish_program(
    loaded: Loaded,
    program: ExportedProgram,
    example_inputs: Any | None,
    specs: Sequence[InputSpec],
    dtype: torch.dtype | None,
) -> Loaded:
    """Take inputs and axes from the program; inputs given anew must fit it."""
    actual = archive.program_dtype(program)
    if dtype is not None and actual is not None and dtype != actual:
        raise UsageError(
            "the dtype of an exported program is fixed",
            needed=str(actual).removeprefix("torch."),
            found=str(dtype).removeprefix("torch."),
            help="export the model in that dtype, or give the module",
        )
    args, kwargs = archive.example_inputs_of(program)
    if specs:
        args, kwargs = archive.inputs_from_specs(program, specs)
    elif example_inputs is not None:
        args, kwargs = split_example_inputs(example_inputs)
    if specs or example_inputs is not None:
        _check_runs(program.module(), args, kwargs)
    shapes = archive.program_shapes(program)
    return replace(loaded, example_args=args, example_kwargs=kwargs, dynamic_shapes=shapes)
