"""Entries as codes: every token on its own grid, rounded once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.decoders.engine import build, tokens
from tests.decoders.held import Array, Entries, assert_equals_held, assert_near, assert_on_grid
from tests.decoders.methods.test_h2o import rule as heavy_hitters
from tests.decoders.tiny import program_of
from tokcc.analysis.cache_sites import cache_sites
from tokcc.config import load_policy
from tokcc.errors import PlanError, PolicyError
from tokcc.passes.cache.planning import make_cache_plan
from tokcc.passes.methods import library


def policy(*others: Mapping[str, Any], **given: Any) -> dict[str, Any]:
    return {"version": 1, "name": "q4", "steps": [*others, {"preset": "agent-memory-q4", **given}]}


def unpacked(packed: Array, bits: int) -> Array:
    """Codes of ``[..., bytes]``: byte j holds the channels j, j + bytes, ..., the first in the lowest bits."""
    count, width = 8 // bits, packed.shape[-1]
    codes = np.zeros((*packed.shape[:-1], count * width), np.int64)
    for byte in range(width):
        for part in range(count):
            codes[..., part * width + byte] = (packed[..., byte].astype(np.int64) >> (part * bits)) % 2**bits
    return codes


class Codes:
    """Reads codes of few bits in groups of channels."""

    def __init__(self, bits: int, group: int) -> None:
        self.bits, self.group = bits, group

    def __call__(self, held: Mapping[str, Array], entries: Entries) -> tuple[Array, Array]:
        return self.read("key", held, entries.key, entries.fresh), self.read(
            "value", held, entries.value, entries.fresh
        )

    def read(self, part: str, held: Mapping[str, Array], exact: Array, fresh: Array) -> Array:
        heads, count, width = exact.shape
        tensors = {name: held[name][:, held[name].shape[1] - count :] for name in held}
        assert held[part].dtype == np.uint8
        codes = unpacked(tensors[part], self.bits)
        step, low = (tensors[f"{part}_{name}"] for name in ("step", "low"))
        assert step.dtype == low.dtype == np.float16
        made = np.zeros_like(exact)
        for head in range(heads):
            for slot in range(count):
                for group in range(width // self.group):
                    own = slice(group * self.group, (group + 1) * self.group)
                    grid = float(step[head, slot, group]), float(low[head, slot, group])
                    made[head, slot, own] = codes[head, slot, own] * grid[0] + grid[1]
        old = ~fresh
        # Rounded once: what an earlier call left is still the same number, to the last bit that fp32 holds.
        np.testing.assert_allclose(made[old], exact[old], rtol=2e-7, atol=1e-7)
        if fresh.any():
            assert_on_grid(
                exact[fresh].reshape(-1, self.group),
                step[fresh].reshape(-1),
                low[fresh].reshape(-1),
                codes[fresh].reshape(-1, self.group),
                self.bits,
                what=part,
            )
        return made


@pytest.mark.parametrize(
    ("family", "bits", "group"), [("llama", 4, 16), ("llama", 8, 4), ("qwen2", 4, 8), ("gpt2", 4, 16)]
)
def test_codes_of_every_token(family: str, bits: int, group: int, tmp_path: Path) -> None:
    assert_equals_held(family, policy(bits=bits, group=group), Codes(bits, group), tmp_path)


def test_one_row_without_padding(tmp_path: Path) -> None:
    assert_equals_held("llama", policy(), Codes(4, 16), tmp_path, padding=(0,))


def test_with_an_eviction(tmp_path: Path) -> None:
    steps = policy({"preset": "h2o", "tokens": 12})
    assert_equals_held("llama", steps, Codes(4, 16), tmp_path, rule=heavy_hitters(12, 6))


def test_windows(tmp_path: Path) -> None:
    assert_equals_held("mistral", policy(), Codes(4, 16), tmp_path, rule=lambda call: last(call, 7))


def last(call: Any, count: int) -> Any:
    import torch

    total = call.total
    return torch.arange(max(total - count, 0), total).expand(call.key.shape[0], -1)


@pytest.mark.parametrize(("bits", "share"), [(8, 0.01), (4, 0.25)])
def test_more_bits_lose_less(bits: int, share: float, tmp_path: Path) -> None:
    assert_near("llama", policy(bits=bits, group=4), tmp_path, share=share)


def test_bytes(tmp_path: Path) -> None:
    engine = build("llama", policy(), tmp_path)
    ids, mask = tokens(1, 20, (0,))
    _, last = engine.run(ids, mask, (20,))
    held = sum(x.nbytes for name, x in last.items() if name.startswith("present.1."))
    # Two heads of 16 numbers, keys and values: half a byte each, and two fp16 for each group.
    assert held == 20 * 2 * 2 * (16 // 2 + 2 * 2)


@pytest.mark.parametrize("given", [{"bits": 3}, {"bits": 16}, {"group": 0}])
def test_parameters_that_are_refused(given: dict[str, int]) -> None:
    with pytest.raises(PolicyError):
        load_policy(policy(**given), presets=library())


def test_groups_that_do_not_fit() -> None:
    program = program_of("llama")
    with pytest.raises(PlanError, match="multiple of 12"):
        make_cache_plan(load_policy(policy(group=12), presets=library()), program, cache_sites(program))
