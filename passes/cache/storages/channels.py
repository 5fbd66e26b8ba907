"""Keys of the prompt with fewer channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.ir.builder import Builder
from tokcc.passes.cache.runs import run_of
from tokcc.passes.cache.storage import CacheForm, CacheStorage, Held, Left, Stored

__all__ = ["Channels"]

ops = torch.ops.tokcc


class Channels(CacheStorage):
    """The channels that matter most, of all keys of the first call but its last ones (ThinK, arXiv:2407.21018).

    A channel's rating is the mean of its squares in the last queries, over all query heads of a group, times the mean
    of its squares in the keys. It is made in the first call and stays: what is generated, and text that follows, keeps
    all channels. A channel that is not held reads as zero, and the logits keep their scale.

    - ``key``: ``[B, Hkv, P1, D']``; ``key_recent``: ``[B, Hkv, P2, D]``, behind it.
    - ``key_channels``: int64 ``[B, Hkv, 1, D']``, ascending; zeros before the first call.
    - ``value``: ``[B, Hkv, P1 + P2, Dv]``.

    Attributes:
        dropped: Share of the channels.
        recent: Last tokens of the first call that keep all channels.
        window: Last queries of the first call that rate.
    """

    kind: ClassVar[str] = "channels"
    evicts: ClassVar[bool] = False

    dropped: float = Field(default=0.4, gt=0, lt=1)
    recent: int = Field(default=32, ge=0)
    window: int = Field(default=32, ge=1)

    def waits(self) -> int:
        """The recent tokens."""
        return self.recent

    def check(self, form: CacheForm) -> None:
        """See :class:`CacheStorage`."""
        if self._kept(form) == form.key_width:
            raise ValueError(f"a share of which {form.key_width} channels have at least one")

    def tensors(self, form: CacheForm) -> tuple[Stored, ...]:
        """See :class:`Channels`."""
        heads, kept = form.kv_heads, self._kept(form)
        return (
            Stored("key", heads, kept, form.dtype, "pruned"),
            Stored("value", heads, form.value_width, form.dtype),
            Stored("key_recent", heads, form.key_width, form.dtype, "recent"),
            Stored("key_channels", heads, kept, torch.int64, fixed=1),
        )

    def read(self, b: Builder, form: CacheForm, tensors: Mapping[str, Any]) -> Held:
        """See :class:`Channels`."""
        pruned = b.transpose(tensors["key"], 2, 3)  # [B, Hkv, D', P1]
        sizes = [b.size(pruned, 0), form.kv_heads, 1, b.size(pruned, 3)]
        rows = b.cat([b.full(sizes, 0.0, form.dtype, pruned), pruned], 2)
        channel = b.unsqueeze(b.arange(form.key_width, pruned), 1)  # [D, 1]
        here = b.cast(b.compare("eq", channel, tensors["key_channels"]), torch.int64)  # [B, Hkv, D, D']
        # 1 + its place among those that are held; 0 = the row of zeros.
        place = b.sum(b.mul(here, b.arange(self._kept(form) + 1, pruned, start=1)), 3)
        whole = b.transpose(b.call(ops.gather_slots.default, rows, place), 2, 3)
        return Held(b.cat([whole, tensors["key_recent"]], 2), tensors["value"])

    def write(self, b: Builder, form: CacheForm, tensors: Mapping[str, Any], left: Left) -> dict[str, Any]:
        """See :class:`Channels`."""
        first = b.sub_sizes(1, b.min_sizes(left.past, 1))
        count = b.mul_sizes(b.max_sizes(b.sub_sizes(left.new, self.recent), 0), first)
        chosen = b.call(ops.retain_slots.default, self._rating(b, form, left), self._kept(form))  # [B, Hkv, D']
        # A size as a tensor: the last of 0, ..., P.
        past = b.amax(b.arange(b.add_sizes(left.past, 1), left.new_key), 0, keepdim=True)
        known = b.call(torch.ops.aten.select.int, tensors["key_channels"], 2, 0)
        channels = b.where(b.compare("eq", past, 0), chosen, known)
        old = b.transpose(run_of(b, left.new_key, 2, 0, count), 2, 3)
        pruned = b.transpose(b.call(ops.gather_slots.default, old, channels), 2, 3)
        return {
            "key": b.cat([tensors["key"], pruned], 2),
            "value": left.value,
            "key_recent": b.cat([tensors["key_recent"], run_of(b, left.new_key, 2, count, None)], 2),
            "key_channels": b.unsqueeze(channels, 2),
        }

    def _kept(self, form: CacheForm) -> int:
        return form.key_width - int(self.dropped * form.key_width)

    def _rating(self, b: Builder, form: CacheForm, left: Left) -> Any:
        """Return the rating of every channel, fp32 ``[B, Hkv, D]``; sums over a row order its channels as means do."""
        assert left.cut is not None
        query = b.cast(b.call(torch.ops.aten.unflatten.int, left.cut.query, 1, [form.kv_heads, -1]), torch.float32)
        real = b.cast(b.slice(left.real, 1, left.past, None), torch.float32)  # [B, S]
        real = b.unsqueeze(b.unsqueeze(real, 1), 3)  # [B, 1, S, 1]
        last = b.sub_sizes(left.new, b.min_sizes(left.new, self.window))
        asked = b.mul(b.sum(b.mul(query, query), 2), real)  # [B, Hkv, S, D]
        asked = b.sum(b.slice(asked, 2, last, None), 2)
        key = b.cast(left.new_key, torch.float32)
        return b.mul(asked, b.sum(b.mul(b.mul(key, key), real), 2))
