"""Entries that say where they stand and what they belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from tokcc.ir.builder import Builder
from tokcc.passes.cache.storage import Arrangement, CacheForm, CacheStorage, Held, Left, Stored
from tokcc.passes.inputs import EngineInput

__all__ = ["SEGMENTS", "Placed"]

aten = torch.ops.aten

SEGMENTS = EngineInput(
    "segment_ids",
    ("B", "S"),
    "what each token belongs to: one of a segment sees that segment alone, one of segment 0 sees everything before it",
    torch.int64,
    unguided=0,
    low=0,
    high=2,
)


class Placed(CacheStorage):
    """Keys before they are turned, with position and segment of each (KVLink, arXiv:2502.16002).

    Every call turns the keys that it reads by their positions. So caches of texts that were read apart can be put
    behind each other: positions are shifted and segments numbered, and nothing is computed anew. A query sees a key
    when the key's position is not behind its own and both have one segment, or the query's is 0.

    ``key`` and ``value``: ``[B, Hkv, P, D]``; ``key_place`` and ``key_segment``: int64 ``[B, 1, P, 1]``. Segment -1 is
    padding, wherever it is. Entries may lie in any order. The attention is written out: ``[B, H, S, L]`` is held.
    """

    kind: ClassVar[str] = "placed"
    evicts: ClassVar[bool] = False
    placed: ClassVar[bool] = True

    def inputs(self) -> Sequence[EngineInput]:
        """Segments of the call's tokens."""
        return (SEGMENTS,)

    def tensors(self, form: CacheForm) -> tuple[Stored, ...]:
        """See :class:`Placed`."""
        return (
            Stored("key", form.kv_heads, form.key_width, form.dtype),
            Stored("value", form.kv_heads, form.value_width, form.dtype),
            Stored("key_place", 1, 1, torch.int64),
            Stored("key_segment", 1, 1, torch.int64),
        )

    def read(self, b: Builder, form: CacheForm, tensors: Mapping[str, Any]) -> Held:
        """See :class:`Placed`."""
        del form
        places, segments = (b.call(aten.flatten.using_ints, tensors[f"key_{x}"], 1, 3) for x in ("place", "segment"))
        real = b.compare("ge", segments, 0)
        return Held(tensors["key"], tensors["value"], real=real, arranged=Arrangement(places, segments))

    def arranged(self, b: Builder, held: Held, positions: Any, real: Any) -> Arrangement:
        """See :class:`CacheStorage`."""
        assert held.arranged is not None
        given = b.input(
            SEGMENTS.name, [b.size(positions, 0), b.size(positions, 1)], SEGMENTS.dtype, b.device(positions)
        )
        # What is not in a segment is padding.
        own = Arrangement(b.cast(positions, torch.int64), b.where(real, b.clamp_min(given, 0), -1))
        places, segments = (b.cat([getattr(held.arranged, x), getattr(own, x)], 1) for x in ("places", "segments"))
        behind = b.compare("le", b.unsqueeze(places, 1), b.unsqueeze(own.places, 2))  # [B, S, L]
        mine = b.unsqueeze(own.segments, 2)
        same = b.logical_or(b.compare("eq", b.unsqueeze(segments, 1), mine), b.compare("eq", mine, 0))
        known = b.unsqueeze(b.compare("ge", segments, 0), 1)
        return Arrangement(places, segments, b.logical_and(known, b.logical_and(behind, same)))

    def write(self, b: Builder, form: CacheForm, tensors: Mapping[str, Any], left: Left) -> dict[str, Any]:
        """See :class:`Placed`."""
        del form, tensors
        assert left.arranged is not None
        numbers = {"key_place": left.arranged.places, "key_segment": left.arranged.segments}
        return {
            "key": left.key,
            "value": left.value,
            **{name: b.unsqueeze(b.unsqueeze(x, 1), 3) for name, x in numbers.items()},
        }
