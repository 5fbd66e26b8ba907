"""The composition of CRITIC against its formula: attention, entropy and key length, each between 0 and 1."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.decoders.engine import assert_equals_alone
from tests.decoders.methods.cuts import cut_of
from tests.decoders.methods.rules import best
from tests.decoders.oracle import Call, Rule
from tests.decoders.tiny import program_of
from tokcc.analysis.cache_sites import cache_sites
from tokcc.config import load_policy
from tokcc.errors import PlanError, PolicyError
from tokcc.passes.cache.planning import make_cache_plan
from tokcc.passes.cache.scores.weighted_sum import WeightedSum
from tokcc.passes.cache.scores.window_entropy import WindowEntropy
from tokcc.passes.methods import library

CALLS = (9, 1, 1, 5, *[1] * 64)


def scaled(row: list[float]) -> list[float]:
    low, high = min(row), max(row)
    return [(x - low) / (high - low) if high > low else 0.0 for x in row]


def entropy(column: list[float]) -> float:
    whole = sum(column)
    return -sum(a / whole * math.log(a / whole) for a in column if a > 0) if whole > 0 else 0.0


def rating(call: Call, window: int, weights: tuple[float, float, float]) -> list[float]:
    """By token, the same for all heads."""
    probs = call.probs.double()
    heads, rows, total = probs.shape
    asking = range(max(0, rows - window), rows)
    attention, spread, length = [], [], []
    for j in range(total):
        inside = j >= total - window
        columns = [[float(probs[h, i, j]) for i in asking] for h in range(heads)]
        attention.append(0.0 if inside else sum(sum(column) for column in columns) / heads)
        spread.append(0.0 if inside else sum(entropy(column) for column in columns) / heads)
        norms = [math.sqrt(sum(float(x) ** 2 for x in head[j])) for head in call.key]
        length.append(sum(norms) / len(norms))
    parts = [scaled(attention), scaled(spread), scaled(length)]
    return [sum(w * part[j] for w, part in zip(weights, parts, strict=True)) for j in range(total)]


def rule(capacity: int, window: int, sinks: int, weights: tuple[float, float, float]) -> Rule:
    def evict(call: Call) -> Tensor | None:
        if call.new == 1 or call.total <= capacity:
            return None
        one = torch.tensor(rating(call, window, weights), dtype=torch.float64)
        return best(one.expand(call.key.shape[0], -1), capacity, sinks=sinks, recent=window)

    return evict


def policy(**given: object) -> dict[str, object]:
    return {"version": 1, "name": "critic", "steps": [{"preset": "critic-kv", **given}]}


@pytest.mark.parametrize(
    ("family", "weights"),
    [("llama", (1.0, 1.0, 1.0)), ("llama", (0.0, 1.0, 0.0)), ("qwen2", (1.0, 0.5, 2.0)), ("gpt2", (0.5, 0.0, 1.0))],
)
def test_equals_the_formula(family: str, weights: tuple[float, float, float], tmp_path: Path) -> None:
    given = dict(zip(("attention", "entropy", "norm"), weights, strict=True))
    policy_of = policy(tokens=8, window=3, sinks=2, **given)
    assert_equals_alone(family, policy_of, rule(8, 3, 2, weights), tmp_path, calls=CALLS)


def test_one_row(tmp_path: Path) -> None:
    given = policy(tokens=6, window=2, sinks=1)
    assert_equals_alone("llama", given, rule(6, 2, 1, (1.0, 1.0, 1.0)), tmp_path, padding=(0,))


def test_a_capacity_that_does_not_bind(tmp_path: Path) -> None:
    assert_equals_alone("llama", policy(tokens=200), None, tmp_path, calls=CALLS)


def test_any_scores_can_be_summed(tmp_path: Path) -> None:
    """Two that carry states of one name, in every head, with eviction in every step."""
    terms = [{"score": {"kind": "attention_sum"}, "weight": 2.0}, {"score": {"kind": "softened_sum", "over": 8}}]
    step = {
        "node": "evict_kv",
        "score": {"kind": "weighted_sum", "terms": terms},
        "select": {"kind": "best", "recent": 3},
        "budget": {"tokens": 9},
    }

    def evict(call: Call) -> Tensor | None:
        carried = call.memory.values
        step = carried["step"] = carried.get("step", 0) + 1 if call.new == 1 else 0
        scores = []
        for name, tau in (("plain", 1.0), ("soft", 1.0 + min(step / 8, 1.0))):
            soft = call.probs.double() ** (1 / tau)
            soft = soft / soft.sum(-1, keepdim=True)
            sums = soft.unflatten(0, (call.key.shape[0], -1)).sum(2).mean(1)
            before = carried.get(name)
            if before is not None:
                sums[:, : before.shape[1]] += before
            carried[name] = sums
            scores.append(torch.tensor([scaled(head) for head in sums.tolist()], dtype=torch.float64))
        keep = best(2 * scores[0] + scores[1], 9, recent=3)
        if keep is not None:
            for name in ("plain", "soft"):
                carried[name] = carried[name].gather(1, keep)
        return keep

    assert_equals_alone("llama", {"version": 1, "name": "sum", "steps": [step]}, evict, tmp_path, calls=CALLS)


def test_the_entropy_of_equal_attention() -> None:
    scores = WindowEntropy(window=3).emit(cut_of(torch.zeros(1, 2, 9, 8), padding=(2,)))
    # Slots 2 to 5 are real and before the window; each query shares out its attention evenly, 5 to 7 slots wide.
    shares = torch.tensor([1 / 5, 1 / 6, 1 / 7])
    shares = shares / shares.sum()
    wanted = torch.full((1, 2, 4), -float((shares * shares.log()).sum()))
    torch.testing.assert_close(scores[:, :, 2:6], wanted)
    assert not scores[:, :, :2].any()
    assert not scores[:, :, 6:].any()


def test_a_score_that_is_the_same_everywhere_adds_nothing() -> None:
    key = torch.ones(1, 2, 7, 8)
    score = WeightedSum(terms=({"score": {"kind": "key_norm"}}, {"score": {"kind": "position"}, "weight": 3.0}))
    torch.testing.assert_close(score.emit(cut_of(key))[0, 0], torch.arange(7) / 2.0)
    assert not score.once
    assert score.by_key_norm
    assert not score.keeps_sinks


def test_padding_is_neither_minimum_nor_maximum() -> None:
    cut = cut_of(torch.randn(1, 2, 9, 8, generator=torch.Generator().manual_seed(0)), padding=(5,))
    cut.key[:, :, 0], cut.key[:, :, 1] = 0.0, 50.0
    tail = {"query": cut.query[:, :, 5:], "key": cut.key[:, :, 5:], "real": cut.real[:, 5:]}
    alone = dataclasses.replace(cut, **tail, total=4, new=4)
    terms = ({"score": {"kind": "key_norm"}}, {"score": {"kind": "window_entropy", "window": 2}})
    for heads in ("each", "mean"):
        score = WeightedSum(terms=terms, heads=heads)
        torch.testing.assert_close(score.emit(cut)[:, :, 5:], score.emit(alone))


def refused(step: dict[str, object], error: type[Exception], match: str) -> None:
    program = program_of("llama")
    loaded = load_policy({"version": 1, "name": "bad", "steps": [step]}, presets=library())
    with pytest.raises(error, match=match):
        make_cache_plan(loaded, program, cache_sites(program))


def test_bad_terms_are_refused() -> None:
    def step(*terms: object) -> dict[str, object]:
        return {"node": "evict_kv", "score": {"kind": "weighted_sum", "terms": list(terms)}, "budget": {"tokens": 8}}

    refused(step(), PolicyError, "terms")
    refused(step({"score": {"kind": "nonsense"}}), PolicyError, "unknown cache.score `nonsense`")
    refused(step({"score": {"kind": "window_attention", "kernel": 4}}), PolicyError, "even kernel")
    refused(step({"score": {"kind": "key_norm"}, "weight": -1.0}), PolicyError, "weight")


def test_more_protected_tokens_than_the_capacity_are_refused() -> None:
    refused({"preset": "critic-kv", "tokens": 16}, PlanError, "protected")
    with pytest.raises(PolicyError, match="norm"):
        load_policy(policy(norm=-1.0), presets=library())
