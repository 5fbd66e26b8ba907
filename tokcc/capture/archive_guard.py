"""Keep a torch.export archive from running code that it carries as data.

An archive is meant to be data, yet ``torch.export.load`` unpickles some entries, evaluates size expressions as Python,
compiles guard expressions, and looks operators up by dotted name. What legitimate archives put in these places is
narrow, so everything else is refused unless the user trusts the file. Nothing here runs any of it.
"""

from __future__ import annotations

import ast
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.utils._sympy.functions as torch_sympy

from tokcc.capture.pickle_guard import scan_bytes
from tokcc.errors import LoadError

__all__ = ["refuse_code"]

_LOOKED_UP = ("torch", "_operator", "math", "#")
_TARGET = re.compile(r"(torch\.ops\.\w+\.\w+(\.\w+)?|_operator\.[a-z]\w*|math\.[a-z]\w*|torch\.(_?sym_\w+))")
_NODES = (
    ast.Expression,
    ast.Load,
    ast.Constant,
    ast.Name,
    ast.Call,
    ast.keyword,
    ast.UnaryOp,
    ast.BinOp,
    ast.BoolOp,
    ast.Compare,
    ast.Attribute,
    ast.Subscript,
    ast.Tuple,
    ast.List,
    ast.operator,
    ast.unaryop,
    ast.boolop,
    ast.cmpop,
)
_METHODS = {
    *("size", "stride", "storage_offset", "item", "dim", "ndim", "shape", "dtype", "device"),
    *("isnan", "inf", "nan"),
}
_SYMPY = {
    *("Symbol", "Integer", "Rational", "Float"),
    *("Add", "Mul", "Pow", "Max", "Min", "Mod", "Abs", "floor", "ceiling"),
    *("And", "Or", "Not", "Eq", "Ne", "Ge", "Le", "Gt", "Lt"),
    *("Equality", "Unequality", "GreaterThan", "LessThan", "StrictGreaterThan", "StrictLessThan"),
}
_TORCH_SYMPY = {
    name for name, value in vars(torch_sympy).items() if isinstance(value, type) and hasattr(value, "is_Symbol")
}
_CALLS = _SYMPY | _TORCH_SYMPY


def refuse_code(path: Path) -> None:
    """Refuse an archive with anything in it that would run on loading.

    Raises:
        LoadError: What would run, and that ``--allow-pickle`` trusts it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            documents = {name: json.loads(archive.read(name)) for name in archive.namelist() if name.endswith(".json")}
            for name, document in documents.items():
                if "/models/" in name or name == "serialized_exported_program.json":
                    _check_program(path, document)
            pickled = {file for document in documents.values() for file in _pickled_payloads(document)}
            for name in archive.namelist():
                if _is_unpickled(name) or name.rpartition("/")[2] in pickled:
                    _check_pickle(path, name, archive.read(name))
    except (zipfile.BadZipFile, json.JSONDecodeError, UnicodeDecodeError, EOFError, RecursionError) as error:
        raise LoadError(f"{path} is damaged", found=str(error), help="download or save it again") from error


def _is_unpickled(name: str) -> bool:
    """Whether torch.export.load unpickles an entry whatever the archive's configuration says."""
    return "/data/sample_inputs/" in name or name.endswith(".pt") or "opaque_obj" in name or "custom_obj" in name


def _pickled_payloads(document: Any) -> Iterator[str]:
    """Yield the file names that a weights or constants configuration marks as pickled."""
    config = document.get("config") if isinstance(document, dict) else None
    for payload in config.values() if isinstance(config, dict) else ():
        if isinstance(payload, dict) and payload.get("use_pickle"):
            yield str(payload.get("path_name")).rpartition("/")[2]


def _check_pickle(path: Path, name: str, data: bytes) -> None:
    if not data:
        return
    content = scan_bytes(data)
    if content is None:
        raise _refusal(path, f"{name} is unpickled on loading, but is not a file of torch.save")
    if not content.is_plain:
        raise _refusal(path, f"{name} is a pickle that imports {', '.join(content.imports[:4])}")


def _check_program(path: Path, program: Any) -> None:
    for key, value in _strings(program):
        if key in {"expr_str", "guards_code"}:
            _check_expression(path, value)
        elif key == "target" and value.startswith(_LOOKED_UP) and not _TARGET.fullmatch(value):
            raise _refusal(path, f"operator {value!r}")
        elif key in {"forward_arg_names", "range_constraints"} and not value.isidentifier():
            raise _refusal(path, f"name {value!r}")


def _strings(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield every string with the key it stands under; the keys of ``range_constraints`` are strings too."""
    if isinstance(tree, str):
        yield key, tree
    elif isinstance(tree, list):
        for item in tree:
            yield from _strings(item, key)
    elif isinstance(tree, dict):
        for name, item in tree.items():
            if key == "range_constraints":
                yield key, name
                continue
            yield from _strings(item, name)


def _check_expression(path: Path, text: str) -> None:
    """Allow sizes, comparisons and sympy constructors only."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError) as error:
        raise _refusal(path, f"expression {text[:120]!r}") from error
    inside_symbol = {
        id(argument)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Symbol"
        for argument in node.args[:1]
    }
    keys = {id(node.slice) for node in ast.walk(tree) if isinstance(node, ast.Subscript)}
    for node in ast.walk(tree):
        if not _is_allowed(node, inside_symbol, keys):
            raise _refusal(path, f"expression {text[:120]!r}")


def _is_allowed(node: ast.AST, symbols: set[int], keys: set[int]) -> bool:
    match node:
        case ast.Constant(value=str() as text) if id(node) in symbols:
            return text.isidentifier()
        case ast.Constant(value=str()):
            return id(node) in keys
        case ast.Constant(value=value):
            return value is None or isinstance(value, bool | int | float)
        case ast.Name(id=name):
            return not name.startswith("_")  # a name alone runs nothing; calls are the next cases
        case ast.Call(func=ast.Name(id=name)):
            return name in _CALLS
        case ast.Call(func=ast.Attribute(attr=name)):
            return name in _METHODS
        case ast.Call():
            return False
        case ast.Attribute(attr=name):
            return name in _METHODS
        case _:
            return isinstance(node, _NODES)


def _refusal(path: Path, found: str) -> LoadError:
    return LoadError(
        f"{path} would run code when it is loaded",
        needed="an archive with nothing but data in it",
        found=found,
        help="if you trust who made the file, add --allow-pickle (allow_pickle=True from Python)",
    )
