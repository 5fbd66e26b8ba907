"""Entries as codes of few bits, each rounded once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from tokcc.ir.builder import Builder
from tokcc.passes.cache.rounding import Grid, grid_between, pack, round_to, unpack, values_of
from tokcc.passes.cache.storage import CacheForm, CacheStorage, Held, Left, Stored

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
        for part, width in (("keys", form.key_width), ("values", form.value_width)):
            group = min(self.group, width)
            if width % group:
                raise ValueError(f"{part} whose width is a multiple of {group}, not {width}; or another `group`")
            if width * self.bits % 8:
                raise ValueError(f"{part} of an even width, not {width}, for {self.bits} bits")

    def tensors(self, form: CacheForm) -> tuple[Stored, ...]:
        """See :class:`Codes`."""
        codes, grids = [], []
        for part, width in (("key", form.key_width), ("value", form.value_width)):
            codes.append(Stored(part, form.kv_heads, width * self.bits // 8, torch.uint8))
            groups = width // min(self.group, width)
            grids += [Stored(f"{part}_{name}", form.kv_heads, groups, torch.float16) for name in ("step", "low")]
        return (*codes, *grids, *self.state_tensors(form))

    def read(self, b: Builder, form: CacheForm, tensors: Mapping[str, Any]) -> Held:
        """See :class:`Codes`."""
        entries = []
        for part in ("key", "value"):
            grid = Grid(*(b.unsqueeze(tensors[f"{part}_{name}"], 4) for name in ("step", "low")))
            codes = self._grouped(b, unpack(b, tensors[part], self.bits))
            whole = b.call(torch.ops.aten.flatten.using_ints, values_of(b, codes, grid), 3, 4)
            entries.append(b.cast(whole, form.dtype))
        return Held(entries[0], entries[1], self.read_states(b, form, tensors))

    def write(self, b: Builder, form: CacheForm, tensors: Mapping[str, Any], left: Left) -> dict[str, Any]:
        """See :class:`Codes`."""
        del form
        made: dict[str, Any] = {}
        for part, new in (("key", left.new_key), ("value", left.new_value)):
            x = self._grouped(b, b.cast(new, torch.float32))
            grid = grid_between(b, b.amin(x, 4, keepdim=True), b.amax(x, 4, keepdim=True), self.bits)
            codes = b.call(torch.ops.aten.flatten.using_ints, round_to(b, x, grid, self.bits), 3, 4)
            fresh = {part: pack(b, codes, self.bits)}
            fresh |= {f"{part}_step": b.squeeze(grid.step, 4), f"{part}_low": b.squeeze(grid.low, 4)}
            made |= {name: left.take(b, b.cat([tensors[name], x], 2)) for name, x in fresh.items()}
        return made | self.write_states(b, left)

    def _grouped(self, b: Builder, x: Any) -> Any:
        """``[B, Hkv, N, D]`` to ``[B, Hkv, N, D / group, group]``."""
        width = int(b.shape(x)[3])
        group = min(self.group, width)
        return b.call(torch.ops.aten.unflatten.int, x, 3, [width // group, group])
