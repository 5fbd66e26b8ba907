"""IceCache (arXiv:2604.10539): pages of similar tokens, of which a single token reads those with the best mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from torch import Tensor

from tests.decoders.engine import build, tokens
from tests.sparse.engine import CALLS, assert_equals_rule, policy
from tests.sparse.oracle import Look, Rule
from tokcc.errors import PlanError
from tokcc.ir.builder import EagerBuilder
from tokcc.passes.sparse.clustering import halved

Array = npt.NDArray[Any]
PAGE, SINKS, LOCAL, HALVINGS = 4, 1, 1, 3
SLOTS = {"kv": {"layout": "slots", "tokens": 64}}


def directions(x: Array, count: int, rounds: int = 8) -> list[Array]:
    """``[N, D]`` of mean 0."""
    spread, found = x.T @ x, []
    for _ in range(count):
        v = np.full(x.shape[1], x.shape[1] ** -0.5)
        for _ in range(rounds):
            v = spread @ v
            v = v / max(float(np.linalg.norm(v)), 1e-12)
        found.append(v)
        spread = spread - (v @ spread @ v) * np.outer(v, v)
    return found


def clustered(key: Array, page: int, times: int) -> list[int]:
    """The order of ``[N, D]``: sorted and cut in two, again and again, between pages."""
    x = key - key.mean(0)
    groups: dict[int, list[int]] = {0: list(range(len(key)))}
    pages = max(-(-len(key) // page), 1)
    order: list[int] = []
    for level, v in enumerate(directions(x, times)):
        order = [i for number in sorted(groups) for i in sorted(groups[number], key=lambda i: float(x[i] @ v))]
        groups = {}
        for place, token in enumerate(order):
            groups.setdefault((place // page) * 2 ** (level + 1) // pages, []).append(token)
    return order


def entered(key: Array, past: int, page: int, sinks: int, local: int, times: int) -> list[int]:
    """Which of a call's tokens lies in each of its slots; ``key`` are those of the call ``[S, D]``."""
    total = past + len(key)
    start, end = max(sinks * page, -(-past // page) * page), (total // page - local) * page
    order = list(range(len(key)))
    if len(key) > 1 and end > start:
        run = slice(start - past, end - past)
        order[run] = [start - past + i for i in clustered(key[run], page, times)]
    return order


def icecache_rule(pages: int, *, share: str = "group_mean", page: int = PAGE, read_from: int = 0) -> Rule:
    """A single token reads so many pages of what lies in the slots, which the memory tells."""

    def rule(look: Look) -> Tensor | None:
        past, kv_heads = look.total - look.new, len(look.key)
        key = look.key.double().numpy()
        for head in range(kv_heads):
            slots = look.memory.setdefault((look.layer, head), [])
            slots += [past + i for i in entered(key[head, past:], past, page, SINKS, LOCAL, HALVINGS)]
        if look.new > 1 or look.total < read_from:
            return None
        query, groups = look.query[:, 0].double().numpy(), len(look.query) // kv_heads
        read = torch.zeros(len(query), 1, look.total, dtype=torch.bool)
        for head in range(len(query)):
            slots = look.memory[look.layer, head // groups]
            spans = [slots[i : i + page] for i in range(0, look.total, page)]
            group = range(head // groups * groups, (head // groups + 1) * groups)
            members = [head] if share == "each" else group
            rated = [np.mean([query[h] @ key[head // groups, span].mean(0) for h in members]) for span in spans]
            newest = len(spans) - 1
            must = [i for i in range(newest, -1, -1) if i < SINKS or i >= newest - LOCAL]
            rest = sorted((i for i in range(len(spans)) if i not in must), key=lambda i: -rated[i])
            for i in [*must, *rest][:pages]:
                read[head, 0, spans[i]] = True
        return read

    return rule


def icecache(layout: dict[str, Any] | None = SLOTS, **changes: Any) -> dict[str, Any]:
    given = {
        "tokens": 5 * PAGE, "page": PAGE, "sinks": SINKS, "local": LOCAL, "halvings": HALVINGS, "length": 0, **changes
    }  # fmt: skip
    return {**policy("icecache", **given), **(layout or {})}


@pytest.mark.parametrize("family", ["llama", pytest.param("llama-mqa", marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", [SLOTS, None], ids=["slots", "merged"])
def test_every_row_reads_pages_of_similar_keys(family: str, layout: dict[str, Any] | None, tmp_path: Path) -> None:
    assert_equals_rule(family, icecache(layout), icecache_rule(5), tmp_path)


@pytest.mark.slow
def test_one_row_and_lists_of_each_head(tmp_path: Path) -> None:
    rule = icecache_rule(5, share="each")
    assert_equals_rule("llama", icecache(share="each"), rule, tmp_path, padding=(0,), calls=(38, 1, 1, 19, 1, 1))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [SLOTS, None], ids=["slots", "merged"])
def test_all_pages_are_the_whole_cache(layout: dict[str, Any] | None, tmp_path: Path) -> None:
    """In any order: a single token sees all of it."""
    assert_equals_rule("llama", icecache(layout, tokens=4096), lambda look: None, tmp_path)


@pytest.mark.slow
def test_short_texts_are_read_whole(tmp_path: Path) -> None:
    wanted = icecache(length=59)
    assert_equals_rule("llama", wanted, icecache_rule(5, read_from=59), tmp_path, padding=(0, 0))


def test_what_the_cache_holds(tmp_path: Path) -> None:
    """The tokens of the text in another order, keys and values alike, and the means of pages."""
    engine = build("llama", icecache(), tmp_path)
    plain = tmp_path / "plain"
    plain.mkdir()
    ids, mask = tokens(1, sum(CALLS), (0,))
    _, last = engine.run(ids, mask, CALLS)
    _, whole = build("llama", {"version": 1, "steps": [], **SLOTS}, plain).run(ids, mask, CALLS)
    # Of the first layer: further ones read what was chosen.
    count = sum(CALLS)
    for head in range(2):
        key, own = whole["present.0.key"][0, head, :count], last["present.0.key"][0, head, :count]
        first = entered(key[: CALLS[0]].astype(np.float64), 0, PAGE, SINKS, LOCAL, HALVINGS)
        assert first != sorted(first)
        np.testing.assert_allclose(own[: CALLS[0]], key[first], rtol=0, atol=1e-5)
        value, other = whole["present.0.value"][0, head, :count], last["present.0.value"][0, head, :count]
        np.testing.assert_allclose(other[: CALLS[0]], value[first], rtol=0, atol=1e-5)
        means = np.stack([own[i : i + PAGE].mean(0) for i in range(0, count, PAGE)])
        np.testing.assert_allclose(last["present.0.key_mean"][0, head, : len(means)], means, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", [SLOTS, None], ids=["slots", "merged"])
def test_a_single_token_sorts_nothing(layout: dict[str, Any] | None, tmp_path: Path) -> None:
    """The order of a text, and the attention to everything, are made in branches of their own."""
    build("llama", icecache(layout), tmp_path)
    graph = onnx.load(str(tmp_path / "model.onnx")).graph
    assert not {"TopK", "Softmax"} & {node.op_type for node in graph.node}
    choices = [node for node in graph.node if node.op_type == "If" and "order@" in node.name]
    assert len(choices) == 3
    for choice in choices:
        sorts = {side.name: [n.op_type for n in side.g.node].count("TopK") for side in choice.attribute}
        assert sorts == {"then_branch": 2 * HALVINGS, "else_branch": 0}


def test_similar_keys_come_together() -> None:
    """Four far groups, shuffled: every page holds one of them. What is not to be moved stays."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[9.0, 2.0, 0.0], [9.0, -2.0, 1.0], [-9.0, 3.0, 0.0], [-9.0, -3.0, -1.0]])
    shuffled = torch.randperm(32, generator=generator)
    key = centres.repeat_interleave(8, 0)[shuffled] + 0.1 * torch.randn(32, 3, generator=generator)
    key = torch.cat([torch.zeros(3, 3), key, torch.zeros(2, 3)])[None, None]
    free = torch.tensor([False] * 3 + [True] * 32 + [False] * 2)[None]
    order = halved(EagerBuilder(), key, free, 4, 2, 8)[0, 0].tolist()
    assert sorted(order) == list(range(37))
    assert order[:3] == [0, 1, 2]
    assert order[35:] == [35, 36]
    kinds = [int(shuffled[i - 3]) // 8 for i in order[3:35]]
    assert all(len(set(kinds[i : i + 4])) == 1 for i in range(0, 32, 4))


def test_refused(tmp_path: Path) -> None:
    wanted = icecache(None)
    wanted["steps"].append({"preset": "snapkv", "tokens": 16, "window": 3})
    with pytest.raises(PlanError, match="in an order of its own"):
        build("llama", wanted, tmp_path)
    with pytest.raises(PlanError, match="another order"):
        build("llama", icecache(at={"stage": "both"}), tmp_path)
