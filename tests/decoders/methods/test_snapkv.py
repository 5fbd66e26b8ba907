"""SnapKV against its formula: what the last queries of a prompt attend to, smoothed; appended tokens stay."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.decoders.engine import assert_equals_alone
from tests.decoders.methods.cuts import cut_of
from tests.decoders.oracle import Call, Rule
from tokcc.config import load_policy
from tokcc.errors import PlanError, PolicyError
from tokcc.passes.cache.planning import make_cache_plan
from tokcc.passes.cache.scores.window_attention import WindowAttention
from tokcc.passes.methods import library

__all__ = ["scores", "top"]


def smoothed(row: list[float], kernel: int, pool: str) -> list[float]:
    """Zeros beyond the edges for a mean over the whole kernel, nothing there for a maximum."""
    half, result = kernel // 2, []
    for j in range(len(row)):
        near = [row[i] for i in range(j - half, j + half + 1) if 0 <= i < len(row)]
        result.append(max(near) if pool == "max" else sum(near) / kernel)
    return result


def scores(call: Call, window: int, kernel: int, pool: str, group: str, when: str) -> list[list[float]]:
    """By key head, for the tokens before the window."""
    columns = call.total - window
    rows = range(max(0, call.new - window), call.new)
    heads = [[sum(float(head[i, j]) for i in rows) for j in range(columns)] for head in call.probs]
    size = len(heads) // call.key.shape[0]
    if when == "after_pool":
        heads = [smoothed(head, kernel, pool) for head in heads]
    grouped = []
    for start in range(0, len(heads), size):
        of_group = heads[start : start + size]
        one = [max(x) if group == "max" else sum(x) / size for x in zip(*of_group, strict=True)]
        grouped.append(smoothed(one, kernel, pool) if when == "before_pool" else one)
    return grouped


def top(rows: list[list[float]], count: int, total: int) -> Tensor:
    """The best ``count`` before the window, and the window."""
    kept = []
    for row in rows:
        order = sorted(range(len(row)), key=lambda j: (-row[j], j))
        kept.append(sorted([*order[:count], *range(len(row), total)]))
    return torch.tensor(kept)


def rule(capacity: int, window: int, kernel: int, pool: str, group: str, when: str) -> Rule:
    def evict(call: Call) -> Tensor | None:
        if call.new == 1 or call.total <= capacity:
            return None
        return top(scores(call, window, kernel, pool, group, when), capacity - window, call.total)

    return evict


def policy(**given: object) -> dict[str, object]:
    return {"version": 1, "name": "snapkv", "steps": [{"preset": "snapkv", **given}]}


@pytest.mark.parametrize(
    ("family", "pool", "group", "when"),
    [
        ("llama", "max", "mean", "before_pool"),
        ("llama", "avg", "max", "after_pool"),
        ("qwen2", "max", "max", "after_pool"),
        ("gpt2", "avg", "mean", "before_pool"),
    ],
)
def test_equals_the_formula(family: str, pool: str, group: str, when: str, tmp_path: Path) -> None:
    """The second text is shorter than the window, and padding is still in the cache."""
    given = policy(tokens=12, window=6, kernel=3, pool=pool, group=group, when=when)
    assert_equals_alone(family, given, rule(12, 6, 3, pool, group, when), tmp_path)


def test_a_narrow_window_and_a_kernel_wider_than_the_text(tmp_path: Path) -> None:
    given = policy(tokens=5, window=2, kernel=11)
    assert_equals_alone("llama", given, rule(5, 2, 11, "max", "mean", "before_pool"), tmp_path)


def test_a_capacity_that_does_not_bind(tmp_path: Path) -> None:
    assert_equals_alone("llama", policy(tokens=200), None, tmp_path)


def test_padding_counts_nothing() -> None:
    """Neither as columns nor at the edge of a pool."""
    cut = cut_of(torch.randn(1, 2, 9, 8, generator=torch.Generator().manual_seed(0)), padding=(5,))
    tail = {"query": cut.query[:, :, 5:], "key": cut.key[:, :, 5:], "real": cut.real[:, 5:]}
    alone = dataclasses.replace(cut, **tail, total=4, new=4)
    for pool in ("avg", "max"):
        score = WindowAttention(window=2, pool=pool, kernel=3)
        wanted = score.emit(alone)
        assert float(wanted.max()) > 0
        torch.testing.assert_close(score.emit(cut)[:, :, 5:], wanted)


def test_even_kernels_are_refused() -> None:
    with pytest.raises(PolicyError, match="even kernel"):
        make_plan(policy(kernel=4))


def test_a_window_wider_than_the_capacity_is_refused() -> None:
    with pytest.raises(PlanError, match="protected"):
        make_plan(policy(tokens=16, window=32))


def make_plan(given: dict[str, object]) -> None:
    from tests.decoders.tiny import program_of
    from tokcc.analysis.cache_sites import cache_sites

    program = program_of("llama")
    make_cache_plan(load_policy(given, presets=library()), program, cache_sites(program))
