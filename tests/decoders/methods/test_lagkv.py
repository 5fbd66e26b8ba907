"""LagKV against its formula: ranks within chunks, relative to the chunk that follows."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.decoders.engine import assert_equals_alone
from tests.decoders.methods.cuts import cut_of
from tests.decoders.oracle import Call, Rule
from tests.decoders.tiny import program_of
from tokcc.analysis.cache_sites import cache_sites
from tokcc.config import load_policy
from tokcc.errors import PlanError
from tokcc.passes.cache.planning import make_cache_plan
from tokcc.passes.cache.scores.lag_relative import LagRelative
from tokcc.passes.cache.selectors.best import Best
from tokcc.passes.methods import library

EPS = 1e-6


def spread(chunk: Tensor, following: Tensor) -> list[float]:
    """Softmax over a chunk ``[g, D]`` of the standard deviation relative to the next one."""
    width = chunk.shape[1]
    low = [min(float(x) for x in following[:, d]) for d in range(width)]
    high = [max(float(x) for x in following[:, d]) for d in range(width)]
    deviations = []
    for token in chunk:
        scaled = [(float(token[d]) - low[d]) / (high[d] - low[d] + EPS) for d in range(width)]
        mean = sum(scaled) / width
        deviations.append(math.sqrt(sum((x - mean) ** 2 for x in scaled) / (width - 1)))
    raised = [math.exp(x - max(deviations)) for x in deviations]
    return [x / sum(raised) for x in raised]


def ranks(keys: Tensor, values: Tensor, next_keys: Tensor, next_values: Tensor) -> list[float]:
    """From 0 for the worst of a chunk to (g - 1) / g for the best."""
    size = len(keys)
    both = zip(spread(keys, next_keys), spread(values, next_values), strict=True)
    worth = [(a + b) / 2 for a, b in both]
    order = sorted(range(size), key=lambda i: (-worth[i], i))
    return [(size - 1 - order.index(i)) / size for i in range(size)]


def rule(capacity: int, chunk: int, sinks: int) -> Rule:
    """Each entry is a sink, waits for its rank, or has one for good."""

    def evict(call: Call) -> Tensor | None:
        kept = []
        states = call.memory.values.setdefault("ranks", [[] for _ in call.key])
        for head, state in enumerate(states):
            state += [None] * call.new
            waiting = [j for j in range(call.total) if j >= sinks and state[j] is None]
            keys, values = call.key[head], call.value[head]
            while len(waiting) >= 2 * chunk:
                own, after = waiting[:chunk], waiting[chunk : 2 * chunk]
                for j, rank in zip(own, ranks(keys[own], values[own], keys[after], values[after]), strict=True):
                    state[j] = rank
                waiting = waiting[chunk:]
            rated = [j for j in range(call.total) if state[j] is not None]
            count = min(len(rated), capacity - (call.total - len(rated)))
            stay = sorted(rated, key=lambda j: (-state[j], j))[: max(count, 0)]
            kept.append([j for j in range(call.total) if state[j] is None or j in stay])
        if call.total <= capacity:
            return None
        call.memory.values["ranks"] = [[state[j] for j in keep] for state, keep in zip(states, kept, strict=True)]
        return torch.tensor(kept)

    return evict


def policy(**given: object) -> dict[str, object]:
    return {"version": 1, "name": "lagkv", "steps": [{"preset": "lagkv", **given}]}


@pytest.mark.parametrize(("family", "tokens"), [("llama", 9), ("llama", 7), ("gpt2", 8), ("qwen3", 12)])
def test_equals_the_formula(family: str, tokens: int, tmp_path: Path) -> None:
    assert_equals_alone(family, policy(tokens=tokens, chunk=3, sinks=2), rule(tokens, 3, 2), tmp_path)


def test_many_chunks_at_once(tmp_path: Path) -> None:
    given, calls = policy(tokens=16, chunk=4, sinks=1), (30, 1, 1, 13, *[1] * 24)
    assert_equals_alone("llama", given, rule(16, 4, 1), tmp_path, calls=calls)


def test_a_capacity_that_does_not_bind(tmp_path: Path) -> None:
    assert_equals_alone("llama", policy(tokens=500), None, tmp_path)


def test_every_chunk_but_the_last_gives_its_share() -> None:
    """The published count for a prompt: sinks, r g of each full chunk but the last, that chunk, and the rest."""
    generator = torch.Generator().manual_seed(0)
    sinks, g, share, chunks, rest = 4, 8, 3, 5, 6
    total = sinks + chunks * g + rest
    key, value = (torch.randn(1, 2, total, 16, generator=generator) for _ in range(2))
    states = {"key_rank": torch.zeros(1, 2, 0)}
    capacity = sinks + (chunks - 1) * share + g + rest
    cut = cut_of(key, value=value, capacity=capacity, sinks=sinks, states=states)
    index = Best(sinks=sinks).select(cut, LagRelative(chunk=g).emit(cut)).index
    for head in index[0]:
        counts = [sum(sinks + c * g <= int(j) < sinks + (c + 1) * g for j in head) for c in range(chunks)]
        assert counts == [share] * (chunks - 1) + [g]
        assert {int(j) for j in head} >= {*range(sinks), *range(total - rest, total)}


def test_a_capacity_below_what_waits_is_refused() -> None:
    program = program_of("llama")
    with pytest.raises(PlanError, match="protected") as caught:
        make_cache_plan(load_policy(policy(tokens=200), presets=library()), program, cache_sites(program))
    assert "at least 259" in str(caught.value.needed)
