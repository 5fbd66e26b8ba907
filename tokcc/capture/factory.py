"""Models from the user's own Python: ``file.py:factory`` and ``package.module:factory``."""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from tokcc.errors import LoadError

__all__ = ["FactoryResult", "is_factory", "run_factory"]


@dataclass(frozen=True)
class FactoryResult:
    """What a factory gave: the module, and example inputs when it gave a pair."""

    module: nn.Module
    example_inputs: Any | None


def is_factory(text: str) -> bool:
    """Whether ``text`` has the form ``place:name`` where place is a Python file or a module."""
    place, separator, name = text.rpartition(":")
    if not separator or not all(part.isidentifier() for part in name.split(".")):
        return False
    return place.endswith(".py") or all(part.isidentifier() for part in place.split("."))


def run_factory(text: str) -> FactoryResult:
    """Import ``place`` and call ``name`` without arguments.

    Raises:
        LoadError: Importing or calling fails (with the user's line), or the result is not a module.
    """
    place, _, name = text.rpartition(":")
    folder = str(Path(place).resolve().parent) if place.endswith(".py") else str(Path.cwd())
    # The user's prints must not mix with `--json` on stdout.
    with _on_path(folder), contextlib.redirect_stdout(sys.stderr):
        module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
        factory = _attribute(module, name, place)
        if isinstance(factory, nn.Module):
            return FactoryResult(factory, None)
        if not callable(factory):
            raise LoadError(
                f"{text} is not a factory",
                needed="a function without arguments that returns the model",
                found=type(factory).__name__,
            )
        try:
            result = factory()
        except (Exception, SystemExit) as error:
            raise _failed(f"{text} failed", error, _file_of(module)) from error
    return _checked(text, result)


def _checked(text: str, result: Any) -> FactoryResult:
    example_inputs = None
    if isinstance(result, tuple) and len(result) == 2:
        result, example_inputs = result
    if not isinstance(result, nn.Module):
        raise LoadError(
            f"{text} does not return a model",
            needed="an nn.Module, or (nn.Module, example_inputs)",
            found=type(result).__name__,
        )
    return FactoryResult(result, example_inputs)


@contextlib.contextmanager
def _on_path(folder: str) -> Iterator[None]:
    """Let the user's file import its neighbours, as ``python file.py`` would."""
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the user's code may have changed sys.path
            sys.path.remove(folder)


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise LoadError(f"no such file: {path}", help="the form is `path/to/file.py:factory`")
    name = f"_tokcc_factory_{path.stem}" if path.stem.isidentifier() else "_tokcc_factory"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:  # cannot happen for a .py file
        raise LoadError(f"cannot import {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _failed(f"cannot import {path}", error, path) from error
    return module


def _import_module(name: str) -> ModuleType:
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and name.startswith(error.name):
            raise LoadError(
                f"no Python module named {name}",
                help="run from the folder that holds it, install it, or give `path/to/file.py:factory`",
            ) from error
        raise _failed(f"cannot import {name}", error, None) from error


def _attribute(module: ModuleType, name: str, place: str) -> Any:
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            known = sorted(key for key in vars(value) if not key.startswith("_")) if hasattr(value, "__dict__") else []
            near = difflib.get_close_matches(part, known, n=1)
            functions = _functions(_file_of(module))
            raise LoadError(
                f"{place} has no {name}",
                needed="the name of a function that returns the model",
                found=f"functions: {', '.join(functions)}" if functions else None,
                help=f"did you mean {place}:{near[0]}?" if near else None,
            )
        value = getattr(value, part)
    return value


def _file_of(module: ModuleType) -> Path | None:
    name = getattr(module, "__file__", None)
    return Path(name) if name else None


def _functions(path: Path | None) -> list[str]:
    """List the public top-level functions of a file, in order."""
    if path is None or path.suffix != ".py":
        return []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]


def _failed(what: str, error: BaseException, path: Path | None) -> LoadError:
    """Make the error for failing user code: its last traceback line and the innermost line of the user's own file."""
    last = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    if isinstance(error, SyntaxError) and error.filename:
        return LoadError(what, node=f"{error.filename}:{error.lineno}", found=last)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if path is not None and Path(frame.filename) == path.resolve()]
    frame = (own or frames)[-1]
    where = f"{frame.filename}:{frame.lineno}  {frame.line or ''}".rstrip()
    hint = None
    if isinstance(error, TypeError) and "positional argument" in last and len(frames) == 1:
        hint = "the factory is called without arguments: give them defaults, or write one that calls it"
    return LoadError(what, node=where, found=last, help=hint)
