"""Entries in classes of 16, 8, 4 and 2 bits in fixed quotas, behind a full-precision tail."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator

from tokcc.ir.builder import Builder
from tokcc.passes.cache.cut import LOWEST
from tokcc.passes.cache.ripening import ripe
from tokcc.passes.cache.runs import run_of
from tokcc.passes.cache.storage import CacheForm, CacheStorage, Held, Left, Stored
from tokcc.passes.cache.token_codes import TokenCodes, token_codes

__all__ = ["Quotas"]

aten, ops = torch.ops.aten, torch.ops.tokcc
_BITS = (16, 8, 4, 2)
_TAKEN = 3 * LOWEST
_LARGEST = 65504.0
"""Of fp16."""


class Quotas(CacheStorage):
    """More bits for tokens that are rated higher (after Don't Waste Bits; the quotas are ours).

    A token is rated once, in the call that brings it, by the step's `score`. The first call's tokens become one block;
    later ones wait in a tail of full precision, of which the oldest ``every`` become a block in a call that finds so
    many, one block a call. Of a block's ``F`` tokens the best ``floor(F * share_16)`` get 16 bits, the next ones 8 and
    4, the rest 2: all key heads of a layer hold a token in the same class.

    16 bits: ``key``, ``value`` as fp16, or the model's own 16 bits. Others: ``key_8``, ``key_8_step``, ... as
    :class:`tokcc.passes.cache.token_codes.TokenCodes` says, each token on its own grid. ``key_real`` (``key_8_real``,
    ...): uint8 ``[B, 1, K, 1]``, 0 = padding, which is rated last. What waits: ``key_tail``, ``value_tail``, and
    ``key_tail_rating``, fp32 ``[B, 1, waiting, 1]``.

    Attributes:
        share_16: Share of a block with 16 bits.
        share_8: With 8.
        share_4: With 4; the rest has 2.
        every: Tokens of a block behind the first.
        group: Channels on one grid.
    """

    kind: ClassVar[str] = "quotas"
    evicts: ClassVar[bool] = False
    rated: ClassVar[bool] = True

    share_16: float = Field(default=0.1, ge=0, le=1)
    share_8: float = Field(default=0.2, ge=0, le=1)
    share_4: float = Field(default=0.4, ge=0, le=1)
    every: int = Field(default=100, ge=2)
    group: int = Field(default=64, ge=2)

    @model_validator(mode="after")
    def _at_most_all(self) -> Self:
        if sum(self._shares) > 1:
            raise ValueError("the shares are more than all tokens")
        return self

    @property
    def _shares(self) -> tuple[Fraction, ...]:
        shares = (self.share_16, self.share_8, self.share_4)
        return tuple(Fraction(str(share)).limit_denominator(10_000) for share in shares)

    def waits(self) -> int:
        """A block."""
        return self.every

    def check(self, form: CacheForm) -> None:
        """See :class:`CacheStorage`."""
        for bits in _BITS[1:]:
            self._codes(form, bits)

    def _codes(self, form: CacheForm, bits: int) -> tuple[TokenCodes, TokenCodes]:
        return token_codes(form, bits, self.group, _suffix(bits), f"entries_{bits}")

    def tensors(self, form: CacheForm) -> tuple[Stored, ...]:
        """See :class:`Quotas`."""
        heads, widths = form.kv_heads, {"key": form.key_width, "value": form.value_width}
        made = [Stored(part, heads, width, _half(form), "entries_16") for part, width in widths.items()]
        for bits in _BITS[1:]:
            made += [stored for part in self._codes(form, bits) for stored in part.tensors()]
        made += [Stored(f"key{_suffix(bits)}_real", 1, 1, torch.uint8, f"entries_{bits}") for bits in _BITS]
        made += [Stored(f"{part}_tail", heads, width, form.dtype, "tail") for part, width in widths.items()]
        return (*made, Stored("key_tail_rating", 1, 1, torch.float32, "tail"))

    def read(self, b: Builder, form: CacheForm, tensors: Mapping[str, Any]) -> Held:
        """See :class:`Quotas`."""
        keys, values, real = [tensors["key"]], [tensors["value"]], []
        for bits in _BITS[1:]:
            key, value = (part.read(b, tensors) for part in self._codes(form, bits))
            keys.append(key)
            values.append(value)
        for bits in _BITS:
            flags = b.call(aten.flatten.using_ints, tensors[f"key{_suffix(bits)}_real"], 1, 3)
            real.append(b.compare("gt", flags, 0))
        tail = tensors["key_tail"]
        real.append(b.full([b.size(tail, 0), b.size(tail, 2)], True, torch.bool, tail))
        key, value = (
            b.cat([*(b.cast(x, form.dtype) for x in parts), tensors[f"{name}_tail"]], 2)
            for name, parts in (("key", keys), ("value", values))
        )
        return Held(key, value, real=b.cat(real, 1))

    def write(self, b: Builder, form: CacheForm, tensors: Mapping[str, Any], left: Left) -> dict[str, Any]:
        """See :class:`Quotas`."""
        block = ripe(b, left, tensors["key_tail"], self.every)
        waiting = {
            "key": b.cat([tensors["key_tail"], left.new_key], 2),
            "value": b.cat([tensors["value_tail"], left.new_value], 2),
            "rating": b.cat([b.call(aten.select.int, tensors["key_tail_rating"], 3, 0), left.rating], 2),
        }
        rest = {part: run_of(b, x, 2, block.count, None) for part, x in waiting.items()}
        made = {f"{part}_tail": rest[part] for part in ("key", "value")}
        made["key_tail_rating"] = b.unsqueeze(rest["rating"], 3)
        ripened = {part: run_of(b, x, 2, 0, block.count) for part, x in waiting.items()}
        real = b.unsqueeze(run_of(b, left.real, 1, block.start, block.stop), 1)  # [B, 1, F]
        for bits, index in self._chosen(b, b.where(real, ripened["rating"], LOWEST), block.count).items():
            fresh = {f"key{_suffix(bits)}_real": b.unsqueeze(b.cast(_taken(b, real, index), torch.uint8), 3)}
            for number, part in enumerate(("key", "value")):
                heads = b.expand(index, [-1, form.kv_heads, -1])
                entries = b.cast(_taken(b, ripened[part], heads), torch.float32)
                if bits == 16:
                    bounded = b.call(aten.clamp.default, entries, -_LARGEST, _LARGEST)
                    fresh[part] = b.cast(bounded, _half(form))
                else:
                    fresh |= self._codes(form, bits)[number].write(b, entries)
            made |= {name: b.cat([tensors[name], x], 2) for name, x in fresh.items()}
        return made

    def _chosen(self, b: Builder, rating: Any, count: Any) -> dict[int, Any]:
        """Return the tokens of each class, int64 ``[B, 1, n]``, of ratings ``[B, 1, F]``."""
        made, rest = {}, count
        for bits, share in zip(_BITS, self._shares, strict=False):
            few = b.floordiv_sizes(b.mul_sizes(count, share.numerator), share.denominator)
            made[bits] = index = b.call(ops.retain_slots.default, rating, few)
            gone = b.full([b.size(index, 0), 1, b.size(index, 2)], _TAKEN, torch.float32, rating)
            rating = b.scatter(rating, 2, index, gone)
            rest = b.sub_sizes(rest, few)
        made[_BITS[-1]] = b.call(ops.retain_slots.default, rating, rest)
        return made


def _suffix(bits: int) -> str:
    return "" if bits == 16 else f"_{bits}"


def _half(form: CacheForm) -> torch.dtype:
    return form.dtype if form.dtype.itemsize == 2 else torch.float16


def _taken(b: Builder, x: Any, index: Any) -> Any:
    return b.call(ops.gather_slots.default, x, index)
