"""CompressKV against its formula: chosen heads rate, and layers keep what their errors ask for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import Tensor

from tests.decoders.engine import assert_equals_alone
from tests.decoders.oracle import Call, Rule
from tests.decoders.tiny import program_of
from tokcc.analysis.cache_sites import cache_sites
from tokcc.config import load_policy
from tokcc.errors import PlanError, PolicyError
from tokcc.passes.cache.planning import make_cache_plan
from tokcc.passes.cache.rebuild import RebuildCaches
from tokcc.passes.cache.selectors.layer_weights import LayerWeights
from tokcc.passes.methods import library

CALLS = (14, 1, 1, 5, *[1] * 64)
HEADS = [[0, 3], [2], [1, 2, 3]]
ERRORS = [0.5, 2.0, 1.0]


def capacities(mean: int, errors: list[float], least: int, most: int) -> list[int]:
    """The published arithmetic."""
    n = len(errors)
    weights = [e / sum(errors) for e in errors]
    kept = [min(max(least + round(w * (n * mean - least * n)), least), most) for w in weights]
    while sum(kept) != n * mean:
        short = sum(kept) < n * mean
        ranking = sorted(range(n), key=lambda i: (-weights[i] if short else weights[i], i))
        for i in ranking:
            if sum(kept) < n * mean and short and kept[i] < most:
                kept[i] += 1
            if sum(kept) > n * mean and not short and kept[i] > least:
                kept[i] -= 1
    return kept


def smoothed(row: list[float], kernel: int, pool: str) -> list[float]:
    half, result = kernel // 2, []
    for j in range(len(row)):
        near = [row[i] for i in range(j - half, j + half + 1) if 0 <= i < len(row)]
        result.append(max(near) if pool == "max" else sum(near) / kernel)
    return result


def rule(counts: list[int], window: int, kernel: int, pool: str = "avg") -> Rule:
    def evict(call: Call) -> Tensor | None:
        capacity = counts[call.layer]
        if call.new == 1 or call.total <= capacity:
            return None
        front = call.total - window
        rows = range(max(0, call.new - window), call.new)
        votes = [0.0] * front
        for head in HEADS[call.layer]:
            sums = [sum(float(call.probs[head, i, j]) for i in rows) for j in range(front)]
            votes = [a + b for a, b in zip(votes, smoothed(sums, kernel, pool), strict=True)]
        order = sorted(range(front), key=lambda j: (-votes[j], j))[: capacity - window]
        return torch.tensor([sorted([*order, *range(front, call.total)])] * call.key.shape[0])

    return evict


def policy(**given: object) -> dict[str, object]:
    capacity = {} if "budget" in given else {"tokens": 8}
    settings = {**capacity, "least": 5, "window": 3, "kernel": 3, **given}
    return {"version": 1, "name": "compresskv", "steps": [{"preset": "compresskv", **settings}]}


@pytest.mark.parametrize(
    ("family", "pool", "padding"),
    [("llama", "avg", (0, 3, 5)), ("llama", "max", (0,)), ("qwen2", "avg", (0, 3, 5)), ("gpt2", "avg", (0, 3, 5))],
)
def test_equals_the_formula(family: str, pool: str, padding: tuple[int, ...], tmp_path: Path) -> None:
    counts = capacities(8, ERRORS, 5, 24)
    assert counts == [6, 10, 8]
    engine = assert_equals_alone(
        family,
        policy(raters=HEADS, errors=ERRORS, pool=pool),
        rule(counts, 3, 3, pool),
        tmp_path,
        calls=CALLS,
        padding=padding,
    )
    assert "different numbers of entries" in engine.plan.warnings[-1]


def test_a_capacity_that_does_not_bind(tmp_path: Path) -> None:
    assert_equals_alone("llama", policy(raters=HEADS, errors=ERRORS, tokens=300, least=200), None, tmp_path)


@pytest.mark.parametrize("kind", ["json", "safetensors"])
def test_a_profile_says_the_same(kind: str, tmp_path: Path) -> None:
    heads = [[0, 3], [2, 1], [1, 2]]
    path = tmp_path / f"measured.{kind}"
    if kind == "json":
        path.write_text(json.dumps({"heads": heads, "errors": ERRORS}))
    else:
        save_file({"heads": np.array(heads), "errors": np.array(ERRORS, np.float32)}, str(path))
    written, listed = (plan(policy(**given)) for given in ({"profile": str(path)}, {"raters": heads, "errors": ERRORS}))
    for layer in range(3):
        assert written[layer].score.raters == listed[layer].score.raters
        assert written[layer].select.shares(8) == listed[layer].select.shares(8)


@pytest.mark.parametrize("mean", [32, 33, 64, 511, 2048])
@pytest.mark.parametrize(
    "errors",
    [
        [1.0] * 7,
        [100.0, *[0.01] * 31],  # one layer wants more than it may have
        [float(x) for x in np.random.default_rng(0).exponential(size=32)],
        [0.0, 0.0, 1.0],
    ],
)
def test_the_capacities_sum_up_exactly(mean: int, errors: list[float]) -> None:
    kept = LayerWeights(errors=errors).shares(mean)
    assert sum(kept) == len(errors) * mean
    assert kept == capacities(mean, errors, 32, 3 * mean)
    assert all(32 <= count <= 3 * mean for count in kept)


def plan(given: dict[str, object]) -> dict[int, object]:
    program = program_of("llama")
    return make_cache_plan(load_policy(given, presets=library()), program, cache_sites(program)).evictions


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({}, "list the query heads of each layer, or name a `profile`"),
        ({"raters": HEADS}, "list one for each layer of the model, or name a `profile`"),
        ({"raters": HEADS, "errors": [0.0, 0.0, 0.0]}, "not all of them zero"),
        ({"raters": [[0], [], [1]], "errors": ERRORS}, "layer 1 needs one or more different heads"),
        ({"raters": [[0], [2, 2], [1]], "errors": ERRORS}, "layer 1 needs one or more different heads"),
        ({"raters": HEADS, "errors": ERRORS, "profile": "x.json"}, "and a profile as well"),
        ({"raters": HEADS, "errors": ERRORS, "kernel": 4}, "even kernel"),
        ({"profile": "nowhere.json"}, "cannot be read"),
        ({"profile": "nowhere.safetensors"}, "cannot be read"),
    ],
)
def test_what_is_missing_or_wrong_is_said(given: dict[str, object], match: str) -> None:
    with pytest.raises(PolicyError, match=match):
        plan(policy(**given))


@pytest.mark.parametrize(
    ("content", "match"), [("[]", "not a json object"), ("{", "cannot be read"), ("{}", "no entry")]
)
def test_bad_profiles_are_refused(content: str, match: str, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(content)
    with pytest.raises(PolicyError, match=match):
        plan(policy(profile=str(path)))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"raters": [[0], [1], [4]], "errors": ERRORS}, "the heads that rate layer 2 do not fit"),
        ({"raters": [[0], [1]], "errors": ERRORS}, "the heads that rate layer 2 do not fit"),
        ({"raters": HEADS, "errors": [1.0, 1.0]}, "weights of the layers do not fit"),
        ({"raters": HEADS, "errors": ERRORS, "least": 9}, "do not fit the budget"),
        ({"raters": HEADS, "errors": ERRORS, "least": 2}, "do not fit the budget"),
        ({"raters": HEADS, "errors": ERRORS, "budget": {"keep": 0.5}}, "fixed capacity"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(given: dict[str, object], match: str) -> None:
    program = program_of("llama")
    made = make_cache_plan(load_policy(policy(**given), presets=library()), program, cache_sites(program))
    with pytest.raises(PlanError, match=match):
        RebuildCaches(made).run(program)
