"""Entries as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from tokcc.ir.builder import Builder
from tokcc.passes.cache.pages import WHOLE, Touched
from tokcc.passes.cache.runs import run_from, run_of
from tokcc.passes.cache.storage import CacheForm, CacheStorage, Front, Held, Left, Stored

__all__ = ["Merged"]


class Merged(CacheStorage):
    """Keys and values as the model makes them, as many as there are; every state is a tensor ``[B, Hkv, P, 1]``.

    States of pages grow by a row with every page; that of a whole text has one from the first call on.
    """

    kind: ClassVar[str] = "merged"
    as_they_are: ClassVar[bool] = True
    paged: ClassVar[bool] = True

    def tensors(self, form: CacheForm) -> tuple[Stored, ...]:
        """See :class:`Merged`."""
        pair = (
            Stored("key", form.kv_heads, form.key_width, form.dtype),
            Stored("value", form.kv_heads, form.value_width, form.dtype),
        )
        states = self.state_tensors(form)
        states += tuple(
            # A row for every token is as long as the cache; of a whole text there is one behind its first call.
            Stored(p.name, p.heads, p.width, p.dtype, {1: "slots", WHOLE: "text"}.get(p.every, f"pages_{p.every}"))
            for p in form.pages
        )
        if not form.front:
            return pair + states
        front = (
            Stored("key_front", form.kv_heads, form.key_width, form.dtype, "front"),
            Stored("value_front", form.kv_heads, form.value_width, form.dtype, "front"),
            Stored("key_front_weight", form.kv_heads, 1, torch.float32, "front"),
        )
        return pair + states + front

    def read(self, b: Builder, form: CacheForm, tensors: Mapping[str, Any]) -> Held:
        """See :class:`Merged`."""
        states = self.read_states(b, form, tensors)
        front = None
        if form.front:
            weight = b.call(torch.ops.aten.select.int, tensors["key_front_weight"], 3, 0)
            front = Front(tensors["key_front"], tensors["value_front"], weight)
        return Held(tensors["key"], tensors["value"], states, front)

    def write(self, b: Builder, form: CacheForm, tensors: Mapping[str, Any], left: Left) -> dict[str, Any]:
        """See :class:`Merged`."""
        del form, tensors
        states = self.write_states(b, left)
        front = {}
        if left.front is not None:
            weight = b.unsqueeze(left.front.weight, 3)
            front = {"key_front": left.front.key, "value_front": left.front.value, "key_front_weight": weight}
        return {"key": left.key, "value": left.value, **states, **left.pages, **front}

    def paged_rows(self, b: Builder, state: Any, pages: Touched, fresh: Any) -> Any:
        """See :class:`CacheStorage`."""
        whole = b.shape(pages.key)[3] == 1  # pages of one token are never touched again
        return b.cat([state if whole else run_of(b, state, 2, 0, pages.first), fresh], 2)

    def held_rows(self, b: Builder, state: Any, pages: Touched) -> Any:
        """See :class:`CacheStorage`."""
        sizes = [b.size(state, 0), int(b.shape(state)[1]), pages.count, int(b.shape(state)[3])]
        more = b.full(sizes, 0.0, b.dtype(state), pages.key)
        return run_from(b, b.cat([state, more], 2), 2, pages.first, pages.count)

    def held_whole(self, b: Builder, state: Any) -> Any:
        """See :class:`CacheStorage`."""
        nothing = b.full([b.size(state, 0), *map(int, (b.shape(state)[1], 1, b.shape(state)[3]))], 0.0,
                         b.dtype(state), state)  # fmt: skip
        return b.unsqueeze(b.call(torch.ops.aten.select.int, b.cat([nothing, state], 2), 2, -1), 2)
