"""What the plugins of sparse attention share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokcc.errors import LoweringError
from tokcc.kernels.configs import dtype_of
from tokcc.kernels.gpu import interpreted, pow2, precision

__all__ = ["WIDEST", "check_widths", "head_constants", "refuse_bias", "wide"]

_LOG2E = 1.4426950408889634
WIDEST = 256
"""Numbers of a head: wider ones spill."""


def wide(attributes: Mapping[str, Any]) -> int:
    """Return the width that tables of configurations have a row for."""
    return max(64, pow2(max(attributes["width"], attributes["value_width"])))


def head_constants(dtype: str, attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the constants of heads, scale, cap and mask."""
    width, out, scale, cap = (attributes[name] for name in ("width", "value_width", "scale", "softcap"))
    return {
        "SCALE": scale / cap if cap else scale * _LOG2E,
        "CAP": cap * _LOG2E,
        "D": width,
        "DV": out,
        "DP": max(16, pow2(width)),
        "DVP": max(16, pow2(out)),
        "HAS_VALID": bool(attributes["has_valid"]),
        "CAPPED": cap != 0.0,
        "PRECISION": precision(dtype_of(dtype), wide(attributes)),
        "UP": interpreted(),
    }


def check_widths(attributes: Mapping[str, Any]) -> None:
    """Refuse heads that no kernel is made for.

    Raises:
        ValueError: What is needed, and what was found.
    """
    found = attributes["width"], attributes["value_width"]
    if not 1 <= min(found) <= max(found) <= WIDEST:
        raise ValueError(f"heads of at most {WIDEST} numbers", f"{found[0]} and {found[1]}")


def refuse_bias(op: str, bias: Any) -> None:
    """Refuse a bias of keys.

    Raises:
        LoweringError: There is one.
    """
    if bias is not None:
        raise LoweringError(
            f"the TensorRT plugin `{op}` does not add a bias to the logits of keys",
            needed="attention without `bias`",
            found="keys that stand for several tokens, or logits that the model changes",
            help="use the graph without plugins",
        )
