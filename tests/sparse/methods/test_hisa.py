"""HISA (arXiv:2603.28458) on DeepSeek-V3.2 models: an indexer asked about blocks, then about their tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from transformers.models.deepseek_v32.modeling_deepseek_v32 import apply_rotary_pos_emb

from tests.decoders.engine import build
from tests.decoders.tiny import model_of, program_of
from tests.sparse.engine import CALLS, policy
from tests.sparse.methods.test_dma import compare
from tokcc.analysis.cache_masks import sliding_windows
from tokcc.analysis.cache_sites import cache_sites
from tokcc.errors import PlanError, PolicyError

Array = npt.NDArray[Any]
FAMILY, MOST, BLOCK = "deepseek-v32", 12, 4
SLOTS = {"kv": {"layout": "slots", "tokens": 64}}
NONE = {"version": 1, "name": "none", "steps": []}


def hisa(layout: bool = False, **changes: Any) -> dict[str, Any]:
    given = {"tokens": MOST, "block": BLOCK, "candidates": 4, "length": 0, **changes}
    return {**policy("hisa", **given), **(SLOTS if layout else {})}


def indexed(query: Array, gate: Array, key: Array) -> float:
    """What the indexer gives a key ``[W]``, by queries ``[heads, W]``."""
    return float(sum(g * max(q @ key / np.sqrt(len(key)), 0.0) for g, q in zip(gate, query, strict=True)))


def two_stages(query: Array, gate: Array, keys: Array, most: int, candidates: int) -> list[int]:
    """The tokens that the last of some tokens sees, whose index keys are ``[T, W]``."""
    blocks = [list(range(i, min(i + BLOCK, len(keys)))) for i in range(0, len(keys), BLOCK)]
    must = {0, len(blocks) - 1}
    rated = [indexed(query, gate, keys[block].mean(0)) for block in blocks]
    rest = sorted((i for i in range(len(blocks)) if i not in must), key=lambda i: -rated[i])
    inside = [token for i in [*must, *rest][:candidates] for token in blocks[i]]
    found = sorted(inside, key=lambda token: -indexed(query, gate, keys[token]))[:most]
    if len(keys) <= min(most, candidates * BLOCK):
        assert sorted(found) == list(range(len(keys)))
    assert len(found) == min(most, len(inside))
    return found


def choosing(chosen: Callable[[Array, Array, Array], list[int]]) -> nn.Module:
    """The model with another choice of tokens, from queries, gates and index keys of what a query may see."""
    model = copy.deepcopy(model_of(FAMILY))

    def indexer(own: Any) -> Any:
        def forward(hidden: Tensor, low: Tensor, places: Any, mask: Tensor, *_: Any, past_key_values: Any) -> Tensor:
            rows = hidden.shape[1]
            query = own.wq_b(low).view(1, rows, own.n_heads, own.head_dim)
            key = own.k_norm(own.wk(hidden)).unsqueeze(2)
            turned = own.qk_rope_head_dim
            ends = apply_rotary_pos_emb(query[..., :turned], key[..., :turned], *places, unsqueeze_dim=2)
            query, key = (torch.cat([end, x[..., turned:]], -1) for end, x in zip(ends, (query, key), strict=True))
            keys = past_key_values.update_indexer(key.squeeze(2), own.layer_idx)[0].double().numpy()
            gate = own.weights_proj(hidden)[0].double().numpy() / np.sqrt(own.n_heads)
            picked = []
            for row in range(rows):
                seen = len(keys) - rows + row + 1
                found = chosen(query[0, row].double().numpy(), gate[row], keys[:seen])
                picked.append([*found, *found[:1] * (len(keys) - len(found))])  # scattered: one may come twice
            return torch.tensor(picked, dtype=torch.int32)[None]

        return forward

    for layer in model.model.layers:
        layer.self_attn.indexer.forward = indexer(layer.self_attn.indexer)
    return model


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def test_the_indexer_is_found() -> None:
    program = program_of(FAMILY)
    sites = cache_sites(program)
    found = [site.index for site in sites]
    assert [(i.most, i.width) for i in found if i] == [(MOST, 16)] * 3
    assert sliding_windows(program, sites) == (0, 0, 0)
    assert not any(site.index for site in cache_sites(program_of("deepseek-v3")))


@pytest.mark.parametrize("layout", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_without_a_policy_it_is_the_model(layout: bool, tmp_path: Path) -> None:
    """Most of the text is longer than what a query sees."""
    engine = build(FAMILY, {**NONE, **(SLOTS if layout else {})}, tmp_path)
    compare(engine, model_of(FAMILY), (0, 3, 16))
    assert engine.plan.changes == layout
    assert {p.name for p in engine.plan.sparse.values()} == {"best_by_index"}


@pytest.mark.parametrize("layout", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_every_query_sees_the_best_tokens_of_the_best_blocks(layout: bool, tmp_path: Path) -> None:
    """Gates are of both signs, and a padded row is what it is alone."""
    engine = build(FAMILY, hisa(layout), tmp_path)
    signs: list[Array] = []

    def chosen(query: Array, gate: Array, keys: Array) -> list[int]:
        signs.append(np.sign(gate))
        return two_stages(query, gate, keys, MOST, 4)

    compare(engine, choosing(chosen), (0, 8, 16))
    assert {-1.0, 1.0} <= {float(x) for x in np.concatenate(signs)}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"tokens": 5, "candidates": 2}, {"tokens": 30, "candidates": 3}])
def test_one_row_and_other_numbers(changes: dict[str, int], tmp_path: Path) -> None:
    """Also where the blocks have fewer tokens than a query might see."""
    engine = build(FAMILY, hisa(True, **changes), tmp_path)
    most, candidates = changes["tokens"], changes["candidates"]
    compare(engine, choosing(lambda q, g, k: two_stages(q, g, k, most, candidates)), (0,))


@pytest.mark.parametrize("layout", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_all_blocks_are_the_model_s_own_choice(layout: bool, tmp_path: Path) -> None:
    engine = build(FAMILY, hisa(layout, candidates=64, length=MOST + 1), tmp_path)
    compare(engine, model_of(FAMILY), (0, 3, 16))


@pytest.mark.slow
def test_as_many_tokens_as_there_are_is_everything(tmp_path: Path) -> None:
    compare(
        build(FAMILY, hisa(tokens=64, candidates=64), tmp_path), choosing(lambda q, g, k: list(range(len(k)))), (0, 8)
    )


@pytest.mark.parametrize("layout", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_what_is_remembered_of_blocks(layout: bool, tmp_path: Path) -> None:
    """The means of what the model caches of tokens, which came in pieces."""
    last = compare(build(FAMILY, hisa(layout, candidates=64), tmp_path), model_of(FAMILY), (0,))
    keys, means = (last[f"present.1.{name}"][0, 0] for name in ("key_index", "key_index_mean"))
    total = sum(CALLS)
    wanted = np.stack([keys[i : min(i + BLOCK, total)].mean(0) for i in range(0, total, BLOCK)])
    np.testing.assert_allclose(means[: len(wanted)], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "wanted", "message"),
    [
        ("llama", hisa(), "layer 0 has none"),
        (FAMILY, policy("quest", at={"layers": "all"}), "would take its place"),
        (FAMILY, policy("h2o", tokens=8), "own indexer chooses"),
        (FAMILY, policy("agent-memory-q4"), "own indexer chooses"),
    ],
)
def test_what_is_refused(family: str, wanted: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((PlanError, PolicyError), match=message):
        build(family, wanted, tmp_path)


@pytest.mark.parametrize("most", [MOST - 1, MOST + 1])
def test_a_mask_that_is_something_else_is_refused(most: int) -> None:
    """Masks are tried out: what is read out of the graph has to be what they do."""
    program = program_of(FAMILY)
    site = cache_sites(program)[1]
    assert site.index is not None
    with pytest.raises(PlanError, match="made by an indexer"):
        sliding_windows(program, [replace(site, index=replace(site.index, most=most))])
