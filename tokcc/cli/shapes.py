"""Shape options in the form that ``trtexec`` users know: ``x:1x3x224x224,mask:1x197``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from tokcc.errors import UsageError

__all__ = ["ShapeRange", "parse_shapes", "shape_range"]

Shapes = Mapping[str, tuple[int, ...]]

# Names may hold dots, slashes and colons (`past_key_values.0.key`, `x:0`): the last colon separates.
_ITEM = re.compile(r"(?P<name>.+):(?P<dims>\d+(?:x\d+)*)")


@dataclass(frozen=True)
class ShapeRange:
    """Smallest, typical and largest shape of each input."""

    smallest: Shapes
    typical: Shapes
    largest: Shapes

    def by_input(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """Return the three shapes of each input."""
        return {name: (shape, self.typical[name], self.largest[name]) for name, shape in self.smallest.items()}


def parse_shapes(text: str, option: str) -> dict[str, tuple[int, ...]]:
    """Parse one option.

    Raises:
        UsageError: The text does not have the form.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for item in text.split(","):
        match = _ITEM.fullmatch(item.strip().replace("'", ""))
        dims = tuple(int(size) for size in match["dims"].split("x")) if match else ()
        if match is None or 0 in dims:
            raise UsageError(
                f"{option} cannot be read", needed="NAME:DIMxDIM,... such as x:1x3x224x224", found=item.strip() or text
            )
        if match["name"] in shapes:
            raise UsageError(f"{option} names the input `{match['name']}` twice", found=text)
        shapes[match["name"]] = dims
    return shapes


def shape_range(smallest: str | None, typical: str | None, largest: str | None) -> ShapeRange | None:
    """Parse the three options together; None when none is given.

    Raises:
        UsageError: One of the three is missing, or they do not agree.
    """
    given = {"--min-shapes": smallest, "--opt-shapes": typical, "--max-shapes": largest}
    missing = [option for option, text in given.items() if text is None]
    if len(missing) == len(given):
        return None
    if missing:
        raise UsageError(f"{missing[0]} is missing", needed="--min-shapes, --opt-shapes and --max-shapes together")
    low, usual, high = (parse_shapes(text, option) for option, text in given.items() if text is not None)
    if not low.keys() == usual.keys() == high.keys():
        names = ", ".join(sorted(low.keys() ^ usual.keys() | usual.keys() ^ high.keys()))
        raise UsageError("the shape options name different inputs", found=f"not in all three: {names}")
    for name, shape in low.items():
        three = (shape, usual[name], high[name])
        same_rank = len({len(each) for each in three}) == 1
        if not same_rank or any(not a <= b <= c for a, b, c in zip(*three, strict=True)):
            raise UsageError(
                f"the shapes of `{name}` do not agree",
                needed="min <= opt <= max in every axis",
                found=", ".join(_text(each) for each in three),
            )
    return ShapeRange(low, usual, high)


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(str(size) for size in shape)
