"""A slot for every token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.ir.builder import Builder
from tokcc.passes.cache.pages import Touched
from tokcc.passes.cache.runs import run_from
from tokcc.passes.cache.storage import CacheForm, CacheStorage, Held, Left, Stored

__all__ = ["InPlace"]

aten = torch.ops.aten


class InPlace(CacheStorage):
    """Keys and values in buffers ``[B, Hkv, N, D]`` that never grow: token t of a sequence, padding counted, in slot t.

    A call writes its entries where they stay, before its attention reads them. The length of the padding mask says how
    many slots are filled. Nothing else reads the buffer that is written over, so that a runtime may give one buffer for
    past and present and copies nothing. What is behind the filled slots counts nothing: buffers may begin as any finite
    numbers, and a sequence may be taken back to an earlier length by a shorter mask. An attention to everything reads a
    copy of the filled slots, which is measured to be as fast as reading the buffer when it is full, and faster else.

    Attributes:
        slots: N.
    """

    kind: ClassVar[str] = "in_place"
    evicts: ClassVar[bool] = False
    in_place: ClassVar[bool] = True
    paged: ClassVar[bool] = True

    slots: int = Field(ge=1)

    def always(self) -> int:
        """See :class:`CacheStorage`."""
        return self.slots

    def most(self) -> int:
        """See :class:`CacheStorage`."""
        return self.slots

    def tensors(self, form: CacheForm) -> tuple[Stored, ...]:
        """See :class:`InPlace`."""
        return (
            Stored("key", form.kv_heads, form.key_width, form.dtype, fixed=self.slots),
            Stored("value", form.kv_heads, form.value_width, form.dtype, fixed=self.slots),
            *(Stored(p.name, p.heads, p.width, p.dtype, fixed=p.rows(self.slots)) for p in form.pages),
        )

    def read(self, b: Builder, form: CacheForm, tensors: Mapping[str, Any]) -> Held:
        """See :class:`InPlace`."""
        del b, form
        return Held(tensors["key"], tensors["value"])

    def entered(self, b: Builder, held: Held, new_key: Any, new_value: Any, past: Any, new: Any) -> tuple[Any, Any]:
        """See :class:`CacheStorage`."""
        place = b.call(aten.add.Scalar, b.arange(new, new_key), past)
        key, value = (
            b.call(aten.index_copy.default, x, 2, place, y) for x, y in ((held.key, new_key), (held.value, new_value))
        )
        return key, value

    def paged_rows(self, b: Builder, state: Any, pages: Touched, fresh: Any) -> Any:
        """See :class:`CacheStorage`."""
        place = b.call(aten.add.Scalar, b.arange(pages.count, fresh), pages.first)
        return b.call(aten.index_copy.default, state, 2, place, fresh)

    def held_rows(self, b: Builder, state: Any, pages: Touched) -> Any:
        """See :class:`CacheStorage`."""
        return run_from(b, state, 2, pages.first, pages.count)

    def held_whole(self, b: Builder, state: Any) -> Any:
        """See :class:`CacheStorage`."""
        del b
        return state

    def write(self, b: Builder, form: CacheForm, tensors: Mapping[str, Any], left: Left) -> dict[str, Any]:
        """See :class:`InPlace`."""
        del b, form, tensors
        return {"key": left.key, "value": left.value, **left.pages}
