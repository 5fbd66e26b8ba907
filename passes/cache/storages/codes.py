"""Entries as codes of few bits, each rounded once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from tokcc.ir.builder import Builder
from tokcc.passes.cache.storage import CacheForm, CacheStorage, Held, Left, Stored
from tokcc.passes.cache.token_codes import TokenCodes, token_codes

__all__ = ["Codes"]


class Codes(CacheStorage):
    """Codes of every token in groups of channels, on a grid from the group's least to its largest number.

    ``key`` and ``value`` are uint8 ``[B, Hkv, P, D * bits / 8]``, packed as :func:`tokcc.passes.cache.rounding.pack`
    says; ``key_step`` and ``key_low`` (and those of values) are fp16 ``[B, Hkv, P, D / group]``. A token knows nothing
    of its neighbours: entries may be evicted, and padding spoils nothing (arXiv:2603.04428 keeps caches so).

    Attributes:
        bits: Of a code.
        group: Channels of a group; all of them where a head is narrower.
    """

    kind: ClassVar[str] = "codes"

    bits: Literal[4, 8] = 4
    group: int = Field(default=64, ge=2)

    def check(self, form: CacheForm) -> None:
        """See :class:`CacheStorage`."""
        self._both(form)

    def _both(self, form: CacheForm) -> tuple[TokenCodes, TokenCodes]:
        return token_codes(form, self.bits, self.group)

    def tensors(self, form: CacheForm) -> tuple[Stored, ...]:
        """See :class:`Codes`."""
        codes, steps, lows = zip(*(part.tensors() for part in self._both(form)), strict=True)
        grids = (grid for pair in zip(steps, lows, strict=True) for grid in pair)
        return (*codes, *grids, *self.state_tensors(form))

    def read(self, b: Builder, form: CacheForm, tensors: Mapping[str, Any]) -> Held:
        """See :class:`Codes`."""
        key, value = (b.cast(part.read(b, tensors), form.dtype) for part in self._both(form))
        return Held(key, value, self.read_states(b, form, tensors))

    def write(self, b: Builder, form: CacheForm, tensors: Mapping[str, Any], left: Left) -> dict[str, Any]:
        """See :class:`Codes`."""
        made: dict[str, Any] = {}
        for part, new in zip(self._both(form), (left.new_key, left.new_value), strict=True):
            made |= {name: left.take(b, b.cat([tensors[name], x], 2)) for name, x in part.write(b, new).items()}
        return made | self.write_states(b, left)
