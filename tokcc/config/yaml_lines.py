"""YAML with line numbers, for files that come from anywhere.

The semantics are those of ``yaml.safe_load``, narrowed: no tags, no merge keys, no duplicate keys, a bound on the size
after aliases are expanded. Sexagesimal numbers of YAML 1.1 stay text, since ``layers: 2:10`` means a range and not 130.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tokcc.errors import PolicyError

__all__ = ["Lines", "Located", "read_yaml"]

Lines = Mapping[tuple[str | int, ...], int]

_MAX_BYTES = 1 << 20
_MAX_VALUES = 20_000
_TAG = "tag:yaml.org,2002:"
_SCALARS = {_TAG + kind for kind in ("str", "int", "float", "bool", "null")}
_UNQUOTED_RANGE = re.compile(r"[:\[,-]\s*-?\d*:\s*($|[,\]#])")


@dataclass
class Located:
    """Plain data and the line (from 1) that each path in it was written on."""

    data: Any
    lines: dict[tuple[str | int, ...], int] = field(default_factory=dict)


def read_yaml(path: Path, *, what: str = "policy") -> Located:
    """Read one YAML document with line numbers.

    Args:
        path: The file.
        what: What the file is, for messages.

    Raises:
        PolicyError: The file cannot be read, is not YAML, or uses something that a policy has no use for.
    """
    name = path.name
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise PolicyError(f"cannot read the {what} `{path}`", found=error.strerror or str(error)) from error
    if len(raw) > _MAX_BYTES:
        raise PolicyError(f"the {what} is too large", policy=name, needed=f"at most {_MAX_BYTES} bytes")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PolicyError(f"the {what} is not text", policy=name, needed="UTF-8", found=str(error)) from error
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            raise PolicyError(f"the {what} is empty", policy=name, needed="a mapping with `steps`")
        return _Builder(loader, name, what).build(node)
    except yaml.YAMLError as error:
        raise _syntax_error(error, text, name, what) from error
    except RecursionError:
        raise PolicyError(f"the {what} is nested too deeply", policy=name) from None
    finally:
        loader.dispose()


def _syntax_error(error: yaml.YAMLError, text: str, name: str, what: str) -> PolicyError:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    where, hint = name, None
    if mark is not None:
        where = f"{name}:{mark.line + 1}"
        lines = text.splitlines()
        if mark.line < len(lines) and _UNQUOTED_RANGE.search(lines[mark.line]):
            hint = 'put ranges of layers in quotes: layers: "4:"'
    found = getattr(error, "problem", None) or str(error).splitlines()[0]
    return PolicyError(f"the {what} is not valid YAML", policy=where, found=found, help=hint)


class _Builder:
    """Turn composed YAML nodes into plain data; nothing but text, numbers, booleans, lists and mappings."""

    def __init__(self, loader: yaml.SafeLoader, name: str, what: str) -> None:
        self._loader = loader
        self._name = name
        self._what = what
        self._values = 0
        self._open: set[int] = set()
        self._lines: dict[tuple[str | int, ...], int] = {}

    def build(self, node: yaml.Node) -> Located:
        return Located(self._value(node, ()), self._lines)

    def _refuse(self, node: yaml.Node, what: str, **details: str) -> PolicyError:
        return PolicyError(what, policy=f"{self._name}:{node.start_mark.line + 1}", **details)

    def _value(self, node: yaml.Node, path: tuple[str | int, ...]) -> Any:
        self._values += 1
        if self._values > _MAX_VALUES:
            raise self._refuse(node, f"the {self._what} is too large", needed=f"at most {_MAX_VALUES} values")
        if id(node) in self._open:
            raise self._refuse(node, "an alias contains itself")
        self._lines.setdefault(path, node.start_mark.line + 1)
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.ScalarNode):
                return self._scalar(node)
            if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
                return [self._value(item, (*path, index)) for index, item in enumerate(node.value)]
            if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
                return self._mapping(node, path)
        finally:
            self._open.discard(id(node))
        raise self._tag_error(node)

    def _mapping(self, node: yaml.MappingNode, path: tuple[str | int, ...]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        first_lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _TAG + "merge":
                raise self._refuse(key_node, "merge keys (`<<`) are not supported", help="write the keys out")
            key = self._scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                raise self._refuse(key_node, "a key is not text", found=str(key_node.value)[:60])
            line = key_node.start_mark.line + 1
            if key in result:
                raise self._refuse(key_node, f"duplicate key `{key}`", found=f"it is also on line {first_lines[key]}")
            self._lines[(*path, key)] = first_lines[key] = line
            result[key] = self._value(value_node, (*path, key))
        return result

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        if node.tag in (_TAG + "int", _TAG + "float") and ":" in node.value:
            return node.value
        if node.tag not in _SCALARS:
            raise self._tag_error(node)
        try:
            return self._loader.construct_object(node)
        except ValueError as error:  # a number with thousands of digits
            raise self._refuse(node, "not a number", found=str(error)) from error

    def _tag_error(self, node: yaml.Node) -> PolicyError:
        if node.tag == _TAG + "timestamp":
            return self._refuse(node, "a date has no place here", found=node.value, help="put the text in quotes")
        shown = node.tag.replace(_TAG, "!!")
        return self._refuse(node, f"the YAML tag `{shown}` is refused", needed="plain text, numbers, lists, mappings")
