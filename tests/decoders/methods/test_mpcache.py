"""Both stages of MPCache against their formulas.

A prompt leaves what one of its last queries attends to most; a single token reads pages of that, found in two levels.
"""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.decoders.engine import assert_equals_alone, tokens
from tests.decoders.methods.cuts import cut_of
from tests.decoders.methods.rules import best
from tests.decoders.oracle import Call, Rule
from tests.decoders.tiny import program_of
from tests.sparse.engine import assert_equals_rule
from tests.sparse.oracle import Look
from tests.sparse.oracle import Rule as SparseRule
from tokcc.analysis.cache_sites import cache_sites
from tokcc.config import load_policy
from tokcc.errors import PlanError, PolicyError
from tokcc.passes.cache.planning import make_cache_plan
from tokcc.passes.cache.scores.window_peak import WindowPeak
from tokcc.passes.methods import library

CALLS = (9, 1, 1, 5, *[1] * 64)


def rule(capacity: int, recent: int, share: str) -> Rule:
    def evict(call: Call) -> Tensor | None:
        if call.new == 1 or call.total <= capacity:
            return None
        asking = range(call.new - math.ceil(Fraction(share) * call.new), call.new)
        heads = len(call.probs)
        peaks = [
            max(sum(float(call.probs[h, i, j]) for h in range(heads)) / heads for i in asking)
            for j in range(call.total)
        ]
        return best(torch.tensor([peaks] * call.key.shape[0], dtype=torch.float64), capacity, recent=recent)

    return evict


ALL_PAGES = {"page": 2, "larger_keep": 1.0, "page_keep": 1.0}


def policy(**given: object) -> dict[str, object]:
    return {"version": 1, "name": "mpcache", "steps": [{"preset": "mpcache", **given}]}


def pages_rule(
    page: int, size: int, larger_keep: str, page_keep: str, *, blend: float = 0.6, each: bool = False
) -> SparseRule:
    """A single token reads the best pages among those in the best larger ones, and the first and the newest."""

    def similar(query: Tensor, keys: Tensor) -> float:
        vector = blend * keys.amax(0) + (1 - blend) * keys.amin(0)
        return float((query.double() * vector.double()).sum())

    def best_of(rated: dict[int, float], many: int) -> list[int]:
        return sorted(rated, key=lambda i: -rated[i])[:many]

    def reads(look: Look) -> Tensor | None:
        if look.new > 1:
            return None
        heads, groups = len(look.query), len(look.query) // len(look.key)
        read = torch.zeros(heads, 1, look.total, dtype=torch.bool)
        for head in range(heads):
            key = look.key[head // groups]
            first = head // groups * groups
            members = [head] if each else range(first, first + groups)

            def rate(length: int, among: list[int], key: Tensor = key, members: Any = members) -> dict[int, float]:
                spans = {i: key[i * length : (i + 1) * length] for i in among}
                return {i: sum(similar(look.query[h, 0], span) for h in members) for i, span in spans.items()}

            pages = math.ceil(look.total / page)
            large = math.ceil(look.total / (page * size))
            good = best_of(rate(page * size, list(range(large))), math.ceil(Fraction(larger_keep) * large))
            inside = [i for i in range(pages) if i // size in good]
            for i in {*best_of(rate(page, inside), math.ceil(Fraction(page_keep) * pages)), 0, pages - 1}:
                read[head, 0, i * page : (i + 1) * page] = True
        return read

    return reads


TEXTS = (37, 1, 1, 18, 1, 1, 1, 1, 1)
"""All rows have more tokens than stay, so that no page holds padding."""


@pytest.mark.parametrize(
    ("family", "padding"),
    [("llama", (0, 8, 13)), pytest.param("llama-mqa", (0, 8, 13), marks=pytest.mark.slow),
     pytest.param("llama", (0,), marks=pytest.mark.slow)],
)  # fmt: skip
def test_single_tokens_read_pages_of_what_stayed(family: str, padding: tuple[int, ...], tmp_path: Path) -> None:
    given = policy(tokens=22, recent=3, page=2, larger=2, larger_keep=0.5, page_keep=0.2)
    pages = pages_rule(2, 2, "0.5", "0.2")
    engine = assert_equals_rule(family, given, pages, tmp_path, calls=TEXTS, padding=padding, evict=rule(22, 3, "0.2"))
    ids, mask = tokens(len(padding), sum(TEXTS), padding)
    _, last = engine.run(ids, mask, TEXTS)
    assert sorted(name for name in last if "blend" in name)[:2] == ["present.0.key_blend", "present.0.key_blend_2"]
    for name, length in (("key_blend", 2), ("key_blend_2", 4)):
        key, remembered = last["present.1.key"], last[f"present.1.{name}"]
        assert key.shape[2] == 22 + 5
        parts = [key[:, :, i : i + length] for i in range(0, key.shape[2], length)]
        wanted = np.stack([0.6 * part.max(2) + 0.4 * part.min(2) for part in parts], 2)
        np.testing.assert_allclose(remembered, wanted, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_each_head_has_a_list(tmp_path: Path) -> None:
    given = policy(tokens=24, recent=3, page=3, larger=3, larger_keep=0.4, page_keep=0.3, blend=0.9, lists="each")
    pages = pages_rule(3, 3, "0.4", "0.3", blend=0.9, each=True)
    assert_equals_rule("llama", given, pages, tmp_path, calls=TEXTS, padding=(0, 8, 13), evict=rule(24, 3, "0.2"))


@pytest.mark.slow
def test_pages_of_a_cache_that_keeps_everything(tmp_path: Path) -> None:
    """Padding stays then, in whole larger pages; a share of the pages is one of those that a row has."""
    given = policy(tokens=400, page=2, larger=2)
    pages = pages_rule(2, 2, "0.5", "0.2")
    assert_equals_rule("llama", given, pages, tmp_path, calls=TEXTS, padding=(0, 8, 12), evict=lambda call: None)


@pytest.mark.slow
def test_short_caches_are_read_whole(tmp_path: Path) -> None:
    given = policy(tokens=22, recent=3, page=2, larger=2, length=25)
    pages = pages_rule(2, 2, "0.5", "0.2")
    assert_equals_rule(
        "llama", given, lambda look: pages(look) if look.total >= 25 else None, tmp_path, calls=TEXTS,
        padding=(0, 8, 13), evict=rule(22, 3, "0.2"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("family", "many", "recent", "share"),
    [("llama", 6, 2, "0.2"), ("llama", 4, 0, "0.5"), ("qwen2", 7, 3, "1.0"), ("gpt-neox", 6, 2, "0.3")],
)
def test_equals_the_formula(family: str, many: int, recent: int, share: str, tmp_path: Path) -> None:
    """Rows of different lengths have different numbers of queries that rate."""
    given = policy(tokens=many, recent=recent, share=float(share), **ALL_PAGES)
    assert_equals_alone(family, given, rule(many, recent, share), tmp_path, calls=CALLS)


def test_one_row(tmp_path: Path) -> None:
    given = policy(tokens=6, recent=2, **ALL_PAGES)
    assert_equals_alone("llama", given, rule(6, 2, "0.2"), tmp_path, padding=(0,), calls=CALLS)


def test_a_capacity_that_does_not_bind(tmp_path: Path) -> None:
    assert_equals_alone("llama", policy(tokens=200, **ALL_PAGES), None, tmp_path, calls=CALLS)


def test_the_number_of_queries_is_each_rows_own() -> None:
    """10 tokens have 2 that rate, 5 of them one."""
    generator = torch.Generator().manual_seed(1)
    cut = cut_of(torch.randn(2, 2, 10, 8, generator=generator), padding=(0, 5))
    peaks = WindowPeak(share=0.2).emit(cut)
    probs = cut.probs(2).mean(2).mean(1)  # [2, 2, 10]
    torch.testing.assert_close(peaks[0, 0], probs[0].amax(0))
    torch.testing.assert_close(peaks[1, 0], probs[1, 1])


def test_bad_parameters_are_refused() -> None:
    program = program_of("llama")
    for given, error, match in (
        ({"share": 0.0}, PolicyError, "share"),
        ({"tokens": 16}, PlanError, "protected"),
    ):
        loaded = load_policy(policy(**given), presets=library())
        with pytest.raises(error, match=match):
            make_cache_plan(loaded, program, cache_sites(program))
    with pytest.raises(PolicyError, match="share"):
        load_policy(policy(share=1.5), presets=library())
