"""A fixed number of slots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.ir.builder import Builder
from tokcc.passes.cache.storage import CacheForm, CacheStorage, Front, Held, Left, Stored

__all__ = ["Slots"]


class Slots(CacheStorage):
    """Keys and values in buffers ``[B, Hkv, rows, D]`` that never grow: N slots, then what travels besides.

    Slots that hold nothing yet stand in front, as padding does, and go first. Behind the slots come one row for the
    entry in front, where there is one, and in the key buffer states ``[B, Hkv, N]`` and that entry's weight, one after
    the other without regard to rows. A buffer of zeros is the empty cache.

    Attributes:
        slots: N.
        rows: N and what follows; keys and values have equally many.
    """

    kind: ClassVar[str] = "slots"
    as_they_are: ClassVar[bool] = True

    slots: int = Field(ge=1)
    rows: int = Field(ge=1)

    @staticmethod
    def rows_of(form: CacheForm, slots: int) -> int:
        """Return how many rows a cache needs for so many slots and what travels besides.

        One more than slots in any case: what is read is then a slice and so a copy. Runtimes let a call write over the
        buffer that it reads, and nothing else makes them finish reading first.
        """
        numbers = len(form.states) * slots + form.front
        return slots + max(form.front - (-numbers // form.key_width), 1)

    def check(self, form: CacheForm) -> None:
        """See :class:`CacheStorage`."""
        if form.key_width != form.value_width:
            raise ValueError(f"keys and values of one width, not of {form.key_width} and {form.value_width}")
        if (form.states or form.front) and form.dtype != torch.float32:
            what = form.states[0] if form.states else "a weight"
            raise ValueError(f"a cache in fp32: {what} lies between keys, and they are {form.dtype}")
        if self.rows < self.rows_of(form, self.slots):
            raise ValueError(f"at least {self.rows_of(form, self.slots)} rows for {self.slots} slots")

    def always(self) -> int:
        """See :class:`CacheStorage`."""
        return self.slots

    def tensors(self, form: CacheForm) -> tuple[Stored, ...]:
        """See :class:`Slots`."""
        return tuple(
            Stored(name, form.kv_heads, width, form.dtype, fixed=self.rows)
            for name, width in (("key", form.key_width), ("value", form.value_width))
        )

    def read(self, b: Builder, form: CacheForm, tensors: Mapping[str, Any]) -> Held:
        """See :class:`Slots`."""
        key, value = (b.slice(tensors[name], 2, 0, self.slots) for name in ("key", "value"))
        numbers = b.slice(tensors["key"], 2, self.slots + form.front, None)
        numbers = b.reshape(numbers, [b.size(numbers, 0), form.kv_heads, self._numbers(form)])
        states: dict[str, Any] = {}
        for i, name in enumerate(form.states):
            states[name] = b.slice(numbers, 2, i * self.slots, (i + 1) * self.slots)
        front = None
        if form.front:
            one, two = (b.slice(tensors[name], 2, self.slots, self.slots + 1) for name in ("key", "value"))
            last = len(form.states) * self.slots
            front = Front(one, two, b.slice(numbers, 2, last, last + 1))
        return Held(key, value, states, front)

    def write(self, b: Builder, form: CacheForm, tensors: Mapping[str, Any], left: Left) -> dict[str, Any]:
        """See :class:`Slots`."""
        del tensors
        keys, values = [left.key], [left.value]
        numbers = [left.states[name] for name in form.states]
        if left.front is not None:
            keys.append(left.front.key)
            values.append(left.front.value)
            numbers.append(left.front.weight)
        batch, count = b.size(left.key, 0), self._numbers(form)
        spare = count - len(form.states) * self.slots - form.front
        if spare:
            numbers.append(b.full([batch, form.kv_heads, spare], 0.0, form.dtype, left.key))
        shape = [batch, form.kv_heads, count // form.key_width, form.key_width]
        keys.append(b.reshape(b.cat(numbers, 2), shape))
        values.append(b.full(shape, 0.0, form.dtype, left.value))
        return {"key": b.cat(keys, 2), "value": b.cat(values, 2)}

    def _numbers(self, form: CacheForm) -> int:
        """Return how many numbers the key buffer has behind its slots and the entry in front."""
        return (self.rows - self.slots - form.front) * form.key_width
