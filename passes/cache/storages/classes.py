"""Entries in two classes of precision, behind a full-precision tail."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from tokcc.ir.builder import Builder
from tokcc.passes.budget import Count
from tokcc.passes.cache.cut import LOWEST, CacheCut
from tokcc.passes.cache.ripening import ripe
from tokcc.passes.cache.rounding import Grid, grid_between, pack, round_to, unpack, values_of
from tokcc.passes.cache.runs import run_of
from tokcc.passes.cache.storage import CacheForm, CacheStorage, Held, Left, Stored

__all__ = ["Classes"]

aten, ops = torch.ops.aten, torch.ops.tokcc
_FAR = 3e38
"""Beyond every number."""
_SMALL = 2.0**-14
"""Least factor of a channel: the smallest normal fp16."""
_Bits = Literal[2, 4, 8]


@dataclass(frozen=True)
class _Class:
    """One of the two.

    Attributes:
        name: Part of the names of its tensors.
        bits: Of a code.
        share: How many entries it takes of a block of `every`.
    """

    name: str
    bits: int
    share: int


class Classes(CacheStorage):
    """Few bits for entries that are attended little, more for the others (ZipCache, arXiv:2405.14256).

    The first call's tokens become one block. What comes later waits in a tail of full precision, of which the oldest
    ``every`` become a block in a call that finds so many, one block a call. In a block each key head has its own two
    classes: the ``rough`` share with the lowest scores, and the rest. A score is the attention that an entry receives
    from probes, the last and evenly spread queries of the call, divided by the number of probes that can see it.

    Keys are on a grid per channel over the block's tokens of a class; values are divided by the square root of their
    channel's largest number in them, and are on a grid per token. Of each class, with ``K`` entries of ``N`` blocks in
    the order of the blocks:

    - ``key``, ``value`` (``key_rough``, ``value_rough``): uint8 ``[B, Hkv, K, D * bits / 8]``, packed as
      :func:`tokcc.passes.cache.rounding.pack` says.
    - ``key_grid``: fp16 ``[B, Hkv, N, 2 D]``: steps, and lowest numbers behind them.
    - ``value_grid``: fp16 ``[B, Hkv, K, 2]``; ``value_scale``: fp16 ``[B, Hkv, N, Dv]``.
    - ``key_real``: uint8 ``[B, 1, K, 1]``: 0 = padding.

    And ``key_tail``, ``value_tail``. Padding has the lowest score and no say in grids; blocks and probes run over
    slots, so that a row behind padding is cut at other tokens, and probed by others, than the same row alone.

    Attributes:
        fine: Bits of entries that matter.
        coarse: Bits of the others.
        rough: Share of the others.
        every: Tokens of a block behind the first.
        probes: Share of a call's last queries that rate, and of the evenly spread ones among the rest.
    """

    kind: ClassVar[str] = "classes"
    evicts: ClassVar[bool] = False

    fine: _Bits = 4
    coarse: _Bits = 2
    rough: float = Field(default=0.4, gt=0, lt=1)
    every: int = Field(default=100, ge=2)
    probes: float = Field(default=0.05, gt=0, le=1)

    def waits(self) -> int:
        """A block."""
        return self.every

    def check(self, form: CacheForm) -> None:
        """See :class:`CacheStorage`."""
        least = 8 // min(self.fine, self.coarse)
        for part, width in (("keys", form.key_width), ("values", form.value_width)):
            if width % least:
                raise ValueError(f"{part} whose width is a multiple of {least}, not {width}")
        if not 0 < self._rough(self.every) < self.every:
            raise ValueError(f"a share of which {self.every} tokens have at least one, and not all")

    @property
    def _both(self) -> tuple[_Class, _Class]:
        """Fine and rough entries; the rough ones are read first."""
        few = self._rough(self.every)
        return _Class("", self.fine, self.every - few), _Class("_rough", self.coarse, few)

    @property
    def _share(self) -> Fraction:
        return Fraction(str(self.rough)).limit_denominator(10_000)

    def _rough(self, count: int) -> int:
        return count * self._share.numerator // self._share.denominator

    def tensors(self, form: CacheForm) -> tuple[Stored, ...]:
        """See :class:`Classes`."""
        heads, widths = form.kv_heads, {"key": form.key_width, "value": form.value_width}
        made = []
        for own in self._both:
            rows = f"entries{own.name}"
            made += [
                Stored(f"{part}{own.name}", heads, width * own.bits // 8, torch.uint8, rows)
                for part, width in widths.items()
            ]
            made += [
                Stored(f"key{own.name}_grid", heads, 2 * form.key_width, torch.float16, "blocks"),
                Stored(f"value{own.name}_grid", heads, 2, torch.float16, rows),
                Stored(f"value{own.name}_scale", heads, form.value_width, torch.float16, "blocks"),
                Stored(f"key{own.name}_real", 1, 1, torch.uint8, rows),
            ]
        return (*made, *(Stored(f"{part}_tail", heads, width, form.dtype, "tail") for part, width in widths.items()))

    def read(self, b: Builder, form: CacheForm, tensors: Mapping[str, Any]) -> Held:
        """See :class:`Classes`."""
        fine, rough = (self._entries(b, form, tensors, own) for own in self._both)
        tail = tensors["key_tail"]
        sizes = [b.size(tail, 0), b.size(tail, 2)]
        key, value = (
            b.cat([*(b.cast(x, form.dtype) for x in pair), tensors[f"{part}_tail"]], 2)
            for part, pair in (("key", (rough[0], fine[0])), ("value", (rough[1], fine[1])))
        )
        return Held(key, value, real=b.cat([rough[2], fine[2], b.full(sizes, True, torch.bool, tail)], 1))

    def _entries(self, b: Builder, form: CacheForm, tensors: Mapping[str, Any], own: _Class) -> tuple[Any, Any, Any]:
        """Return keys, values and which are no padding, of one class."""
        packed, grids = tensors[f"key{own.name}"], tensors[f"key{own.name}_grid"]
        count, blocks = b.size(packed, 2), b.size(grids, 2)
        # Blocks behind the first are equally long: entry i is in block (i - first + share) // share, or the first.
        shift = b.sub_sizes(b.mul_sizes(blocks, own.share), count)
        place = b.call(aten.add.Scalar, b.arange(count, packed), shift)
        block = b.clamp_min(b.call(aten.floor_divide.default, place, own.share), 0)
        grid = self._split(b, b.call(aten.index_select.default, grids, 2, block), form.key_width)
        key = values_of(b, unpack(b, packed, own.bits), grid)
        value = values_of(
            b, unpack(b, tensors[f"value{own.name}"], own.bits), self._split(b, tensors[f"value{own.name}_grid"], 1)
        )
        scale = b.call(aten.index_select.default, tensors[f"value{own.name}_scale"], 2, block)
        real = b.call(aten.flatten.using_ints, tensors[f"key{own.name}_real"], 1, 3)
        return key, b.mul(value, b.cast(scale, torch.float32)), b.compare("gt", real, 0)

    def _split(self, b: Builder, grid: Any, width: int) -> Grid:
        return Grid(b.slice(grid, 3, 0, width), b.slice(grid, 3, width, None))

    def write(self, b: Builder, form: CacheForm, tensors: Mapping[str, Any], left: Left) -> dict[str, Any]:
        """See :class:`Classes`."""
        assert left.cut is not None
        block = ripe(b, left, tensors["key_tail"], self.every)
        count, start, stop = block.count, block.start, block.stop
        blocks = b.min_sizes(count, 1)
        real = run_of(b, left.real, 1, start, stop)  # [B, F]
        score = run_of(b, self._score(b, left.cut), 2, start, stop)
        score = b.where(b.unsqueeze(real, 1), score, LOWEST)
        few = b.floordiv_sizes(b.mul_sizes(count, self._share.numerator), self._share.denominator)
        chosen = b.call(ops.retain_slots.default, score, b.sub_sizes(count, few))  # [B, Hkv, F - few]
        others = b.scatter(b.full(self._sizes(b, score), 1.0, torch.float32, score), 2, chosen, self._zeros(b, chosen))
        indices = {"": chosen, "_rough": b.call(ops.retain_slots.default, others, few)}
        made: dict[str, Any] = {}
        full = {}
        for part, new in (("key", left.new_key), ("value", left.new_value)):
            x = b.cat([tensors[f"{part}_tail"], new], 2)
            made[f"{part}_tail"] = run_of(b, x, 2, count, None)
            full[part] = b.cast(run_of(b, x, 2, 0, count), torch.float32)
        for own in self._both:
            index = indices[own.name]
            # Padding is the same in all heads.
            known = b.call(ops.gather_slots.default, b.unsqueeze(real, 1), b.slice(index, 1, 0, 1))
            fresh = self._keys(b, own, b.call(ops.gather_slots.default, full["key"], index), known, blocks)
            fresh |= self._values(b, own, b.call(ops.gather_slots.default, full["value"], index), known, blocks)
            fresh[f"key{own.name}_real"] = b.unsqueeze(b.cast(known, torch.uint8), 3)
            made |= {name: b.cat([tensors[name], x], 2) for name, x in fresh.items()}
        return made

    def _keys(self, b: Builder, own: _Class, key: Any, real: Any, blocks: Any) -> dict[str, Any]:
        """Round keys fp32 ``[B, Hkv, K, D]`` per channel."""
        low, high = self._bounds(b, key, real)
        some = b.compare("le", low, high)
        grid = grid_between(b, b.where(some, low, 0.0), b.where(some, high, 0.0), own.bits)
        codes = pack(b, round_to(b, key, grid, own.bits), own.bits)
        both = run_of(b, b.cat([grid.step, grid.low], 3), 2, 0, blocks)
        return {f"key{own.name}": codes, f"key{own.name}_grid": both}

    def _values(self, b: Builder, own: _Class, value: Any, real: Any, blocks: Any) -> dict[str, Any]:
        """Round values fp32 ``[B, Hkv, K, Dv]`` per token."""
        _, high = self._bounds(b, b.call(aten.abs.default, value), real)
        scale = b.cast(b.clamp_min(b.sqrt(b.clamp_min(high, 0.0)), _SMALL), torch.float16)  # [B, Hkv, 1, Dv]
        value = b.div(value, b.cast(scale, torch.float32))
        grid = grid_between(b, b.amin(value, 3, keepdim=True), b.amax(value, 3, keepdim=True), own.bits)
        return {
            f"value{own.name}": pack(b, round_to(b, value, grid, own.bits), own.bits),
            f"value{own.name}_grid": b.cat([grid.step, grid.low], 3),
            f"value{own.name}_scale": run_of(b, scale, 2, 0, blocks),
        }

    def _bounds(self, b: Builder, x: Any, real: Any) -> tuple[Any, Any]:
        """Return the least and largest number of each channel, ``[B, Hkv, 1, D]``; crossed where there is no token."""
        kept = b.unsqueeze(real, 3)
        row = [b.size(x, 0), int(b.shape(x)[1]), 1, int(b.shape(x)[3])]
        # One more row: there may be no token at all.
        low, high = (b.cat([b.where(kept, x, far), b.full(row, far, torch.float32, x)], 2) for far in (_FAR, -_FAR))
        return b.amin(low, 2, keepdim=True), b.amax(high, 2, keepdim=True)

    def _score(self, b: Builder, cut: CacheCut) -> Any:
        """Return the mean attention of the probes that see a slot, fp32 ``[B, Hkv, L]``."""
        if isinstance(cut.new, int) and cut.new == 1:
            return cut.received
        share = Fraction(str(self.probes)).limit_denominator(10_000)
        most = Count("share", share, "ceil").kept(b, cut.new, cut.new)
        # A single token is its own probe, and what it attends to is known: then there are none here.
        many = b.min_sizes(b.sub_sizes(cut.new, 1), 1)
        last = b.mul_sizes(most, many)
        spread = b.arange(b.mul_sizes(b.sub_sizes(cut.new, most), many), cut.key, step=round(1 / self.probes))
        newest = b.arange(cut.new, cut.key, start=b.sub_sizes(cut.new, last))
        tokens = b.cat([spread, newest], 0)
        own = cut.slots_of(tokens)
        real = b.cast(b.call(aten.index_select.default, cut.real, 1, own), torch.float32)  # [B, R]
        probs = b.sum(cut.probs_at(tokens), 2)  # [B, Hkv, R, L]
        received = b.sum(b.mul(probs, b.unsqueeze(b.unsqueeze(real, 1), 3)), 2)
        sees = b.cast(b.compare("le", cut.slots(), b.unsqueeze(own, 1)), torch.float32)  # [R, L]
        number = b.clamp_min(b.sum(b.mul(b.unsqueeze(real, 2), sees), 1, keepdim=True), 1.0)  # [B, 1, L]
        few = b.compare("lt", b.amax(b.arange(cut.new, cut.key), 0, keepdim=True), 1)  # S = 1
        return b.where(few, cut.received, b.div(received, number))

    def _sizes(self, b: Builder, score: Any) -> list[Any]:
        return [b.size(score, 0), int(b.shape(score)[1]), b.size(score, 2)]

    def _zeros(self, b: Builder, index: Any) -> Any:
        return b.full(self._sizes(b, index), 0.0, torch.float32, index)
