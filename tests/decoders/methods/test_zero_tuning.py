"""ZeroTuning against its formula: the first token's share times a factor, and all shares divided by their sum."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.decoders.engine import CALLS, assert_equals_alone, build, tokens
from tests.decoders.methods.rules import best
from tests.decoders.oracle import Call, Rule
from tests.decoders.tiny import model_of, program_of
from tokcc.analysis.cache_sites import cache_sites
from tokcc.config import load_policy
from tokcc.errors import PlanError, PolicyError, TokccError
from tokcc.ir.builder import EagerBuilder
from tokcc.kernels.cached_attention import cached_attention
from tokcc.passes.cache.biases.first_key import FirstKey
from tokcc.passes.cache.plan import CachePlan
from tokcc.passes.cache.planning import make_cache_plan
from tokcc.passes.cache.rebuild import RebuildCaches
from tokcc.passes.methods import library

Gammas = Mapping[tuple[int, int], float]
"""By layer and key head; 1 elsewhere."""
LAYERS = 3
TUNED = {"preset": "zero-tuning", "gamma": 0.5}
FIRST = {"kind": "listed", "heads": {0: [0]}}


def renormalised(probs: Tensor, gamma: Tensor) -> Tensor:
    """The published form, for probabilities ``[..., L]`` and a factor ``[..., 1]``."""
    first = probs[..., :1]
    total = 1 + (gamma - 1) * first
    return torch.cat([gamma * first / total, probs[..., 1:] / total], -1)


def tune(patch: pytest.MonkeyPatch, family: str, gammas: Gammas) -> None:
    """Let transformers' eager attention do it, for rows without padding whose first token is in the cache."""
    model = model_of(family)
    module = next(type(m).__module__ for m in model.modules() if hasattr(m, "layer_idx"))

    def forward(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **more: Any
    ) -> tuple[Tensor, Tensor]:
        heads, groups = key.shape[1], query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        logits = query @ key.transpose(2, 3) * scaling
        probs = torch.softmax(logits if mask is None else logits + mask[..., : key.shape[2]], -1)
        factors = torch.tensor([gammas.get((module.layer_idx, head), 1.0) for head in range(heads)])
        probs = renormalised(probs, factors.repeat_interleave(groups)[:, None, None])
        return (probs @ value).transpose(1, 2).contiguous(), probs

    patch.setattr(importlib.import_module(module), "eager_attention_forward", forward)


def everywhere(family: str, gamma: float) -> Gammas:
    return {(layer, head): gamma for layer in range(LAYERS) for head in range(16)}


def policy(*steps: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return {"version": 1, "name": "tuned", "steps": list(steps), **more}


@pytest.mark.parametrize(
    ("family", "gamma"),
    [("llama", 0.3), ("llama-mqa", 5.0), pytest.param("qwen3", 0.3, marks=pytest.mark.slow)],
)
def test_equals_the_formula(family: str, gamma: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune(monkeypatch, family, everywhere(family, gamma))
    engine = assert_equals_alone(family, policy({"preset": "zero-tuning", "gamma": gamma}), None, tmp_path)
    assert engine.program.output_names == program_of(family).output_names


def test_the_factor_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under another factor the comparison fails."""
    tune(monkeypatch, "llama", everywhere("llama", 0.8))
    with pytest.raises(AssertionError):
        assert_equals_alone("llama", policy({"preset": "zero-tuning", "gamma": 0.3}), None, tmp_path)


def test_heads_of_two_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some heads up, others down, the rest as they are."""
    tune(monkeypatch, "llama", {(0, 1): 4.0, (2, 0): 4.0, (0, 0): 0.25, (1, 1): 0.25})
    up = {"preset": "zero-tuning", "gamma": 4.0, "heads": {"kind": "listed", "heads": {0: [1], 2: [0]}}}
    down = {"preset": "zero-tuning", "gamma": 0.25, "heads": {"kind": "listed", "heads": {0: [0], 1: [1]}}}
    assert_equals_alone("llama", policy(up, down), None, tmp_path)


def tova(capacity: int, sinks: int) -> Rule:
    def evict(call: Call) -> Tensor | None:
        scores = call.probs[:, -1].mean(0).expand(call.key.shape[0], -1)
        return best(scores, capacity, sinks=sinks)

    return evict


@pytest.mark.parametrize("layout", ["merged", pytest.param("slots", marks=pytest.mark.slow)])
def test_beside_a_method_that_rates_by_attention(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it rates by is the attention that there is; the first token is in no danger."""
    tune(monkeypatch, "llama", everywhere("llama", 0.3))
    step = {"preset": "tova", "tokens": 8, "sinks": 1}
    given = policy(step, {"preset": "zero-tuning", "gamma": 0.3}, kv={"layout": layout})
    if layout == "slots":
        engine = assert_equals_alone("llama", given, tova(8, 1), tmp_path, padding=(0,))
        assert engine.plan.fixed
    else:
        assert_equals_alone("llama", given, tova(8, 1), tmp_path)


@pytest.mark.slow
def test_a_slot_for_every_token(tmp_path: Path) -> None:
    """Whole caches in buffers of a fixed length: the first token is found among slots that are not filled, too."""
    ids, mask = tokens(3, sum(CALLS), (0, 3, 5))
    results = []
    for kv in ({"layout": "merged"}, {"layout": "slots", "tokens": 96}):
        results.append(build("llama", policy(TUNED, kv=kv), tmp_path).run(ids, mask, CALLS)[0][mask.bool().numpy()])
    assert np.abs(results[0] - results[1]).max() <= 1e-5 * np.abs(results[0]).max()


@pytest.mark.slow
def test_beside_a_method_that_rates_some_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first layer is tuned, all are evicted from; sums of attention."""
    tune(monkeypatch, "llama", {(0, 0): 6.0, (0, 1): 6.0})

    def sunk(call: Call) -> Tensor | None:
        fresh = call.grouped.sum(2).mean(1)
        before = call.memory.values.get("score", torch.zeros(call.key.shape[0], 0))
        fresh[:, : before.shape[1]] += before
        keep = best(fresh, 10, sinks=2, recent=3)
        rows = torch.arange(len(fresh))[:, None]
        call.memory.values["score"] = fresh if keep is None else fresh[rows, keep]
        return keep

    tuned = {"preset": "zero-tuning", "gamma": 6.0, "at": {"layers": [0]}}
    evicting = {"preset": "h2o", "budget": {"kv": {"sinks": 2, "recent": 3, "heavy": 5}}}
    assert_equals_alone("llama", policy(tuned, evicting), sunk, tmp_path)


def planned(family: str, given: Mapping[str, Any] | str) -> CachePlan:
    program = program_of(family)
    return make_cache_plan(load_policy(given, presets=library()), program, cache_sites(program))


def test_a_factor_of_one_changes_nothing() -> None:
    program, plan = program_of("llama"), planned("llama", policy({"preset": "zero-tuning", "gamma": 1.0}))
    assert not plan.changes
    made, wanted = (RebuildCaches(p).run(program).program for p in (plan, planned("llama", "none")))
    assert [str(node.format_node()) for node in made.graph.nodes] == [str(n.format_node()) for n in wanted.graph.nodes]


@pytest.mark.parametrize("gamma", [1e-3, 0.6, 1.0, 2.5, 1e3])
@pytest.mark.parametrize("padding", [0, 3])
def test_the_bias_is_the_formula(gamma: float, padding: int) -> None:
    """Shares of values that stand apart, in double precision: 1e-6."""
    generator = torch.Generator().manual_seed(padding)
    query, key = (torch.randn(1, heads, 12, 8, dtype=torch.float64, generator=generator) for heads in (4, 2))
    real = torch.arange(12)[None] >= padding
    value = torch.eye(12, dtype=torch.float64).expand(1, 2, 12, 12)
    bias = FirstKey(gamma=gamma).emit(EagerBuilder(), real)
    plain, tuned = (
        cached_attention(query, key, value, real, 0, 0.5, 0.0, b)[0] for b in (None, bias[:, None].expand(1, 2, 12))
    )
    rows = slice(padding, None)
    wanted = renormalised(plain[:, :, rows, rows], torch.tensor(gamma, dtype=torch.float64))
    torch.testing.assert_close(tuned[:, :, rows, rows], wanted, rtol=0, atol=1e-6)


def refused(kind: type[TokccError], what: str, *steps: Mapping[str, Any]) -> Any:
    return pytest.param(kind, what, policy(*steps), id=what)


@pytest.mark.parametrize(
    ("kind", "what", "given"),
    [
        refused(PlanError, "`tova` may evict the first token", {"preset": "tova", "tokens": 8}, TUNED),
        refused(PlanError, "reads a part of the cache", {"preset": "quest"}, TUNED),
        refused(PlanError, "makes prompts shorter", {"preset": "lazyllm-prefill", "layers": [0, 1], "keep": [0.5, 0.3]},
                TUNED),
        refused(PolicyError, "two steps add to the logits of layer 0", TUNED, {**TUNED, "heads": FIRST}),
        refused(PolicyError, "`score` does not go with", {**TUNED, "score": {"kind": "attention_sum"}}),
        refused(PolicyError, "is for biased attention", {"preset": "tova", "bias": {"kind": "first_key", "gamma": 2}}),
        refused(PolicyError, "says no `bias`", {"node": "bias_attention"}),
        refused(PolicyError, "gamma", {**TUNED, "gamma": 0.0}),
    ],
)  # fmt: skip
def test_refused(kind: type[TokccError], what: str, given: Mapping[str, Any]) -> None:
    with pytest.raises(kind, match=what):
        planned("llama", given)


def test_only_where_the_first_token_may_go() -> None:
    """A method in other layers, or one that keeps it, is none of its business."""
    steps: Sequence[Mapping[str, Any]] = ({"preset": "tova", "tokens": 8, "at": {"layers": "1:"}}, TUNED)
    assert len(planned("llama", policy(steps[0], {**TUNED, "at": {"layers": [0]}})).biases) == 1
    assert len(planned("llama", policy({**steps[0], "sinks": 1}, TUNED)).biases) == LAYERS
    other = {"preset": "tova", "tokens": 8, "heads": {"kind": "listed", "heads": {0: [1]}}}
    assert len(planned("llama", policy(other, {**TUNED, "heads": FIRST})).biases) == 1


@pytest.mark.slow
def test_windows_are_left_out() -> None:
    """The first token leaves a sliding window, which later queries see without it."""
    plan = planned("gemma3", policy(TUNED))
    assert [bias.layer for bias in plan.biases] == [1, 2]
    assert any("layers 0" in warning and "first token" in warning for warning in plan.warnings)


def test_the_applied_policy_can_be_replayed() -> None:
    plan = planned("llama", policy({**TUNED, "heads": FIRST}))
    again = planned("llama", plan.to_dict())
    assert [(b.layer, b.heads, b.bias) for b in again.biases] == [(0, (0,), FirstKey(gamma=0.5))]
