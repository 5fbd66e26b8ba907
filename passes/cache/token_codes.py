"""Codes of single tokens, in groups of channels: a token knows nothing of its neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tokcc.ir.builder import Builder
from tokcc.passes.cache.rounding import Grid, grid_between, pack, round_to, unpack, values_of
from tokcc.passes.cache.storage import CacheForm, Stored

__all__ = ["TokenCodes", "token_codes"]

aten = torch.ops.aten


@dataclass(frozen=True)
class TokenCodes:
    """How keys or values are held: each group of channels on a grid from its least to its largest number.

    Attributes:
        name: Of the codes, uint8 ``[B, heads, N, width * bits / 8]``, packed as
            :func:`tokcc.passes.cache.rounding.pack` says; ``<name>_step`` and ``<name>_low`` are fp16
            ``[B, heads, N, width / group]``.
        heads: Of them.
        width: Channels.
        bits: Of a code.
        group: Channels of a group.
        rows: What is counted along N, as in :class:`tokcc.passes.cache.storage.Stored`.
    """

    name: str
    heads: int
    width: int
    bits: int
    group: int
    rows: str

    def tensors(self) -> tuple[Stored, Stored, Stored]:
        """Return what travels: codes, steps, lowest numbers."""
        groups = self.width // self.group
        return (
            Stored(self.name, self.heads, self.width * self.bits // 8, torch.uint8, self.rows),
            Stored(f"{self.name}_step", self.heads, groups, torch.float16, self.rows),
            Stored(f"{self.name}_low", self.heads, groups, torch.float16, self.rows),
        )

    def read(self, b: Builder, tensors: Mapping[str, Any]) -> Any:
        """Return the fp32 numbers that the tensors hold, ``[B, heads, N, width]``."""
        grid = Grid(*(b.unsqueeze(tensors[f"{self.name}_{part}"], 4) for part in ("step", "low")))
        codes = self._grouped(b, unpack(b, tensors[self.name], self.bits))
        return b.call(aten.flatten.using_ints, values_of(b, codes, grid), 3, 4)

    def write(self, b: Builder, x: Any) -> dict[str, Any]:
        """Return the tensors that hold ``[B, heads, N, width]``."""
        x = self._grouped(b, b.cast(x, torch.float32))
        grid = grid_between(b, b.amin(x, 4, keepdim=True), b.amax(x, 4, keepdim=True), self.bits)
        codes = b.call(aten.flatten.using_ints, round_to(b, x, grid, self.bits), 3, 4)
        return {
            self.name: pack(b, codes, self.bits),
            f"{self.name}_step": b.squeeze(grid.step, 4),
            f"{self.name}_low": b.squeeze(grid.low, 4),
        }

    def _grouped(self, b: Builder, x: Any) -> Any:
        """``[B, heads, N, width]`` to ``[B, heads, N, width / group, group]``."""
        return b.call(aten.unflatten.int, x, 3, [self.width // self.group, self.group])


def token_codes(
    form: CacheForm, bits: int, group: int, suffix: str = "", rows: str = "slots"
) -> tuple[TokenCodes, TokenCodes]:
    """Return the codes of keys and of values.

    Args:
        form: What has to be held.
        bits: Of a code.
        group: Channels of a group; all of them where a head is narrower.
        suffix: Behind `key` and `value`.
        rows: What is counted.

    Raises:
        ValueError: Says which width would do.
    """
    widths = {"key": form.key_width, "value": form.value_width}
    for part, width in widths.items():
        if width % min(group, width):
            raise ValueError(f"{part}s whose width is a multiple of {group}, not {width}; or another `group`")
        if width * bits % 8:
            least = "an even width" if bits == 4 else f"a width that is a multiple of {8 // bits}"
            raise ValueError(f"{part}s of {least}, not {width}, for {bits} bits")
    key, value = (
        TokenCodes(f"{part}{suffix}", form.kv_heads, width, bits, min(group, width), rows)
        for part, width in widths.items()
    )
    return key, value
