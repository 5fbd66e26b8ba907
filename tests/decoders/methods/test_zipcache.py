"""Two classes of precision: who is in which, on what grid, and when."""

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
from tests.decoders.oracle import Call
from tests.decoders.tiny import program_of
from tokcc.analysis.cache_sites import cache_sites
from tokcc.config import load_policy
from tokcc.errors import PlanError, PolicyError
from tokcc.passes.cache.planning import make_cache_plan
from tokcc.passes.cache.storage import CacheForm
from tokcc.passes.cache.storages.classes import Classes
from tokcc.passes.methods import library


def policy(*others: Mapping[str, Any], **given: Any) -> dict[str, Any]:
    return {"version": 1, "name": "zipcache", "steps": [*others, {"preset": "zipcache", **given}]}


class TwoClasses:
    """Rates, splits and reads blocks of the entries of every head; slots are counted with the padding of the batch."""

    def __init__(self, every: int, *, fine: int = 4, coarse: int = 2, probes: int = 20) -> None:
        self.every, self.bits, self.probes = every, {"": fine, "_rough": coarse}, probes
        self.probs: dict[int, Array] = {}
        self.start()

    def start(self) -> None:
        # By layer and class, for each head the blocks' slots.
        self.blocks: dict[tuple[int, str], list[list[list[int]]]] = {}
        self.done: dict[int, int] = {}

    def rule(self, call: Call) -> None:
        """Evict nothing, and remember what every query attended to, by key head: ``[Hkv, G, S, L]``."""
        self.probs[call.layer] = call.grouped.double().numpy()

    def __call__(self, held: Mapping[str, Array], entries: Entries) -> tuple[Array, Array]:
        if entries.call == 0 and entries.layer == 0:
            self.start()
        heads, count, _ = entries.key.shape
        total = entries.padding + count
        done = self.done.get(entries.layer, 0)
        size = total if entries.call == 0 else self.every if total - done >= self.every else 0
        if size:
            for head in range(heads):
                fine, rough = self.split(entries, head, done, size)
                for name, slots in (("", fine), ("_rough", rough)):
                    known = self.blocks.setdefault((entries.layer, name), [[] for _ in range(heads)])
                    known[head].append(slots)
        self.done[entries.layer] = done + size
        return self.read("key", held, entries, size > 0), self.read("value", held, entries, size > 0)

    def split(self, entries: Entries, head: int, first: int, size: int) -> tuple[list[int], list[int]]:
        probs, padding = self.probs[entries.layer][head], entries.padding
        total = padding + entries.key.shape[1]
        new = total if entries.call == 0 else probs.shape[1]  # slots of this call
        begin = total - new
        if new == 1:
            probing = [begin]
        else:
            last = math.ceil(new / self.probes)
            probing = [*range(begin, total - last, self.probes), *range(total - last, total)]
        probing = [slot for slot in probing if slot >= padding]
        scores = {}
        for slot in range(first, first + size):
            sees = [probe for probe in probing if probe >= slot]
            row0 = total - probs.shape[1]  # slot of the first row of probabilities
            received = sum(float(probs[:, probe - row0, slot - padding].mean()) for probe in sees if slot >= padding)
            scores[slot] = received / max(len(sees), 1) if slot >= padding else -1.0
        rough = size * 2 // 5
        ordered = sorted(scores, key=lambda slot: (-scores[slot], slot))
        return sorted(ordered[: size - rough]), sorted(ordered[size - rough :])

    def read(self, part: str, held: Mapping[str, Array], entries: Entries, fresh: bool) -> Array:
        exact = entries.key if part == "key" else entries.value
        made, padding, layer = exact.copy(), entries.padding, entries.layer
        heads, count, width = exact.shape
        tail = held[f"{part}_tail"]
        assert tail.shape[1] == padding + count - self.done[layer]
        waiting = max(self.done[layer] - padding, 0)
        np.testing.assert_allclose(
            tail[:, max(padding - self.done[layer], 0) :], exact[:, waiting:], rtol=0, atol=1e-5 * np.abs(exact).max()
        )
        for name, bits in self.bits.items():
            for head in range(heads):
                row = 0
                blocks = self.blocks[layer, name][head]
                for number, slots in enumerate(blocks):
                    own = slice(row, row + len(slots))
                    row += len(slots)
                    codes = unpacked(held[f"{part}{name}"][head, own], bits)
                    real = [slot >= padding for slot in slots]
                    assert held[f"key{name}_real"][0, own, 0].tolist() == real
                    numbers = np.array([exact[head, s - padding] if s >= padding else [np.nan] * width for s in slots])
                    numbers = numbers.reshape(-1, width)
                    if part == "key":
                        step, low = held[f"key{name}_grid"][head, number].astype(np.float64).reshape(2, width)
                        decoded = codes * step + low
                        columns, grids = (numbers.T, codes.T), (step, low)
                    else:
                        scale = held[f"value{name}_scale"][head, number].astype(np.float64)
                        step, low = held[f"value{name}_grid"][head, own].astype(np.float64).T
                        decoded = (codes * step[:, None] + low[:, None]) * scale
                        columns, grids = (numbers / scale, codes), (step, low)
                        if fresh and number == len(blocks) - 1 and any(real):
                            wanted = np.sqrt(np.nanmax(np.abs(numbers), 0))
                            np.testing.assert_allclose(scale, wanted, rtol=2.0**-11 + 1e-5)
                    for i, slot in enumerate(slots):
                        if slot >= padding:
                            made[head, slot - padding] = decoded[i]
                    if not fresh or number < len(blocks) - 1:
                        # Rounded once.
                        np.testing.assert_allclose(decoded[real], numbers[real], rtol=3e-7, atol=1e-7)
                    elif len(slots):
                        assert_on_grid(columns[0], *grids, columns[1], bits, what=f"{part}{name} {slots}")
                assert row == held[f"{part}{name}"].shape[1]
        return made


@pytest.mark.parametrize(("family", "every"), [("llama", 10), ("qwen2", 25), ("gpt2", 10)])
def test_classes(family: str, every: int, tmp_path: Path) -> None:
    reader = TwoClasses(every)
    assert_equals_held(family, policy(every=every), reader, tmp_path, rule=reader.rule)


def test_many_probes_and_little_but_padding(tmp_path: Path) -> None:
    reader = TwoClasses(10, probes=5)
    given = policy(every=10, probes=0.2)
    # More padding than the rough class of the prompt takes.
    calls = (41, 1, 23, *[1] * 25)
    assert_equals_held("llama", given, reader, tmp_path, rule=reader.rule, calls=calls, padding=(0, 9, 30))


def test_one_row_without_padding(tmp_path: Path) -> None:
    reader = TwoClasses(10)
    assert_equals_held("llama", policy(every=10), reader, tmp_path, rule=reader.rule, padding=(0,))


def test_a_prompt_of_one_token(tmp_path: Path) -> None:
    reader = TwoClasses(10)
    assert_equals_held(
        "llama", policy(every=10), reader, tmp_path, rule=reader.rule, calls=(1, *[1] * 30), padding=(0,)
    )


def test_many_bits_lose_little(tmp_path: Path) -> None:
    assert_near("llama", policy(fine=8, coarse=8, every=10), tmp_path, share=0.02)


def test_bytes(tmp_path: Path) -> None:
    engine = build("llama", policy(every=10), tmp_path)
    ids, mask = tokens(1, 50, (0,))
    _, last = engine.run(ids, mask, (30, *[1] * 20))
    held = sum(x.nbytes for name, x in last.items() if name.startswith("present.1."))
    # Prompt of 30: 12 rough; two blocks of 10: 4 rough each. Keys and values of two heads of 16.
    codes = (30 * 16 * 4 + 20 * 16 * 2) * 2 * 2 // 8
    # For 3 blocks and both classes: 2 fp16 a channel of keys, 1 a channel of values; per entry 2 fp16 and a byte.
    assert held == codes + 3 * 2 * 2 * (2 * 16 + 16) * 2 + 50 * (2 * 2 * 2 + 1)


@pytest.mark.parametrize("given", [{"fine": 3}, {"rough": 1.5}, {"every": 1}])
def test_parameters_that_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(PolicyError):
        load_policy(policy(**given), presets=library())


def test_what_is_refused() -> None:
    program = program_of("llama")
    sites = cache_sites(program)
    with pytest.raises(PlanError, match="nothing can be evicted"):
        make_cache_plan(load_policy(policy({"preset": "h2o", "tokens": 12}), presets=library()), program, sites)
    with pytest.raises(PlanError, match="at least one"):
        make_cache_plan(load_policy(policy(every=2), presets=library()), program, sites)
    with pytest.raises(ValueError, match="multiple of 4"):
        Classes().check(CacheForm(2, 6, 16, torch.float32))
