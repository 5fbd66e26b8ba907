"""Channels of keys: which ones go, when, and what is left of the logits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.decoders.engine import build, tokens
from tests.decoders.held import CALLS, Array, Entries, assert_equals_held
from tests.decoders.methods.cuts import cut_of
from tests.decoders.tiny import program_of
from tokcc.analysis.cache_sites import cache_sites
from tokcc.config import load_policy
from tokcc.errors import PlanError
from tokcc.ir.builder import EagerBuilder
from tokcc.passes.cache.planning import make_cache_plan
from tokcc.passes.cache.storage import CacheForm, Left
from tokcc.passes.cache.storages.channels import Channels
from tokcc.passes.methods import library


def policy(*others: Mapping[str, Any], **given: Any) -> dict[str, Any]:
    return {"version": 1, "name": "think", "steps": [*others, {"preset": "think", **given}]}


class Pruned:
    """Reads keys whose first tokens lack channels: those that the engine chose, the same in every call."""

    def __init__(self, kept: int, recent: int, prompt: int) -> None:
        self.kept, self.recent, self.prompt = kept, recent, prompt

    def __call__(self, held: Mapping[str, Array], entries: Entries) -> tuple[Array, Array]:
        heads, count, width = entries.key.shape
        short = max(self.prompt - self.recent, 0)  # slots, padding included
        channels = held["key_channels"][:, 0]
        assert held["key"].shape == (heads, short, self.kept)
        assert held["key_recent"].shape == (heads, entries.padding + count - short, width)
        np.testing.assert_allclose(held["value"][:, entries.padding :], entries.value, rtol=0, atol=1e-5)
        made = entries.key.copy()
        for head in range(heads):
            assert sorted(set(channels[head])) == channels[head].tolist()
            for slot in range(entries.padding, short):
                own = slot - entries.padding
                made[head, own] = 0.0
                for place, channel in enumerate(channels[head]):
                    made[head, own, channel] = entries.key[head, own, channel]
                    assert abs(held["key"][head, slot, place] - entries.key[head, own, channel]) < 1e-5
        return made, entries.value


@pytest.mark.parametrize(
    ("family", "dropped", "kept", "recent"),
    [("llama", 0.4, 10, 4), ("qwen2", 0.5, 8, 0), ("gpt2", 0.4, 10, 3), ("llama", 0.4, 10, 32)],
)
def test_the_prompt_loses_channels(family: str, dropped: float, kept: int, recent: int, tmp_path: Path) -> None:
    given = policy(dropped=dropped, recent=recent, window=4)
    assert_equals_held(family, given, Pruned(kept, recent, CALLS[0]), tmp_path)


def test_one_row_without_padding(tmp_path: Path) -> None:
    assert_equals_held("llama", policy(recent=2), Pruned(10, 2, CALLS[0]), tmp_path, padding=(0,))


@pytest.mark.parametrize(("window", "padding"), [(3, (0, 4)), (32, (0, 0)), (6, (2, 7))])
def test_the_largest_products_stay(window: int, padding: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    key = torch.randn(2, 2, 10, 8, generator=generator) * (torch.rand(2, 2, 1, 8, generator=generator) + 0.2)
    cut = cut_of(key, padding=padding)
    form = CacheForm(2, 8, 8, torch.float32)
    storage = Channels(dropped=0.4, recent=4, window=window)
    empty = {
        "key": torch.zeros(2, 2, 0, 5),
        "value": torch.zeros(2, 2, 0, 8),
        "key_recent": torch.zeros(2, 2, 0, 8),
        "key_channels": torch.zeros(2, 2, 1, 5, dtype=torch.int64),
    }
    left = Left(key, key, {}, key, key, cut.real, 0, 10, cut=cut)
    made = storage.write(EagerBuilder(), form, empty, left)
    for row in range(2):
        for head in range(2):
            rating = []
            for channel in range(8):
                asked = [
                    float(cut.query[row, 2 * head + g, i, channel]) ** 2
                    for g in range(2)
                    for i in range(max(10 - window, padding[row]), 10)
                ]
                there = [float(key[row, head, j, channel]) ** 2 for j in range(padding[row], 10)]
                rating.append(sum(asked) / len(asked) * sum(there) / len(there))
            wanted = sorted(sorted(range(8), key=lambda c: -rating[c])[:5])
            assert made["key_channels"][row, head, 0].tolist() == wanted
            assert torch.equal(made["key"][row, head], key[row, head, :6][:, wanted])
    assert torch.equal(made["key_recent"], key[:, :, 6:])


def test_bytes(tmp_path: Path) -> None:
    engine = build("llama", policy(recent=4), tmp_path)
    ids, mask = tokens(1, 40, (0,))
    _, last = engine.run(ids, mask, (30, *[1] * 10))
    held = sum(x.nbytes for name, x in last.items() if name.startswith("present.1."))
    # 26 keys have 10 of 16 channels, 14 have all; two heads, values in whole, and the numbers of the channels.
    assert held == 2 * ((26 * 10 + 14 * 16 + 40 * 16) * 4 + 10 * 8)


def test_what_is_refused() -> None:
    program = program_of("llama")
    sites = cache_sites(program)
    with pytest.raises(PlanError, match="at least one"):
        make_cache_plan(load_policy(policy(dropped=0.05), presets=library()), program, sites)
    with pytest.raises(PlanError, match="nothing can be evicted"):
        make_cache_plan(load_policy(policy({"preset": "h2o", "tokens": 12}), presets=library()), program, sites)
