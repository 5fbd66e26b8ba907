"""Whether inputs are those that an engine was made for: what a runtime that does not look would get wrong silently."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt

from tokcc.backends.manifest import TensorContract
from tokcc.errors import UsageError

__all__ = ["check_feeds", "check_shapes"]

Array = npt.NDArray[Any]
Ranges = Mapping[str, tuple[int, int | None]]


def check_feeds(contracts: Sequence[TensorContract], feeds: Mapping[str, Array]) -> None:
    """Check names and types.

    Raises:
        UsageError: An input is missing, unknown or of another dtype.
    """
    if set(feeds) != {contract.name for contract in contracts}:
        raise UsageError(
            "the inputs are not those of the engine",
            needed=", ".join(contract.name for contract in contracts),
            found=", ".join(feeds),
            help="; ".join(
                f"the policy added {contract}: {contract.doc} ({contract.unguided:g} in all places = not guided)"
                for contract in contracts
                if contract.unguided is not None and contract.name not in feeds
            )
            or None,
        )
    for contract in contracts:
        found = str(feeds[contract.name].dtype)
        if contract.dtype and found != contract.dtype:
            raise UsageError(f"input `{contract.name}` has another dtype", needed=contract.dtype, found=found)


def check_shapes(contracts: Sequence[TensorContract], ranges: Ranges, feeds: Mapping[str, Array]) -> None:
    """Check shapes: fixed sizes, sizes that go together, and their ranges.

    Args:
        contracts: What the engine takes.
        ranges: Smallest and largest value of each dynamic size.
        feeds: The inputs by name.

    Raises:
        UsageError: An input has a shape that the engine was not made for.
    """
    sizes: dict[str, tuple[int, str]] = {}
    for contract in contracts:
        shape = feeds[contract.name].shape
        wrong = len(shape) != len(contract.shape) or any(
            isinstance(wanted, int) and wanted != size for wanted, size in zip(contract.shape, shape, strict=False)
        )
        if wrong:
            raise UsageError(
                f"input `{contract.name}` has another shape",
                needed=_shape(contract.shape),
                found=_shape(shape),
                help="compile again with a dynamic axis for other sizes",
            )
        for wanted, size in zip(contract.shape, shape, strict=True):
            if isinstance(wanted, int):
                continue
            known, where = sizes.setdefault(wanted, (size, contract.name))
            if known != size:
                raise UsageError(
                    f"inputs `{where}` and `{contract.name}` disagree about `{wanted}`",
                    needed=f"{known}, as in `{where}`",
                    found=f"{size} in {_shape(shape)}",
                )
            low, high = ranges.get(wanted, (0, None))
            if size < low or (high is not None and size > high):
                raise UsageError(
                    f"`{wanted}` of input `{contract.name}` is outside of what the engine was compiled for",
                    needed=f"{low} to {high}" if high is not None else f"at least {low}",
                    found=str(size),
                )


def _shape(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"
