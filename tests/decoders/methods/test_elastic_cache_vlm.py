"""Elastic Cache against its formula: text is merged into its anchors, generated tokens push out a fixed place."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.decoders.engine import assert_equals_alone
from tests.decoders.methods.cuts import cut_of
from tests.decoders.oracle import Call, Merged, Rule
from tests.decoders.tiny import program_of
from tokcc.analysis.cache_sites import cache_sites
from tokcc.config import load_policy
from tokcc.errors import PlanError
from tokcc.passes.cache.cut import Retained
from tokcc.passes.cache.planning import make_cache_plan
from tokcc.passes.cache.reducers.nearest_mean import NearestMean
from tokcc.passes.cache.selectors.best import Best
from tokcc.passes.methods import library

CALLS = (9, 1, 1, 5, *[1] * 64)


def nearest(token: int, anchors: list[int]) -> int | None:
    return min(anchors, key=lambda anchor: (abs(anchor - token), anchor), default=None)


def merged(rows: Tensor, kept: list[int], anchors: list[int]) -> Tensor:
    """Rows ``[L, D]``: the mean of every kept entry and of those that join it."""
    result = []
    for slot in kept:
        joined = [t for t in range(len(rows)) if t not in kept and nearest(t, anchors) == slot]
        members = [rows[t].double() for t in [slot, *joined]]
        result.append(sum(members) / len(members))
    return torch.stack(result).to(rows.dtype)


def rule(capacity_at: Callable[[int], int], offset: int, sinks: int, recent: int) -> Rule:
    def evict(call: Call) -> Tensor | Merged | None:
        capacity, total, heads = capacity_at(call.seen), call.total, len(call.probs)
        if total <= capacity:
            return None
        if call.new == 1:
            gone = total - 1 - offset
            return torch.tensor([[j for j in range(total) if j != gone]] * len(call.key))
        sums = [sum(float(p) for head in call.probs for p in head[:, j]) / heads for j in range(total)]
        always = [j for j in range(total) if j < sinks or j >= total - recent]
        middle = [j for j in range(total) if j not in always]
        anchors = sorted(sorted(middle, key=lambda j: (-sums[j], j))[: capacity - len(always)])
        kept = sorted(always + anchors)
        key, value = (torch.stack([merged(head, kept, anchors) for head in x]) for x in (call.key, call.value))
        return Merged(torch.tensor([kept] * len(call.key)), key, value)

    return evict


def policy(**given: object) -> dict[str, object]:
    return {"version": 1, "name": "elastic", "steps": [{"preset": "elastic-cache-vlm", **given}]}


@pytest.mark.parametrize(
    ("family", "tokens", "offset", "sinks", "recent"),
    [("llama", 7, 3, 1, 1), ("llama", 4, 3, 1, 1), ("llama", 5, 1, 0, 0), ("qwen2", 9, 4, 2, 3), ("gpt2", 6, 3, 1, 2)],
)
def test_equals_the_formula(family: str, tokens: int, offset: int, sinks: int, recent: int, tmp_path: Path) -> None:
    """Short prompts are merged in the second text only, and padding is still in their caches."""
    given = policy(tokens=tokens, offset=offset, sinks=sinks, recent=recent)
    assert_equals_alone(family, given, rule(lambda _: tokens, offset, sinks, recent), tmp_path, calls=CALLS)


def test_one_row(tmp_path: Path) -> None:
    given = policy(tokens=6, offset=2)
    assert_equals_alone("llama", given, rule(lambda _: 6, 2, 1, 1), tmp_path, padding=(0,), calls=CALLS)


def test_the_published_share_of_the_tokens(tmp_path: Path) -> None:
    """The capacity grows: an entry goes only where there are more than the share of all tokens so far."""
    given = policy(budget={"keep": 0.8}, offset=3)
    share = rule(lambda seen: math.ceil(Fraction("0.8") * seen), 3, 1, 1)
    assert_equals_alone("llama", given, share, tmp_path, padding=(0, 0), calls=CALLS)


def test_a_capacity_that_does_not_bind(tmp_path: Path) -> None:
    assert_equals_alone("llama", policy(tokens=200), None, tmp_path, calls=CALLS)


def test_every_real_entry_ends_up_in_one_kept_entry() -> None:
    """Values of one: kept entries that are means of n ones stay 1; sums over members give L."""
    generator = torch.Generator().manual_seed(3)
    key = torch.randn(2, 2, 12, 4, generator=generator)
    cut = cut_of(key, capacity=5, padding=(0, 3), sinks=1, recent=1)
    retained = Best().select(cut, torch.rand(2, 1, 12, generator=generator))
    reduced = NearestMean().reduce(cut, retained)
    for row, start in ((0, 0), (1, 3)):
        kept = retained.index[row, 0].tolist()
        anchors = [j for j in kept if start + 1 <= j < 11]
        whole = torch.zeros(2, 4)
        for place, slot in enumerate(kept):
            joined = [t for t in range(start, 12) if t not in kept and nearest(t, anchors) == slot]
            whole += reduced.key[row, :, place] * (1 + len(joined))
        torch.testing.assert_close(whole, key[row, :, start:].sum(1))


def test_nothing_lost_is_nothing_changed() -> None:
    cut = cut_of(torch.randn(1, 2, 6, 4, generator=torch.Generator().manual_seed(0)), capacity=6)
    reduced = NearestMean().reduce(cut, Best().select(cut, torch.rand(1, 1, 6)))
    assert torch.equal(reduced.key, cut.key)
    assert torch.equal(reduced.value, cut.value)


def test_only_protected_entries_stay() -> None:
    """No anchor: the others are dropped."""
    cut = cut_of(torch.randn(1, 2, 6, 4, generator=torch.Generator().manual_seed(0)), capacity=3, sinks=2, recent=1)
    reduced = NearestMean().reduce(cut, Best().select(cut, torch.rand(1, 1, 6)))
    assert torch.equal(reduced.key, cut.key[:, :, [0, 1, 5]])


def test_a_single_token_merges_nothing() -> None:
    """Not even into the first entry, the only one that goes through the means then."""
    cut = cut_of(torch.randn(1, 2, 6, 4, generator=torch.Generator().manual_seed(0)), capacity=5, new=1)
    kept = [0, 2, 3, 4, 5]
    reduced = NearestMean().reduce(cut, Retained(torch.tensor([[kept, kept]])))
    assert torch.equal(reduced.key, cut.key[:, :, kept])
    assert torch.equal(reduced.value, cut.value[:, :, kept])


def test_a_window_that_does_not_fit_is_refused() -> None:
    program = program_of("llama")
    loaded = load_policy(policy(tokens=20), presets=library())
    with pytest.raises(PlanError, match="at least 26"):
        make_cache_plan(loaded, program, cache_sites(program))
