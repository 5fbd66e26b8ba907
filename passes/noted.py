"""What a piece noted about the tokens at an earlier cut, of those that are left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokcc.ir.space import TokenSpace
from tokcc.passes.cut import Cut
from tokcc.passes.taking import take

__all__ = ["noted"]


def noted(cut: Cut, key: Any) -> tuple[Any, Callable[[Any], Any]] | None:
    """Return what was noted last under a key, and what takes a value ``[B, N]`` of the tokens then to those now.

    Returns:
        None where nothing was noted.
    """
    path: list[TokenSpace] = []
    space: TokenSpace | None = cut.space
    while space is not None:
        if key in space.notes:

            def now(value: Any) -> Any:
                for below in reversed(path):
                    value = take(cut, value, below.index)
                return value

            return space.notes[key], now
        path.append(space)
        space = space.parent
    return None
