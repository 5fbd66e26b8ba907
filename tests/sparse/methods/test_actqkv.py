"""ActQKV (arXiv:2502.13542): a probe of unlike queries, blocks by the angle between it and their representatives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from tests.decoders.engine import build, tokens
from tests.sparse.eager import EVERYTHING, cut_of, look_alike, read_blocks
from tests.sparse.engine import CALLS, assert_equals_rule, policy
from tests.sparse.oracle import Look, Rule
from tokcc.errors import PlanError, PolicyError
from tokcc.ir.builder import EagerBuilder
from tokcc.passes.sparse.cut import SparseCut
from tokcc.passes.sparse.running import Moments, moments, through
from tokcc.passes.sparse.scores.probe_cosine import ProbeCosine
from tokcc.passes.sparse.selectors.fetched import Fetched

Array = npt.NDArray[Any]
WINDOW, BLOCK, SINKS, LOCAL, NEAR, BEST = 8, 4, 1, 1, 4, 2
SLOTS = {"kv": {"layout": "slots", "tokens": 64}}


def actqkv(layout: dict[str, Any] | None = SLOTS, **changes: Any) -> dict[str, Any]:
    given = {
        "tokens": 2 * BLOCK, "window": WINDOW, "block": BLOCK, "sinks": SINKS, "local": LOCAL, "near": NEAR,
        "representatives": BEST, "warm": 1, "least": 1, "length": 0, **changes,
    }  # fmt: skip
    return {**policy("actqkv", **given), **(layout or {})}


def representative(query: Array, key: Array, block: Sequence[int]) -> Array:
    """Of a block of the keys of one head ``[T, D]``; ``query`` ``[T, D]`` is the sum of those that share it."""
    got = [sum(float(query[j] @ key[i]) for j in range(i + 1, min(i + NEAR, len(key) - 1) + 1)) for i in block]
    best = sorted(range(len(block)), key=lambda i: -got[i])[:BEST]
    return np.mean([key[block[i]] for i in best], 0)  # type: ignore[no-any-return]


def probe(seen: Array, window: Array, warm: bool) -> Array:
    """Of a window ``[N, C]``; ``seen`` ``[T, C]`` are all tokens up to its end."""
    if not warm:
        return window.mean(0)  # type: ignore[no-any-return]
    mean, variance = seen.mean(0), seen.var(0)
    bias = [np.mean((h - mean) ** 2 / (variance + variance.mean() / 100)) for h in window]
    return sum(w * h for w, h in zip(bias, window, strict=True)) / sum(bias)  # type: ignore[no-any-return]


def actqkv_rule(
    fetched: Sequence[int], *, single: Sequence[int] | None = None, warm: int = 1, read_from: int = 0
) -> Rule:
    """So many blocks of each layer, in prompts and for single tokens."""

    def rule(look: Look) -> Tensor | None:
        past, kv_heads, heads = look.total - look.new, len(look.key), len(look.query)
        earlier = look.memory.setdefault(look.layer, np.zeros((heads, 0, look.query.shape[2])))
        query = look.memory[look.layer] = np.concatenate([earlier, look.query.double().numpy()], 1)
        key = look.key.double().numpy()
        if look.total < read_from:
            return None
        stacked = query.transpose(1, 0, 2).reshape(look.total, -1)  # all heads of a token beside each other
        blocks = [range(i, min(i + BLOCK, look.total)) for i in range(0, look.total, BLOCK)]
        shared = query.reshape(kv_heads, heads // kv_heads, look.total, -1).sum(1)
        vectors = [
            np.concatenate([representative(shared[h // (heads // kv_heads)], key[h // (heads // kv_heads)], block)
                            for h in range(heads)])
            for block in blocks
        ]  # fmt: skip
        read = torch.zeros(1, look.new, look.total, dtype=torch.bool)
        step = 1 if look.new == 1 else WINDOW
        wanted = (single if single is not None and look.new == 1 else fetched)[look.layer]
        for start in range(past, look.total, step):
            end = min(start + step, look.total)
            own = probe(stacked[:end], stacked[start:end], start >= warm * WINDOW)
            if step == 1:
                own = stacked[start]
            must = {i for i, block in enumerate(blocks) if i < SINKS and block[0] < end}
            must |= {i for i, block in enumerate(blocks) if block[0] < end and block[0] + BLOCK > start - LOCAL * BLOCK}
            rating = {i: float(own @ vectors[i]) / np.linalg.norm(own) / np.linalg.norm(vectors[i])
                      for i, block in enumerate(blocks) if block[0] < end and i not in must}  # fmt: skip
            for i in [*must, *sorted(rating, key=lambda i: -rating[i])[:wanted]]:
                read[0, start - past : end - past, blocks[i]] = True
        return read

    return rule


FAMILIES = ["llama", pytest.param("llama-mqa", marks=pytest.mark.slow), pytest.param("qwen3", marks=pytest.mark.slow)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", [SLOTS, pytest.param(None, marks=pytest.mark.slow)], ids=["slots", "merged"])
def test_every_row_reads_what_its_probe_finds(family: str, layout: dict[str, Any] | None, tmp_path: Path) -> None:
    assert_equals_rule(family, actqkv(layout), actqkv_rule([2, 2, 2]), tmp_path)


@pytest.mark.slow
def test_one_row_and_windows_that_all_have_a_plain_mean(tmp_path: Path) -> None:
    assert_equals_rule("llama", actqkv(warm=9), actqkv_rule([2] * 3, warm=9), tmp_path, padding=(0,))


@pytest.mark.slow
def test_windows_are_weighted_from_the_first_on(tmp_path: Path) -> None:
    wanted = actqkv(None, warm=0, tokens=BLOCK)
    assert_equals_rule("llama", wanted, actqkv_rule([1] * 3, warm=0), tmp_path, calls=(45, 1, 3, 1, 20, 1))


def test_layers_share_out_what_single_tokens_fetch(tmp_path: Path) -> None:
    """3 x 3 blocks by 1 : 4 : 1, at most twice as many as on average."""
    wanted = actqkv(tokens=3 * BLOCK, densities=[0.2, 0.8, 0.2])
    assert_equals_rule("llama", wanted, actqkv_rule([3, 3, 3], single=[2, 6, 1]), tmp_path, padding=(0, 8))


@pytest.mark.slow
def test_all_blocks_are_the_whole_text(tmp_path: Path) -> None:
    assert_equals_rule("llama", actqkv(tokens=4096), lambda look: None, tmp_path)


@pytest.mark.slow
def test_short_texts_are_read_whole(tmp_path: Path) -> None:
    rule = actqkv_rule([2] * 3, read_from=57)
    assert_equals_rule("llama", actqkv(length=57), rule, tmp_path, padding=(0, 0))


def test_what_is_remembered(tmp_path: Path) -> None:
    """Of a text that comes in pieces: the keys that stand for blocks, and mean and variance of all queries."""
    heard: dict[str, Array] = {}

    def listen(look: Look) -> Tensor | None:
        rule(look)
        if look.layer == 0:
            heard.update(query=look.memory[0], key=look.key.double().numpy())
        return None

    rule = actqkv_rule([9] * 3)
    engine = assert_equals_rule("llama", actqkv(tokens=4096), listen, tmp_path, padding=(0,))
    ids, mask = tokens(1, sum(CALLS), (0,))
    _, last = engine.run(ids, mask, CALLS)
    query, key = heard["query"], heard["key"]  # [H, T, D], [Hkv, T, D]
    state, running = last["present.0.key_block"][0], last["present.0.key_running"][0, :, 0]
    for head, number in ((0, 0), (1, 0), (0, 7), (1, 14)):
        block = range(number * BLOCK, min((number + 1) * BLOCK, key.shape[1]))
        wanted = representative(query[2 * head : 2 * head + 2].sum(0), key[head], block)
        np.testing.assert_allclose(state[head, number, : key.shape[2]], wanted, rtol=0, atol=1e-4)
    wanted = np.concatenate([query.mean(1), query.var(1)], 1)
    np.testing.assert_allclose(running, wanted, rtol=1e-4, atol=1e-5)


def test_prompt_and_single_tokens_remember_once(tmp_path: Path) -> None:
    """Both steps want the same numbers, which are made once."""
    engine = build("llama", actqkv(), tmp_path)
    made = [node for node in engine.program.graph.nodes if "index_copy" in str(node.target)]
    assert len(made) == 3 * 3  # keys, values and blocks of each layer
    names = {item.name for item in engine.session.get_inputs() if ".0." in item.name}
    assert names == {f"past_key_values.0.{part}" for part in ("key", "value", "key_block", "key_running")}


def test_moments_are_joined_by_the_pooled_formula() -> None:
    """Of numbers that lie far from zero, where sums of squares would lose everything."""
    generator = torch.Generator().manual_seed(0)
    x = 1e4 + torch.randn(1, 2, 24, 3, generator=generator)
    b = EagerBuilder()
    real = torch.ones(1, 24, dtype=torch.bool)
    real[:, :3] = False
    before = moments(b, x[:, :, None, :10], real[:, None, :10])
    rows = moments(b, x[:, :, 10:22].unflatten(2, (3, 4)), real[:, 10:22].unflatten(1, (3, 4)))
    made = through(b, before, rows)
    for row, end in enumerate((14, 18, 22)):
        seen = x[0, :, 3:end].double()
        assert float(made.count[0, row]) == end - 3
        torch.testing.assert_close(made.mean[0, :, row].double(), seen.mean(1), rtol=1e-6, atol=0)
        torch.testing.assert_close(made.variance[0, :, row].double(), seen.var(1, False), rtol=2e-3, atol=0)
    nothing = Moments(torch.zeros(1, 1), torch.full((1, 2, 1, 3), 7.0), torch.full((1, 2, 1, 3), 7.0))
    first = through(b, nothing, rows)
    torch.testing.assert_close(first.variance[:, :, 0], rows.variance[:, :, 0])


def call(query: Tensor, key: Tensor, vectors: Tensor) -> SparseCut:
    """Rows of 4 queries, blocks of 4 keys, with so many vectors ``[1, Hkv, M, D]`` that stand for blocks."""
    heads, width = query.shape[1], query.shape[3]
    state = torch.cat([vectors, torch.zeros(*vectors.shape[:3], 4)], 3)
    running = torch.zeros(1, heads, 1, 2 * width)
    return cut_of(query, key, 4, 4, states={"key_block": state}, before={"key_running": running})


def test_rows_of_equal_queries_have_their_mean_as_probe() -> None:
    _, key = look_alike(4, 2, 1, 16)
    vectors = torch.randn(1, 2, 4, 8, generator=torch.Generator().manual_seed(3))
    same = torch.randn(1, 4, 1, 8, generator=torch.Generator().manual_seed(4)).repeat(1, 1, 16, 1)
    made = ProbeCosine(warm=0).emit(call(same, key, vectors))
    assert bool(torch.isfinite(made).all())
    plain = ProbeCosine(warm=99).emit(call(same, key, vectors))
    torch.testing.assert_close(made, plain)
    flat = same[0, :, 0].flatten() @ vectors[0].repeat_interleave(2, 0).transpose(0, 1).flatten(1).T
    size = same[0, :, 0].norm() * vectors[0].repeat_interleave(2, 0).transpose(0, 1).flatten(1).norm(dim=1)
    torch.testing.assert_close(made[0, 0, 2], flat / size)


def test_an_unlike_query_weighs_most() -> None:
    """One of a row's tokens is far from all others, and the probe points to where it does."""
    query, key = look_alike(2, 1, 16, 16)
    query[0, :, 13] = 50.0
    probe = ProbeCosine(warm=0)._probe(call(query, key, torch.zeros(1, 1, 4, 8)))[0, :, 3]
    plain = ProbeCosine(warm=99)._probe(call(query, key, torch.zeros(1, 1, 4, 8)))[0, :, 3]
    assert float((probe - 50).abs().max()) < 3
    assert float((plain - 12.5).abs().max()) < 3


def test_the_length_of_what_stands_for_a_block_changes_nothing() -> None:
    query, key = look_alike(4, 2, 16, 16)
    vectors = torch.randn(1, 2, 4, 8, generator=torch.Generator().manual_seed(3))
    select = Fetched(share="all_mean")
    lists = []
    for factor in (1.0, torch.tensor([0.1, 3.0, 7.0, 20.0])[:, None]):
        cut = call(query, key, vectors * factor)
        rating = ProbeCosine().emit(cut)
        assert float(rating.abs().max()) <= 1 + 1e-5
        lists.append(rating)
        assert bool(read_blocks(select.select(cut, rating, EVERYTHING), 4).any())
    torch.testing.assert_close(lists[0], lists[1])


def test_shares_of_layers() -> None:
    assert Fetched(densities=(0.5, 0.5, 0.5)).shares(4) == [4, 4, 4]
    assert Fetched(densities=(0.9, 0.3, 0.6)).shares(6) == [9, 3, 6]
    assert Fetched(densities=(9.0, 0.5, 0.5), most=1.5, least=2).shares(4) == [6, 3, 3]
    assert Fetched(densities=(0.01, 1.0), least=3).shares(4) == [3, 5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block": 2, "representatives": 4}, "blocks of at least 4 keys"),
        ({"densities": [0.5, 0.5]}, "densities for layers up to 2"),
        ({"densities": [0.5, 0.0, 0.5]}, "positive"),
    ],
)
def test_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((PlanError, PolicyError), match=message):
        build("llama", actqkv(**changes), tmp_path)


def test_refused_beside_what_takes_tokens_out(tmp_path: Path) -> None:
    wanted = actqkv(None)
    wanted["steps"].append({"preset": "snapkv", "tokens": 16, "window": 3})
    with pytest.raises(PlanError, match="what tokens were when they came"):
        build("llama", wanted, tmp_path)
