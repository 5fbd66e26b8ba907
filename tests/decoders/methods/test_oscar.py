"""Two-bit blocks behind a tail: Hadamard matrix, lengths, grids, and when what is rounded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.decoders.engine import build, tokens
from tests.decoders.held import Array, Entries, assert_equals_held, assert_near, assert_on_grid
from tests.decoders.methods.test_agent_memory_q4 import unpacked
from tests.decoders.tiny import program_of
from tokcc.analysis.cache_sites import cache_sites
from tokcc.config import load_policy
from tokcc.errors import PlanError, PolicyError
from tokcc.passes.cache.planning import make_cache_plan
from tokcc.passes.cache.storage import CacheForm
from tokcc.passes.cache.storages.blocks import Blocks
from tokcc.passes.methods import library


def policy(*others: Mapping[str, Any], **given: Any) -> dict[str, Any]:
    return {"version": 1, "name": "oscar", "steps": [*others, {"preset": "oscar", **given}]}


def hadamard(size: int) -> Array:
    rows = [[(-1) ** (i & j).bit_count() / math.sqrt(size) for j in range(size)] for i in range(size)]
    return np.array(rows)


class BlockReader:
    """Reads blocks of tokens and the tail behind them."""

    def __init__(self, bits: int, group: int, tail: int, *, plain: bool = False) -> None:
        self.bits, self.group, self.tail, self.plain = bits, group, tail, plain

    def __call__(self, held: Mapping[str, Array], entries: Entries) -> tuple[Array, Array]:
        total = entries.padding + entries.key.shape[1]
        # By slots: whole multiples of `tail` are rounded, the rest waits.
        done = total // self.tail * self.tail
        before = (total - int(entries.fresh[0].sum())) // self.tail * self.tail
        assert held["key"].shape[1] == held["value"].shape[1] == done // self.group
        assert held["key_tail"].shape[1] == held["value_tail"].shape[1] == total - done
        key = self.keys(held, entries, before, done)
        return key, self.values(held, entries, before, done)

    def spread(self, exact: Array, padding: int) -> Array:
        """Entries by slot in the basis in which they are held; NaN = padding."""
        turned = exact if self.plain else exact @ hadamard(exact.shape[2])
        return np.concatenate([np.full((len(exact), padding, exact.shape[2]), np.nan), turned], 1)

    def back(self, slots: Array, padding: int) -> Array:
        own = slots[:, padding:]
        return own if self.plain else own @ hadamard(own.shape[2]).T

    def keys(self, held: Mapping[str, Array], entries: Entries, before: int, done: int) -> Array:
        exact = self.spread(entries.key, entries.padding)
        heads, _, width = exact.shape
        made = exact.copy()
        for block in range(done // self.group):
            codes = unpacked(held["key"][:, block].reshape(heads, self.group, -1), self.bits)  # [Hkv, g, D]
            step, low = (held[f"key_{name}"][:, block].astype(np.float64) for name in ("step", "low"))  # [Hkv, D]
            slots = range(block * self.group, (block + 1) * self.group)
            lengths = np.ones(self.group)
            for i, slot in enumerate(slots):
                if not self.plain:
                    lengths[i] = float(held["key_length"][0, block, i])
                for head in range(heads):
                    for channel in range(width):
                        number = codes[head, i, channel] * step[head, channel] + low[head, channel]
                        made[head, slot, channel] = number * lengths[i]
            if block * self.group < before:
                continue
            for i, slot in enumerate(slots):
                wanted = math.sqrt(float((exact[:, slot] ** 2).sum()))
                if slot >= entries.padding and not self.plain:
                    assert abs(lengths[i] - wanted) <= (2.0**-11 + 1e-5) * wanted
            for head in range(heads):
                columns = (exact[head, slots] / lengths[:, None]).T  # [D, g]
                assert_on_grid(columns, step[head], low[head], codes[head].T, self.bits, what=f"keys {block}")
        self.check(made, exact, held["key_tail"], before, done, entries.padding)
        return self.settled(made, exact, entries, done)

    def values(self, held: Mapping[str, Array], entries: Entries, before: int, done: int) -> Array:
        exact = self.spread(entries.value, entries.padding)
        heads, _, width = exact.shape
        made = exact.copy()
        channels = min(self.group, width)
        groups = width // channels
        for slot in range(done):
            block, i = divmod(slot, self.group)
            for head in range(heads):
                packed = held["value"][head, block].reshape(self.group, -1)[i]
                codes = unpacked(packed, self.bits).reshape(groups, channels)
                step, low = (
                    held[f"value_{name}"][head, block].reshape(self.group, groups)[i].astype(np.float64)
                    for name in ("step", "low")
                )
                made[head, slot] = (codes * step[:, None] + low[:, None]).reshape(-1)
                if slot >= max(before, entries.padding):
                    numbers = exact[head, slot].reshape(groups, channels)
                    assert_on_grid(numbers, step, low, codes, self.bits, what=f"values {slot}")
        self.check(made, exact, held["value_tail"], before, done, entries.padding)
        return self.settled(made, exact, entries, done, value=True)

    def check(self, made: Array, exact: Array, tail: Array, before: int, done: int, padding: int) -> None:
        scale = float(np.nanmax(np.abs(exact)))
        old, new = slice(padding, before), slice(max(done, padding), None)
        # Rounded once; two products in fp32 lie between what was read then and now.
        np.testing.assert_allclose(made[:, old], exact[:, old], rtol=0, atol=2e-6 * scale)
        np.testing.assert_allclose(tail[:, new.start - done :], exact[:, new], rtol=0, atol=1e-5 * scale)

    def settled(self, made: Array, exact: Array, entries: Entries, done: int, *, value: bool = False) -> Array:
        """The entries that the oracle goes on with: rounded ones, and its own in the tail."""
        own = self.back(made, entries.padding)
        waiting = max(done - entries.padding, 0)
        own[:, waiting:] = (entries.value if value else entries.key)[:, waiting:]
        return own


@pytest.mark.parametrize(
    ("family", "bits", "group", "tail"),
    [("llama", 2, 8, 16), ("llama", 4, 16, 32), ("qwen2", 2, 8, 8), ("gpt2", 2, 32, 32)],
)
def test_blocks_of_tokens(family: str, bits: int, group: int, tail: int, tmp_path: Path) -> None:
    given = policy(bits=bits, group=group, tail=tail)
    assert_equals_held(family, given, BlockReader(bits, group, tail), tmp_path)


def test_a_prompt_of_several_tails(tmp_path: Path) -> None:
    # Rows with a whole block of padding.
    assert_equals_held(
        "llama",
        policy(group=8, tail=16),
        BlockReader(2, 8, 16),
        tmp_path,
        calls=(41, 1, 23, *[1] * 20),
        padding=(0, 9, 27),
    )


def test_one_row_without_padding(tmp_path: Path) -> None:
    assert_equals_held("llama", policy(group=8, tail=16), BlockReader(2, 8, 16), tmp_path, padding=(0,))


def test_without_spreading(tmp_path: Path) -> None:
    store = {"kind": "blocks", "group": 8, "tail": 16, "spread": False, "scaled": False}
    given = {"version": 1, "name": "kivi", "steps": [{"node": "store_kv", "at": {"layers": "all"}, "store": store}]}
    assert_equals_held("llama", given, BlockReader(2, 8, 16, plain=True), tmp_path)


def test_before_anything_is_rounded_nothing_is_lost(tmp_path: Path) -> None:
    assert_near("llama", policy(tail=128), tmp_path, share=1e-4)


def test_many_bits_lose_little(tmp_path: Path) -> None:
    assert_near("llama", policy(bits=8, group=8, tail=16), tmp_path, share=0.01)


def test_the_matrix_is_its_own_inverse() -> None:
    basis = Blocks().basis(CacheForm(2, 16, 64, torch.float32))
    assert basis is not None
    for matrix, size in zip(basis, (16, 64), strict=True):
        np.testing.assert_allclose(matrix.numpy(), hadamard(size), atol=1e-7)
        np.testing.assert_allclose((matrix @ matrix.T).numpy(), np.eye(size), atol=1e-6)


def test_bytes(tmp_path: Path) -> None:
    engine = build("llama", policy(group=8, tail=16), tmp_path)
    ids, mask = tokens(1, 70, (0,))
    _, last = engine.run(ids, mask, (60, *[1] * 10))
    held = sum(x.nbytes for name, x in last.items() if name.startswith("present.1."))
    # 64 of 70 tokens are rounded, in blocks of 8. Two heads of 16 channels: 2 bits a number; per block fp16 steps and
    # lows of 16 channels of keys, of 2 groups of 8 tokens of values, and 8 lengths; the tail in fp32.
    codes = 64 * 2 * (16 + 16) * 2 // 8
    grids = 8 * (2 * 2 * (16 + 8 * 2) + 8) * 2
    assert held == codes + grids + 6 * 2 * 32 * 4


def refusal(family: str, given: Mapping[str, Any]) -> str:
    program = program_of(family)
    with pytest.raises(PlanError) as raised:
        make_cache_plan(load_policy(given, presets=library()), program, cache_sites(program))
    return str(raised.value)


def test_nothing_is_evicted() -> None:
    assert "nothing can be evicted" in refusal("llama", policy({"preset": "h2o", "tokens": 12}))


def test_sliding_windows_stay_as_they_are() -> None:
    assert "sliding window" in refusal("mistral", policy())
    program = program_of("gemma3")
    plan = make_cache_plan(load_policy(policy(), presets=library()), program, cache_sites(program))
    assert sorted(plan.storages) == [1, 2]
    assert any("layers 0 have sliding windows" in warning for warning in plan.warnings)


@pytest.mark.parametrize("given", [{"bits": 3}, {"group": 0}, {"group": 32, "tail": 40}])
def test_parameters_that_are_refused(given: dict[str, int]) -> None:
    program = program_of("llama")
    with pytest.raises(PolicyError):
        make_cache_plan(load_policy(policy(**given), presets=library()), program, cache_sites(program))


@pytest.mark.parametrize(("key", "value", "word"), [(12, 16, "power of two"), (16, 48, "power of two"), (2, 16, "4")])
def test_widths_that_are_refused(key: int, value: int, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        Blocks().check(CacheForm(2, key, value, torch.float32))
