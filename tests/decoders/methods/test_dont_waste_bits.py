"""Bits by a controller: who gets how many, on what grid, and when."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.decoders.bundles import compiled, model_folder
from tests.decoders.engine import build, tokens
from tests.decoders.held import CALLS, Array, Entries, assert_equals_held, assert_near, assert_on_grid
from tests.decoders.methods.test_agent_memory_q4 import unpacked
from tests.decoders.oracle import Call
from tests.decoders.tiny import VOCABULARY, program_of
from tokcc.analysis.cache_sites import cache_sites
from tokcc.backends.generation import Generator
from tokcc.config import load_policy
from tokcc.errors import PlanError, PolicyError
from tokcc.passes.cache.planning import make_cache_plan
from tokcc.passes.cache.storage import CacheForm
from tokcc.passes.cache.storages.quotas import Quotas
from tokcc.passes.methods import library

EVERY, SHARES = 10, {16: 0.1, 8: 0.2, 4: 0.4}
BITS = (16, 8, 4, 2)
PADDING = (0, 3, 5)


def controller(path: Path, *, hidden: int = 5, seed: int = 3, whole: bool = True, **changed: Tensor) -> str:
    """A random controller whose features all matter."""
    random = torch.Generator().manual_seed(seed)
    made = {
        "frequency": torch.rand(VOCABULARY, generator=random) * 2,
        "hidden.weight": torch.randn(hidden, 4, generator=random),
        "bits.weight": torch.randn(4, hidden, generator=random) * 0.3,  # or all tokens would need the same
    }
    if whole:
        made |= {
            "hidden.bias": torch.randn(hidden, generator=random),
            "bits.bias": torch.randn(4, generator=random) * 0.3,
            "mean": torch.tensor([1.0, 0.2, 0.05, 1.0]),
            "deviation": torch.tensor([0.5, 0.1, 0.05, 0.5]),
        }
    save_file({**made, **changed}, path)
    return str(path)


def policy(weights: str, *others: Mapping[str, Any], **given: Any) -> dict[str, Any]:
    step = {"preset": "dont-waste-bits", "weights": weights, "every": EVERY, **given}
    return {"version": 1, "name": "bits", "steps": [*others, step]}


class FourClasses:
    """Rates the tokens of every call, splits blocks by rank, reads the classes; slots count padding of the batch."""

    def __init__(self, weights: str, ids: Tensor, padding: Sequence[int]) -> None:
        from safetensors.numpy import load_file

        self.weights = {name: x.astype(np.float64) for name, x in load_file(weights).items()}
        self.ids, self.padding = ids.numpy(), padding
        self.row = -1
        self.probs: dict[int, Array] = {}

    def start(self) -> None:
        self.row += 1
        self.ratings: dict[int, list[float]] = {}
        self.blocks: dict[tuple[int, int], list[list[int]]] = {}
        self.done: dict[int, int] = {}

    def rule(self, call: Call) -> None:
        """Evict nothing, and remember what every query attended to: ``[H, S, L]``."""
        self.probs[call.layer] = call.probs.double().numpy()

    def expected(self, layer: int, new: int, total: int) -> list[float]:
        """The controller's formula, token by token."""
        probs, w = self.probs[layer], self.weights
        made = []
        for i in range(new):
            own = total - new + i
            token = self.ids[self.row, self.padding[self.row] + own]
            rows = probs[:, i, : own + 1]
            quality = probs[:, i:, own].sum(1).mean() / (new - i)
            variance = np.mean([np.var(row) for row in rows])
            entropy = np.mean([-sum(p * math.log(p) for p in row if p > 0) for row in rows])
            x = np.array([w["frequency"][token], quality, variance, entropy])
            x = (x - w.get("mean", 0.0)) / w.get("deviation", 1.0)
            hidden = np.maximum(w["hidden.weight"] @ x + w.get("hidden.bias", 0.0), 0.0)
            logits = w["bits.weight"] @ hidden + w.get("bits.bias", 0.0)
            chances = np.exp(logits - logits.max())
            made.append(float(chances @ [2, 4, 8, 16] / chances.sum()))
        return made

    def __call__(self, held: Mapping[str, Array], entries: Entries) -> tuple[Array, Array]:
        if entries.call == 0 and entries.layer == 0:
            self.start()
        layer, count = entries.layer, entries.key.shape[1]
        total, done = entries.padding + count, self.done.get(entries.layer, 0)
        ratings = self.ratings.setdefault(layer, [-math.inf] * entries.padding)
        ratings += self.expected(layer, count + entries.padding - len(ratings), count)
        size = total if entries.call == 0 else EVERY if total - done >= EVERY else 0
        if size:
            ordered = sorted(range(done, done + size), key=lambda slot: (-ratings[slot], slot))
            begin = 0
            for bits in BITS:
                few = math.floor(size * SHARES[bits] + 1e-9) if bits > 2 else size - begin
                self.blocks.setdefault((layer, bits), []).append(sorted(ordered[begin : begin + few]))
                begin += few
        self.done[layer] = done + size
        waiting = held["key_tail_rating"][0, :, 0]
        wanted = np.array(ratings[done + size :])
        real = np.isfinite(wanted)
        np.testing.assert_allclose(waiting[real], wanted[real], rtol=0, atol=1e-3)
        return self.read("key", held, entries, size > 0), self.read("value", held, entries, size > 0)

    def read(self, part: str, held: Mapping[str, Array], entries: Entries, fresh: bool) -> Array:
        exact = entries.key if part == "key" else entries.value
        made, padding, layer = exact.copy(), entries.padding, entries.layer
        tail = held[f"{part}_tail"]
        assert tail.shape[1] == padding + exact.shape[1] - self.done[layer]
        waiting = max(self.done[layer] - padding, 0)
        np.testing.assert_allclose(
            tail[:, max(padding - self.done[layer], 0) :], exact[:, waiting:], rtol=0, atol=1e-5 * np.abs(exact).max()
        )
        for bits in BITS:
            suffix = "" if bits == 16 else f"_{bits}"
            row = 0
            blocks = self.blocks[layer, bits]
            for number, slots in enumerate(blocks):
                own = slice(row, row + len(slots))
                row += len(slots)
                real = np.array([slot >= padding for slot in slots], bool)
                assert held[f"key{suffix}_real"][0, own, 0].astype(bool).tolist() == real.tolist(), (bits, slots)
                places = [slot - padding for slot in slots if slot >= padding]
                newest = fresh and number == len(blocks) - 1
                for head in range(exact.shape[0]):
                    numbers = exact[head, places]
                    stored = held[f"{part}{suffix}"][head, own][real]
                    if bits == 16:
                        assert stored.dtype == np.float16
                        decoded = stored.astype(np.float64)
                        np.testing.assert_allclose(decoded, numbers, rtol=2.0**-11 + 1e-5, atol=1e-4)
                    else:
                        codes = unpacked(stored, bits)
                        grids = (held[f"{part}{suffix}_{x}"][head, own, 0][real] for x in ("step", "low"))
                        step, low = (grid.astype(np.float64) for grid in grids)
                        decoded = codes * step[:, None] + low[:, None]
                        if newest:
                            assert_on_grid(numbers, step, low, codes, bits, what=f"{part} {bits} {slots}")
                    if not newest:  # rounded once
                        np.testing.assert_allclose(decoded, numbers, rtol=3e-7, atol=1e-7)
                    made[head, places] = decoded
            assert row == held[f"{part}{suffix}"].shape[1]
        return made


@pytest.mark.parametrize(("family", "whole"), [("llama", True), ("llama", False), ("qwen2", True), ("gpt2", True)])
def test_classes(family: str, whole: bool, tmp_path: Path) -> None:
    weights = controller(tmp_path / "c.safetensors", whole=whole)
    reader = FourClasses(weights, tokens(3, sum(CALLS), PADDING)[0], PADDING)
    assert_equals_held(family, policy(weights), reader, tmp_path, rule=reader.rule)


@pytest.mark.slow
def test_little_but_padding(tmp_path: Path) -> None:
    weights = controller(tmp_path / "c.safetensors")
    calls, padding = (41, 1, 23, *[1] * 25), (0, 9, 30)
    reader = FourClasses(weights, tokens(3, sum(calls), padding)[0], padding)
    assert_equals_held("llama", policy(weights), reader, tmp_path, rule=reader.rule, calls=calls, padding=padding)


@pytest.mark.slow
def test_a_prompt_of_one_token(tmp_path: Path) -> None:
    weights = controller(tmp_path / "c.safetensors")
    calls = (1, *[1] * 30)
    reader = FourClasses(weights, tokens(1, sum(calls), (0,))[0], (0,))
    assert_equals_held("llama", policy(weights), reader, tmp_path, rule=reader.rule, calls=calls, padding=(0,))


@pytest.mark.slow
def test_sixteen_bits_lose_nothing_to_speak_of(tmp_path: Path) -> None:
    weights = controller(tmp_path / "c.safetensors")
    assert_near("llama", policy(weights, share_16=1.0, share_8=0.0, share_4=0.0), tmp_path, share=0.005)


def test_quotas_are_all_tokens(tmp_path: Path) -> None:
    weights = controller(tmp_path / "c.safetensors")
    engine = build("llama", policy(weights), tmp_path)
    ids, mask = tokens(1, 60, (0,))
    for length in (1, 3, 7, 29, 60):
        *_, last = engine.each(ids, mask, (length,))
        held = [last[f"present.1.key{suffix}"].shape[2] for suffix in ("", "_8", "_4", "_2")]
        few = [length // 10, length * 2 // 10, length * 4 // 10]
        assert held == [*few, length - sum(few)]


@pytest.mark.slow
def test_through_the_pipeline(tmp_path: Path) -> None:
    """The controller lies in the bundle, and its policy makes the same engine again."""
    weights = controller(tmp_path / "c.safetensors")
    folder = model_folder(tmp_path / "model")
    bundle = compiled(folder, tmp_path / "out", policy(weights))
    prompt = [list(range(3, 33))]
    made = Generator(bundle).generate(prompt, max_new_tokens=30, stop=())
    Path(weights).unlink()
    again = compiled(folder, tmp_path / "again", str(bundle.path / "policy.lock.yaml"))
    assert Generator(again).generate(prompt, max_new_tokens=30, stop=()) == made


def plan(given: Mapping[str, Any], family: str = "llama") -> None:
    program = program_of(family)
    make_cache_plan(load_policy(given, presets=library()), program, cache_sites(program))


class TestRefusals:
    def test_a_table_of_another_vocabulary(self, tmp_path: Path) -> None:
        weights = controller(tmp_path / "c.safetensors", frequency=torch.ones(VOCABULARY + 1))
        with pytest.raises(PolicyError, match="does not fit") as caught:
            plan(policy(weights))
        assert str(VOCABULARY) in str(caught.value)

    def test_an_eviction_beside_it(self, tmp_path: Path) -> None:
        weights = controller(tmp_path / "c.safetensors")
        with pytest.raises(PlanError, match="nothing can be evicted"):
            plan(policy(weights, {"preset": "h2o", "tokens": 12}))

    def test_shares_of_more_than_all(self, tmp_path: Path) -> None:
        weights = controller(tmp_path / "c.safetensors")
        with pytest.raises(PolicyError, match="more than all tokens"):
            plan(policy(weights, share_16=0.7))

    def test_no_rating(self) -> None:
        with pytest.raises(PolicyError, match="nothing rates them"):
            plan({"version": 1, "name": "p", "steps": [{"node": "store_kv", "store": {"kind": "quotas"}}]})

    def test_a_rating_that_nothing_reads(self, tmp_path: Path) -> None:
        weights = controller(tmp_path / "c.safetensors")
        step = {"node": "store_kv", "store": {"kind": "codes"}, "score": {"kind": "expected_bits", "weights": weights}}
        with pytest.raises(PolicyError, match="holds all entries alike"):
            plan({"version": 1, "name": "p", "steps": [step]})

    def test_odd_widths(self) -> None:
        with pytest.raises(ValueError, match="multiple of 4"):
            Quotas().check(CacheForm(2, 6, 16, torch.float32))
