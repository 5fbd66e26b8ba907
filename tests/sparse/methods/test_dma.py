"""Dynamic Mask Attention on Doge models: against transformers' own, and against lists written out in Python."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from tests.decoders import tiny
from tests.decoders.engine import Engine, build, tokens
from tests.decoders.tiny import model_of, program_of
from tests.sparse.engine import CALLS, policy
from tests.sparse.oracle import run_sparse
from tokcc.analysis.cache_sites import cache_sites
from tokcc.analysis.key_bias import find_key_biases
from tokcc.errors import PlanError, PolicyError

WINDOW = 12  # of the tiny models: most calls see more
SLOTS = {"kv": {"layout": "slots", "tokens": 64}}
NONE = {"version": 1, "name": "none", "steps": []}
FAMILIES = ["doge", pytest.param("doge-mqa", marks=pytest.mark.slow)]
Chosen = Callable[[list[float], int, int], Sequence[Sequence[int]]]
"""From the bias of each key, new tokens and all: the keys that each query reads."""


def dma(layout: bool = False, **arguments: Any) -> dict[str, Any]:
    return {**policy("dma", **{"tokens": WINDOW, "length": 0, **arguments}), **(SLOTS if layout else {})}


def in_calls(model: nn.Module, ids: Tensor, calls: Sequence[int]) -> np.ndarray[Any, Any]:
    """Logits of one row that runs alone, call after call."""
    cache, logits, start = DynamicCache(config=model.config), [], 0
    with torch.no_grad():
        for length in calls:
            places = torch.arange(start, start + length)[None]
            out = model(input_ids=ids[None, start : start + length], position_ids=places, past_key_values=cache)
            logits.append(out.logits[0])
            start += length
    return torch.cat(logits).numpy()  # type: ignore[no-any-return]


def choosing(family: str, chosen: Chosen) -> nn.Module:
    """The model with other masks: the keys that are listed, with their bias."""
    model = copy.deepcopy(model_of(family))

    def masked(hidden_states: Tensor, dt_states: Tensor, **_: Any) -> Tensor:
        new, (_, heads, total) = hidden_states.shape[1], dt_states.shape
        mask = torch.full([1, heads, new, total], torch.finfo(torch.float32).min)
        for head in range(heads):
            for row, keys in enumerate(chosen(dt_states[0, head].tolist(), new, total)):
                own = [key for key in keys if key <= total - new + row]
                mask[0, head, row, own] = dt_states[0, head, own]
        return mask

    for layer in model.model.layers:
        layer.self_attn.prepare_dynamic_mask = masked
    return model


def shared(rows: int, most: int) -> Chosen:
    """Rows of queries read their own keys and the best before them; a single token reads the best."""

    def chosen(bias: list[float], new: int, total: int) -> list[list[int]]:
        found = []
        for query in range(new):
            first = total - new + query // rows * rows
            last = total if new == 1 else min(first + rows, total)
            own = [] if new == 1 else list(range(first, last))[-most:]
            rest = [key for key in range(last) if key not in range(first, last) or new == 1]
            best = sorted(rest, key=lambda key: -bias[key])
            found.append([*own, *best[: most - len(own)]])
        return found

    return chosen


def compare(engine: Engine, model: nn.Module, padding: Sequence[int], calls: Sequence[int] = CALLS) -> dict[str, Any]:
    ids, mask = tokens(len(padding), sum(calls), padding)
    logits, last = engine.run(ids, mask, calls)
    for row, count in enumerate(padding):
        wanted = in_calls(model, ids[row, count:], [calls[0] - count, *calls[1:]])
        np.testing.assert_allclose(logits[row, count:], wanted, rtol=0, atol=2e-4 * float(np.abs(wanted).max()))
    return last


def test_the_bias_is_found() -> None:
    program = program_of("doge")
    biases = find_key_biases(program, cache_sites(program))
    assert {layer: bias.most for layer, bias in biases.items()} == dict.fromkeys(range(3), WINDOW)
    program = program_of("llama")
    assert not find_key_biases(program, cache_sites(program))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_without_a_policy_it_is_the_model(family: str, layout: bool, tmp_path: Path) -> None:
    """Also where it chooses, which is most of the text."""
    engine = build(family, {**NONE, **(SLOTS if layout else {})}, tmp_path)
    compare(engine, model_of(family), (0, 3, 16))
    assert engine.plan.changes == layout
    assert not engine.plan.warnings


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_single_rows_are_the_model(family: str, layout: bool, tmp_path: Path) -> None:
    """What is remembered is the bias of every key, as the values say it."""
    engine = build(family, dma(layout, rows=1, own=False), tmp_path)
    last = compare(engine, model_of(family), (0, 3, 16))
    total = sum(CALLS)
    for number, layer in enumerate(model_of(family).model.layers):
        values = torch.from_numpy(last[f"present.{number}.value"][0][:, :total]).double()  # [Hkv, N, D]
        state = last[f"present.{number}.key_bias"]
        assert state.shape == (3, values.shape[0], 64 if layout else total, 1)
        for token in (0, 20, total - 1):
            whole = torch.cat([values[head, token] for head in range(len(values))])
            for head in range(len(values)):
                gate = float(layer.self_attn.dt_proj.weight[head].detach().double() @ whole)
                wanted = np.exp(float(layer.self_attn.A[head].detach()) * np.log1p(np.exp(gate)))
                assert state[0, head, token, 0] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_rows_share_a_list(family: str, layout: bool, tmp_path: Path) -> None:
    engine = build(family, dma(layout, rows=8, tokens=20), tmp_path)
    compare(engine, choosing(family, shared(8, 20)), (0, 8, 16))
    steps = engine.plan.sparse[0].each
    assert [step.single for step in steps] == [True, False]


@pytest.mark.slow
def test_one_row(tmp_path: Path) -> None:
    compare(build("doge", dma(True, rows=8, tokens=20), tmp_path), choosing("doge", shared(8, 20)), (0,))


@pytest.mark.parametrize("most", [WINDOW, 128])
def test_short_texts_and_large_windows_are_dense_with_the_bias(most: int, tmp_path: Path) -> None:
    wanted = dma(tokens=most, rows=8, length=100 if most == WINDOW else 0)
    compare(build("doge", wanted, tmp_path), choosing("doge", lambda bias, new, total: [range(total)] * new), (0, 3, 5))


def test_a_gate_of_nothing_is_plain_attention(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With A = 0 all keys have the same bias, and where all are read it changes nothing."""
    monkeypatch.setitem(tiny.FAMILIES, "doge-plain", tiny.FAMILIES["doge"])
    for attention in ("eager", "sdpa"):
        for layer in model_of("doge-plain", attention).model.layers:
            layer.self_attn.A.data.zero_()
    engine = build("doge-plain", dma(tokens=128, rows=8), tmp_path)
    ids, mask = tokens(2, sum(CALLS), (0, 8))
    logits, _ = engine.run(ids, mask, CALLS)
    for row, count in ((0, 0), (1, 8)):
        alone = run_sparse(model_of("doge-plain"), ids[row, count:], [CALLS[0] - count, *CALLS[1:]], lambda look: None)
        np.testing.assert_allclose(logits[row, count:], alone, rtol=0, atol=2e-4 * float(alone.abs().max()))


def test_other_methods_keep_the_bias(tmp_path: Path) -> None:
    """In larger blocks too; that they choose other keys than the model is said."""
    step = {
        "node": "sparse_attention",
        "blocks": {"query": 8, "key": 4},
        "score": {"kind": "pooled"},
        "budget": {"keep": 1.0},
    }
    engine = build("doge", {**NONE, "steps": [step]}, tmp_path)
    compare(engine, choosing("doge", lambda bias, new, total: [range(total)] * new), (0, 8))
    assert any("the model chooses itself" in warning for warning in engine.plan.warnings)


@pytest.mark.parametrize(
    ("family", "wanted", "message"),
    [
        ("llama", dma(), "layer 0 adds nothing"),
        ("doge", policy("h2o", tokens=8), "from the values of all heads"),
        ("doge", policy("agent-memory-q4"), "from the values of all heads"),
        ("doge", dma(own=False), "cannot work with these blocks"),
        ("doge", policy("token-sparse-attn"), "writes its attention out without"),
    ],
)
def test_what_is_refused(family: str, wanted: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((PlanError, PolicyError), match=message):
        build(family, wanted, tmp_path)
