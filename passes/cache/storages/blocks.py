"""Old entries as codes in blocks of tokens, the newest ones as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from tokcc.ir.builder import Builder
from tokcc.passes.cache.rounding import Grid, grid_between, pack, round_to, unpack, values_of
from tokcc.passes.cache.runs import run_of
from tokcc.passes.cache.storage import CacheForm, CacheStorage, Held, Left, Stored

__all__ = ["Blocks"]

aten = torch.ops.aten
_FAR = 3e38
"""Beyond every number."""
_SHORT = 2.0**-14
"""Least length of a key: the smallest normal fp16."""


class Blocks(CacheStorage):
    """Keys on a grid per channel over ``group`` tokens, values on one per token over ``group`` channels.

    Keys are spread over all channels by a Hadamard matrix, and divided by the length that a token's keys have over all
    heads; values are spread likewise (OScaR, arXiv:2605.19660; without both it is the scheme of KIVI,
    arXiv:2402.02750). New entries wait in a tail of full precision; when it has ``tail`` tokens or more, as many times
    ``tail`` as it holds are rounded, once and for all.

    With ``g`` tokens in a block, ``N`` blocks and ``T`` tokens in the tail:

    - ``key``, ``value``: uint8 ``[B, Hkv, N, g * D * bits / 8]``: token after token, each packed as
      :func:`tokcc.passes.cache.rounding.pack` says.
    - ``key_step``, ``key_low``: fp16 ``[B, Hkv, N, D]``.
    - ``value_step``, ``value_low``: fp16 ``[B, Hkv, N, g * Dv / min(g, Dv)]``.
    - ``key_length``: fp16 ``[B, 1, N, g]``.
    - ``key_tail``, ``value_tail``: ``[B, Hkv, T, D]``.

    Blocks run over slots, padding in front included, which has no say in a grid. So a row behind padding is cut into
    blocks at other tokens than the same row alone, and its rounding differs.

    Attributes:
        bits: Of a code.
        group: Tokens of a block of keys; channels of a group of values, all of them where a head is narrower.
        tail: Tokens that are rounded at a time, a multiple of ``group``.
        spread: Multiply by a Hadamard matrix.
        scaled: Divide keys by their length.
    """

    kind: ClassVar[str] = "blocks"
    evicts: ClassVar[bool] = False

    bits: Literal[2, 4, 8] = 2
    group: int = Field(default=32, ge=1)
    tail: int = Field(default=128, ge=1)
    spread: bool = True
    scaled: bool = True

    @model_validator(mode="after")
    def _whole_blocks(self) -> Blocks:
        if self.tail % self.group:
            raise ValueError(f"`tail` is a multiple of `group`, {self.group}")
        return self

    def check(self, form: CacheForm) -> None:
        """See :class:`CacheStorage`."""
        for part, width in (("keys", form.key_width), ("values", form.value_width)):
            if self.spread and width & (width - 1):
                raise ValueError(f"{part} whose width is a power of two, not {width}; or `spread: false`")
            if width * self.bits % 8:
                raise ValueError(f"{part} whose width is a multiple of {8 // self.bits}, not {width}")
        channels = min(self.group, form.value_width)
        if form.value_width % channels:
            raise ValueError(f"values whose width is a multiple of {channels}, not {form.value_width}")

    def basis(self, form: CacheForm) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Hadamard matrices of length one: the logits stay what they are."""
        return (_hadamard(form.key_width), _hadamard(form.value_width)) if self.spread else None

    def waits(self) -> int:
        """The tail."""
        return self.tail

    def tensors(self, form: CacheForm) -> tuple[Stored, ...]:
        """See :class:`Blocks`."""
        heads, key, value = form.kv_heads, form.key_width, form.value_width
        groups = self.group * (value // min(self.group, value))
        packed = [
            Stored(part, heads, self.group * width * self.bits // 8, torch.uint8, "blocks")
            for part, width in (("key", key), ("value", value))
        ]
        grids = [
            Stored(f"{part}_{name}", heads, width, torch.float16, "blocks")
            for part, width in (("key", key), ("value", groups))
            for name in ("step", "low")
        ]
        length = [Stored("key_length", 1, self.group, torch.float16, "blocks")] if self.scaled else []
        tails = [
            Stored(f"{part}_tail", heads, width, form.dtype, "tail") for part, width in (("key", key), ("value", value))
        ]
        return (*packed, *grids, *length, *tails)

    def read(self, b: Builder, form: CacheForm, tensors: Mapping[str, Any]) -> Held:
        """See :class:`Blocks`."""
        key = values_of(b, self._codes(b, tensors["key"]), Grid(*(b.unsqueeze(x, 3) for x in _grid(tensors, "key"))))
        if self.scaled:
            key = b.mul(key, b.unsqueeze(b.cast(tensors["key_length"], torch.float32), 4))
        grid = Grid(*(self._by_group(b, x, form.value_width) for x in _grid(tensors, "value")))
        codes = self._split(b, self._codes(b, tensors["value"]))
        value = b.call(aten.flatten.using_ints, values_of(b, codes, grid), 4, 5)
        both = []
        for part, x in (("key", key), ("value", value)):
            old = b.cast(b.call(aten.flatten.using_ints, x, 2, 3), form.dtype)  # [B, Hkv, N * g, D]
            both.append(b.cat([old, tensors[f"{part}_tail"]], 2))
        return Held(both[0], both[1])

    def write(self, b: Builder, form: CacheForm, tensors: Mapping[str, Any], left: Left) -> dict[str, Any]:
        """See :class:`Blocks`."""
        del form
        waiting = {
            "key": b.cat([tensors["key_tail"], left.new_key], 2),
            "value": b.cat([tensors["value_tail"], left.new_value], 2),
        }
        times = b.floordiv_sizes(b.add_sizes(b.size(tensors["key_tail"], 2), left.new), self.tail)
        count, blocks = b.mul_sizes(times, self.tail), b.mul_sizes(times, self.tail // self.group)
        made: dict[str, Any] = {f"{part}_tail": run_of(b, x, 2, count, None) for part, x in waiting.items()}
        fresh: dict[str, Any] = {}
        for part, x in waiting.items():
            heads, width = int(b.shape(x)[1]), int(b.shape(x)[3])
            full = b.cast(run_of(b, x, 2, 0, count), torch.float32)
            full = b.reshape(full, [b.size(x, 0), heads, blocks, self.group, width])
            fresh |= self._keys(b, full, self._real(b, tensors, left, count, blocks)) if part == "key" else {}
            fresh |= self._values(b, full) if part == "value" else {}
        return made | {name: b.cat([tensors[name], x], 2) for name, x in fresh.items()}

    def _keys(self, b: Builder, key: Any, real: Any) -> dict[str, Any]:
        """Round keys fp32 ``[B, Hkv, n, g, D]`` per channel; ``real`` is bool ``[B, 1, n, g, 1]``."""
        made = {}
        if self.scaled:
            squares = b.sum(b.sum(b.mul(key, key), 4, keepdim=True), 1, keepdim=True)  # [B, 1, n, g, 1]
            length = b.cast(b.clamp_min(b.sqrt(squares), _SHORT), torch.float16)
            key = b.div(key, b.cast(length, torch.float32))
            made["key_length"] = b.squeeze(length, 4)
        low = b.amin(b.where(real, key, _FAR), 3, keepdim=True)
        high = b.amax(b.where(real, key, -_FAR), 3, keepdim=True)
        some = b.compare("le", low, high)  # a block of padding has no grid
        grid = grid_between(b, b.where(some, low, 0.0), b.where(some, high, 0.0), self.bits)
        made |= self._packed(b, "key", round_to(b, key, grid, self.bits))
        return made | {"key_step": b.squeeze(grid.step, 3), "key_low": b.squeeze(grid.low, 3)}

    def _values(self, b: Builder, value: Any) -> dict[str, Any]:
        """Round values fp32 ``[B, Hkv, n, g, Dv]`` per token."""
        split = self._split(b, value)
        grid = grid_between(b, b.amin(split, 5, keepdim=True), b.amax(split, 5, keepdim=True), self.bits)
        codes = b.call(aten.flatten.using_ints, round_to(b, split, grid, self.bits), 4, 5)
        step, low = (b.call(aten.flatten.using_ints, x, 3, 5) for x in (grid.step, grid.low))
        return self._packed(b, "value", codes) | {"value_step": step, "value_low": low}

    def _real(self, b: Builder, tensors: Mapping[str, Any], left: Left, count: Any, blocks: Any) -> Any:
        """Return which of the rounded slots are not padding, bool ``[B, 1, n, g, 1]``."""
        first = b.mul_sizes(b.size(tensors["key"], 2), self.group)
        real = run_of(b, left.real, 1, first, b.add_sizes(first, count))
        return b.reshape(real, [b.size(left.real, 0), 1, blocks, self.group, 1])

    def _packed(self, b: Builder, part: str, codes: Any) -> dict[str, Any]:
        return {part: b.call(aten.flatten.using_ints, pack(b, codes, self.bits), 3, 4)}

    def _codes(self, b: Builder, packed: Any) -> Any:
        """Return codes fp32 ``[B, Hkv, N, g, D]``."""
        width = int(b.shape(packed)[3]) // self.group
        return unpack(b, b.call(aten.unflatten.int, packed, 3, [self.group, width]), self.bits)

    def _split(self, b: Builder, x: Any) -> Any:
        """``[B, Hkv, n, g, Dv]`` to ``[B, Hkv, n, g, groups, channels]``."""
        width = int(b.shape(x)[4])
        channels = min(self.group, width)
        return b.call(aten.unflatten.int, x, 4, [width // channels, channels])

    def _by_group(self, b: Builder, x: Any, width: int) -> Any:
        """``[B, Hkv, N, g * groups]`` to ``[B, Hkv, N, g, groups, 1]``."""
        return b.call(aten.unflatten.int, x, 3, [self.group, width // min(self.group, width), 1])


def _grid(tensors: Mapping[str, Any], part: str) -> tuple[Any, Any]:
    return tensors[f"{part}_step"], tensors[f"{part}_low"]


def _hadamard(size: int) -> torch.Tensor:
    """Return Sylvester's matrix with rows of length one; it is its own inverse."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return torch.mul(matrix, size**-0.5)
