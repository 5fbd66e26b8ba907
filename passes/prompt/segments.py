"""Named parts of a prompt: which of a call's tokens belong to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokcc.ir.builder import Builder
from tokcc.passes.cache.visible import slot_rank

__all__ = ["TEXT", "Segment", "belongs", "declared_segments"]

TEXT = "text"
"""Name of what is in no declared segment."""


@dataclass(frozen=True)
class Segment:
    """A part of every prompt.

    Attributes:
        name: In the policy.
        token: The id that all its tokens have, or None.
        start: For a fixed range: its first token, counted without padding.
        stop: Behind its last token.
        count: How many tokens of it a prompt has; None = not said.
    """

    name: str
    token: int | None = None
    start: int | None = None
    stop: int | None = None
    count: int | None = None

    @property
    def mask_input(self) -> str:
        """Name of the input that says which tokens are its own, for decoders that do not see token ids."""
        return f"{self.name}_mask"


def declared_segments(declared: Mapping[str, Mapping[str, int]]) -> tuple[Segment, ...]:
    """Return the segments of a policy.

    Raises:
        ValueError: One of them says neither an id nor a range; the first argument is its name.
    """
    found = []
    for name, given in declared.items():
        if not ({"input_ids"} <= set(given) <= {"input_ids", "tokens"} or set(given) == {"start", "stop"}):
            raise ValueError(name, ", ".join(given) or "nothing")
        start, stop = given.get("start"), given.get("stop")
        if start is not None and stop is not None:
            if stop <= start:
                raise ValueError(name, f"{start} to {stop}")
            found.append(Segment(name, None, start, stop, stop - start))
        else:
            found.append(Segment(name, given["input_ids"], count=given.get("tokens")))
    return tuple(found)


def belongs(b: Builder, segments: Sequence[Segment], ids: Any, masks: Mapping[str, Any], real: Any) -> Any:
    """Return bool ``[B, S]``: tokens of any of the segments.

    Args:
        b: The builder.
        segments: At least one.
        ids: int64 ``[B, S]``, or None for a decoder that takes embeddings.
        masks: For such a decoder, int64 ``[B, S]`` by name of the segment.
        real: bool ``[B, S]``: tokens that are not padding.
    """
    found: Any = None
    for segment in segments:
        if segment.start is not None:
            rank = slot_rank(b, real)
            inside = b.logical_and(b.compare("ge", rank, segment.start), b.compare("lt", rank, segment.stop))
        elif ids is not None:
            inside = b.compare("eq", ids, segment.token)
        else:
            inside = b.compare("gt", masks[segment.name], 0)
        found = inside if found is None else b.logical_or(found, inside)
    return b.logical_and(found, real)
