"""From a validation error to a ``PolicyError`` that points into the file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from tokcc.config.checks import nearest, show
from tokcc.config.yaml_lines import Lines
from tokcc.errors import PolicyError

__all__ = ["Origin"]

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Origin:
    """Where plain data came from, so that messages can point there.

    Attributes:
        name: The file's name, or words such as ``preset `tome```.
        lines: The line of each path, where there is a file.
        numbers: The number (from 1) of each step as its author counts it: a preset may bring several.
    """

    name: str
    lines: Lines = field(default_factory=dict)
    numbers: tuple[int, ...] = ()

    def where(self, path: Sequence[str | int], data: Any) -> str:
        """Return ``policy.yaml:4  step 1 `tome`, at.layers: [3]`` for a path into ``data``."""
        line = next((self.lines[key] for key in _prefixes(path) if key and key in self.lines), None)
        place = self.name if line is None else f"{self.name}:{line}"
        label = self._label(tuple(path), data)
        return f"{place}  {label}" if label else place

    def _label(self, path: Path, data: Any) -> str:
        parts = []
        rest = path
        if len(path) > 1 and path[0] == "steps" and isinstance(path[1], int):
            step = _get(data, path[:2])
            index = path[1]
            number = self.numbers[index] if index < len(self.numbers) else index + 1
            keys = ("name", "preset", "node") if isinstance(step, Mapping) else ()
            name = next((step[key] for key in keys if key in step), None)
            parts.append(f"step {number} `{name}`" if name else f"step {number}")
            rest = path[2:]
        if rest:
            value = _get(data, path)
            dotted = ".".join(str(part) for part in rest)
            parts.append(dotted if value is None else f"{dotted}: {show(value)}")
        return ", ".join(parts)

    def refusal(self, error: ValidationError | PydanticCustomError, data: Any, path: Path = ()) -> PolicyError:
        """Return the error to raise for a failed validation of ``data``.

        Args:
            error: What pydantic found.
            data: The whole plain data.
            path: Where the validated part sits in ``data``.
        """
        found = _custom(error) if isinstance(error, PydanticCustomError) else _first(error, self.lines, path)
        at = (*path, *found.path)
        value = _get(data, at)
        return PolicyError(
            found.what + found.more,
            policy=self.where(at, data),
            needed=found.needed,
            found=show(value) if found.needed and value is not None and not found.unknown else None,
            help=found.hint,
        )


@dataclass
class _Failure:
    path: Path
    what: str
    needed: str | None = None
    hint: str | None = None
    more: str = ""
    unknown: bool = False


def _custom(error: PydanticCustomError, loc: Path = ()) -> _Failure:
    context = error.context or {}
    return _from_context(context, loc, str(error))


def _from_context(context: Mapping[str, Any], loc: Path, message: str) -> _Failure:
    key = context.get("key")
    what = str(context.get("what", message))
    return _Failure(
        path=(*loc, key) if key else loc,
        what=what,
        needed=context.get("needed"),
        hint=context.get("hint"),
        unknown=what.startswith("unknown key"),
    )


def _first(error: ValidationError, lines: Lines, path: Path) -> _Failure:
    failures = [_translate(dict(details)) for details in error.errors(include_url=False)]

    def line(failure: _Failure) -> int:
        return next((lines[key] for key in _prefixes((*path, *failure.path)) if key in lines), 0)

    failures.sort(key=line)
    first = failures[0]
    if len(failures) > 1:
        first.more = f" (and {len(failures) - 1} more problem{'s' if len(failures) > 2 else ''})"
    return first


def _translate(details: Mapping[str, Any]) -> _Failure:
    loc: Path = tuple(details["loc"])
    context = details.get("ctx", {})
    kind = details["type"]
    if kind == "tokcc":
        return _from_context(context, loc, details["msg"])
    if kind == "missing":
        return _Failure(loc[:-1], f"`{loc[-1]}` is missing", hint=f"add `{loc[-1]}`")
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"]) or [context["expected"]]
        close = nearest(details["input"], choices)
        needed = ", ".join(f"`{choice}`" for choice in choices)
        hint = f"did you mean `{close}`?" if close else None
        return _Failure(loc, f"{show(details['input'])} is not accepted here", f"one of {needed}", hint)
    return _Failure(loc, "the value does not fit", details["msg"][:1].lower() + details["msg"][1:])


def _prefixes(path: Sequence[str | int]) -> list[Path]:
    return [tuple(path[:length]) for length in range(len(path), -1, -1)]


def _get(data: Any, path: Sequence[str | int]) -> Any:
    for part in path:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return None
    return data
