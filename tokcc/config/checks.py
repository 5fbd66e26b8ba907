"""What the policy models are checked with: every refusal carries what was needed and what was found."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

__all__ = ["Strict", "listed", "nearest", "problem", "real", "show", "unknown_key", "whole"]


def nearest(word: object, known: Iterable[str]) -> str | None:
    """Return the known name that is closest to ``word``, if one is close at all."""
    by_lower = {name.lower(): name for name in known}
    found = difflib.get_close_matches(str(word).lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


def show(value: object, limit: int = 60) -> str:
    """Return a value as a person wrote it, shortened to one line."""
    if isinstance(value, bool) or value is None:
        text = {True: "true", False: "false", None: "null"}[value]
    elif isinstance(value, tuple | list):
        text = "[" + ", ".join(show(item, limit) for item in value[:limit]) + "]"
    elif isinstance(value, Mapping):
        text = "{" + ", ".join(f"{key}: {show(item, limit)}" for key, item in list(value.items())[:limit]) + "}"
    elif isinstance(value, str):
        text = f'"{value}"'
    else:
        text = str(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def problem(
    what: str, *, needed: str | None = None, key: str | None = None, hint: str | None = None
) -> PydanticCustomError:
    """Return a validation error whose parts end up in the lines of a ``PolicyError``.

    Args:
        what: The one-line description.
        needed: What is accepted here.
        key: The offending key, where the error belongs to one key of the mapping under validation.
        hint: What the user can do.
    """
    return PydanticCustomError("tokcc", "{what}", {"what": what, "needed": needed, "key": key, "hint": hint})


def _is_real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def real(
    *, above: float | None = None, least: float | None = None, below: float | None = None, most: float | None = None
) -> BeforeValidator:
    """Accept a finite number inside the bounds (``above``/``below`` exclude the bound itself); no booleans, no text."""
    needed = "a number" + _bounds(above, least, below, most)

    def check(value: Any) -> Any:
        if value is None:
            return None
        fits = (
            _is_real(value)
            and (above is None or value > above)
            and (least is None or value >= least)
            and (below is None or value < below)
            and (most is None or value <= most)
        )
        if not fits:
            raise problem("value out of range" if _is_real(value) else "not a number", needed=needed)
        return float(value)

    return BeforeValidator(check)


def whole(*, least: int | None = None) -> BeforeValidator:
    """Accept a whole number of at least ``least``; no booleans, no text, no fractions."""
    needed = "a whole number" + _bounds(None, least, None, None)

    def check(value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise problem("not a whole number", needed=needed)
        if least is not None and value < least:
            raise problem("value out of range", needed=needed)
        return value

    return BeforeValidator(check)


def _bounds(above: float | None, least: float | None, below: float | None, most: float | None) -> str:
    parts = []
    if above is not None:
        parts.append(f"above {above:g}")
    if least is not None:
        parts.append(f"of at least {least:g}")
    if below is not None:
        parts.append(f"below {below:g}")
    if most is not None:
        parts.append(f"at most {most:g}")
    return (" " + " and ".join(parts)) if parts else ""


class Strict(BaseModel):
    """A frozen model whose unknown keys are refused with the nearest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _only_known_keys(cls, data: Any) -> Any:
        if isinstance(data, cls):
            return data
        if not isinstance(data, Mapping):
            raise problem("not a mapping", needed=f"a mapping with the keys {listed(cls.model_fields)}")
        for key in data:
            if key not in cls.model_fields:
                raise unknown_key(key, cls.model_fields)
        return data


def unknown_key(key: object, known: Iterable[str]) -> PydanticCustomError:
    """Return the error for a key that is not among the known ones."""
    names = list(known)
    close = nearest(key, names)
    return problem(
        f"unknown key `{key}`",
        needed=f"one of {listed(names)}",
        key=str(key),
        hint=f"did you mean `{close}`?" if close else None,
    )


def listed(names: Iterable[str]) -> str:
    """Return names as prose: each in back quotes, separated by commas."""
    return ", ".join(f"`{name}`" for name in names)
