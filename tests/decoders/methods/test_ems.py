"""EMS against its formula: the larger of two kinds of attention, near-duplicates merged, the rest discarded."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.decoders.engine import assert_equals_alone
from tests.decoders.methods.cuts import cut_of
from tests.decoders.methods.rules import best
from tests.decoders.oracle import Call, Merged, Rule
from tests.decoders.tiny import program_of
from tokcc.analysis.cache_sites import cache_sites
from tokcc.config import load_policy
from tokcc.errors import PlanError, PolicyError
from tokcc.passes.cache.planning import make_cache_plan
from tokcc.passes.cache.rebuild import RebuildCaches
from tokcc.passes.cache.reducers.zero_class import ZeroClass
from tokcc.passes.cache.selectors.rated import Rated, RatedBest
from tokcc.passes.methods import library

CALLS = (14, 1, 1, 7, *[1] * 64)


def cosine(a: Tensor, b: Tensor) -> float:
    x, y = a.double(), b.double()
    return float((x * y).sum()) / math.sqrt(float((x * x).sum()) * float((y * y).sum()))


def rating(group: Tensor, window: int, kernel: int) -> list[float]:
    """Of one key head, from probabilities ``[G, S, L]``."""
    size, rows, total = group.shape
    past, front = total - rows, total - window
    everywhere, local = [0.0] * total, [0.0] * total
    for j in range(front):
        viewers = [i for i in range(rows) if past + i >= j]
        everywhere[j] = sum(float(group[h, i, j]) for h in range(size) for i in viewers) / size / len(viewers)
        asking = range(max(0, rows - window), rows)
        local[j] = sum(float(group[h, i, j]) for h in range(size) for i in asking) / size / len(asking)
    if max(everywhere) > 0:
        everywhere = [x / max(everywhere) for x in everywhere]
    if max(local) > 0:
        local = [x / max(local) for x in local]
    score = [max(x, y) for x, y in zip(everywhere, local, strict=True)]
    half = kernel // 2
    return [sum(score[max(0, j - half) : j + half + 1]) / kernel for j in range(total)]


def rule(
    capacity: int, window: int, sinks: int, *, kernel: int = 3, candidates: int = 2, threshold: float = 0.3
) -> Rule:
    joined_at_all = []

    def evict(call: Call) -> Tensor | Merged | None:
        if call.new == 1 or call.total <= capacity:
            return None
        keys, values, indices = [], [], []
        for head, group in enumerate(call.grouped):
            score = rating(group, window, kernel)
            keep = best(torch.tensor([score], dtype=torch.float64), capacity, sinks=sinks, recent=window)
            kept = keep[0].tolist()
            others = sorted((j for j in range(call.total) if j not in kept), key=lambda j: (-score[j], j))
            centers = [j for j in kept if sinks <= j < call.total - window]
            members = {j: [j] for j in kept}
            for t in others[: (candidates - 1) * capacity]:
                likeness = [(cosine(call.key[head, t], call.key[head, c]), -c) for c in centers]
                if likeness and max(likeness)[0] > threshold:
                    members[-max(likeness)[1]].append(t)
                    joined_at_all.append(t)
            for made, rows in ((keys, call.key[head]), (values, call.value[head])):
                merged = []
                for j in kept:
                    if len(members[j]) == 1:
                        merged.append(rows[j].double())
                    else:
                        merged.append(
                            sum(score[t] * rows[t].double() for t in members[j]) / sum(score[t] for t in members[j])
                        )
                made.append(torch.stack(merged).to(rows.dtype))
            indices.append(keep[0])
        return Merged(torch.stack(indices), torch.stack(keys), torch.stack(values))

    evict.joined = joined_at_all  # type: ignore[attr-defined]
    return evict


def policy(**given: object) -> dict[str, object]:
    settings = {"kernel": 3, "candidates": 2, "threshold": 0.3, **given}
    return {"version": 1, "name": "ems", "steps": [{"preset": "ems", **settings}]}


@pytest.mark.parametrize(
    ("family", "tokens", "window", "sinks"),
    [("llama", 6, 2, 1), ("llama", 8, 3, 0), ("qwen2", 7, 3, 2), ("gpt2", 6, 2, 1)],
)
def test_equals_the_formula(family: str, tokens: int, window: int, sinks: int, tmp_path: Path) -> None:
    one = rule(tokens, window, sinks)
    given = policy(tokens=tokens, window=window, sinks=sinks)
    assert_equals_alone(family, given, one, tmp_path, calls=CALLS)
    assert one.joined, "something is merged"  # type: ignore[attr-defined]


def test_more_candidates_than_there_are_and_a_low_threshold(tmp_path: Path) -> None:
    one = rule(5, 2, 1, candidates=9, threshold=-1.0)
    given = policy(tokens=5, window=2, sinks=1, candidates=9, threshold=-1.0)
    assert_equals_alone("llama", given, one, tmp_path, calls=CALLS)


def test_one_row(tmp_path: Path) -> None:
    given = policy(tokens=6, window=2, sinks=1)
    assert_equals_alone("llama", given, rule(6, 2, 1), tmp_path, padding=(0,), calls=CALLS)


def test_a_capacity_that_does_not_bind(tmp_path: Path) -> None:
    assert_equals_alone("llama", policy(tokens=200), None, tmp_path, calls=CALLS)


def chosen(capacity: int) -> tuple[object, Rated]:
    generator = torch.Generator().manual_seed(5)
    key = torch.randn(2, 2, 14, 4, generator=generator)
    value = torch.ones(2, 2, 14, 4)
    cut = cut_of(key, value=value, capacity=capacity, padding=(0, 3), sinks=1, recent=2)
    retained = RatedBest().select(cut, torch.rand(2, 2, 14, generator=generator))
    assert isinstance(retained, Rated)
    return cut, retained


def test_a_threshold_above_one_is_eviction() -> None:
    cut, retained = chosen(5)
    reduced = ZeroClass(threshold=1.01).reduce(cut, retained)
    wanted = torch.ops.tokcc.gather_slots(cut.key, retained.index)
    torch.testing.assert_close(reduced.key, wanted)


def test_means_stay_means() -> None:
    """Ones merge to ones, whatever the weights."""
    cut, retained = chosen(5)
    reduced = ZeroClass(threshold=-1.0).reduce(cut, retained)
    torch.testing.assert_close(reduced.value, torch.ones(2, 2, 5, 4))
    assert not torch.allclose(reduced.key, torch.ops.tokcc.gather_slots(cut.key, retained.index))


def test_scores_of_zero_keep_the_entry() -> None:
    cut, retained = chosen(5)
    reduced = ZeroClass(threshold=1.01).reduce(cut, Rated(retained.index, score=torch.zeros(2, 2, 14)))
    torch.testing.assert_close(reduced.key, torch.ops.tokcc.gather_slots(cut.key, retained.index))


def test_bad_parameters_are_refused() -> None:
    program = program_of("llama")
    for given, error, match in (
        ({"kernel": 4}, PolicyError, "even kernel"),
        ({"tokens": 16}, PlanError, "protected"),
    ):
        with pytest.raises(error, match=match):
            make_cache_plan(load_policy(policy(**given), presets=library()), program, cache_sites(program))
    with pytest.raises(PolicyError, match="candidates"):
        load_policy(policy(candidates=0), presets=library())


def test_a_selector_that_hands_on_no_scores_is_refused() -> None:
    program = program_of("llama")
    step = {"node": "evict_kv", "score": "key_norm", "reduce": "zero_class", "budget": {"tokens": 8}}
    loaded = load_policy({"version": 1, "name": "bad", "steps": [step]}, presets=library())
    with pytest.raises(PlanError, match="rated_best"):
        RebuildCaches(make_cache_plan(loaded, program, cache_sites(program))).run(program)
