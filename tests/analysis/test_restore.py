"""Restoring on demand: a windowed operation gets all tokens back, and the stream goes on reduced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.analysis.oracle import Kind, Reduce, make_program, walk_eager, walk_graph
from tests.zoo import ZOO
from tokcc.analysis.walk import Entry, Walk
from tokcc.errors import AxisError
from tokcc.ir.builder import EagerBuilder
from tokcc.ir.program import Program
from tokcc.testing import reduce_program, run_eager, run_program, trace

aten = torch.ops.aten
BATCH, TOKENS, WIDTH = 2, 12, 8


def _windowed(x: Tensor) -> Tensor:
    """Softmax over windows of four tokens: what a token gets depends on its neighbours."""
    batch, tokens, width = x.shape
    windows = x.reshape(batch, tokens // 4, 4, width)
    return (windows.softmax(2) * windows.mean(2, keepdim=True)).reshape(batch, tokens, width)


def _pre_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Cut, a row-wise block, then a windowed block, then a row-wise one."""
    y = aten.alias.default(x)
    y = y + aten.linear.default(y, weight).tanh()
    y = y + _windowed(aten.layer_norm.default(y, [WIDTH]))
    return y + aten.linear.default(aten.layer_norm.default(y, [WIDTH]), weight)


def _tail(y: Tensor, weight: Tensor) -> Tensor:
    return y + aten.linear.default(aten.layer_norm.default(y, [WIDTH]), weight)


def _update(y: Tensor, weight: Tensor) -> Tensor:
    return y + aten.linear.default(y, weight).tanh()


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def _merged(x: Tensor, action: Reduce) -> tuple[Tensor, Tensor]:
    """The merge in plain Python, and the slot of every token."""
    keep, source, slot = (action.handles[name] for name in ("keep", "source", "slot"))
    assign = torch.zeros(x.shape[:2], dtype=torch.int64)
    for b in range(len(x)):
        for k, i in enumerate(keep[b].tolist()):
            assign[b, i] = k
        for i, k in zip(source[b].tolist(), slot[b].tolist(), strict=True):
            assign[b, i] = k
    groups = torch.nn.functional.one_hot(assign, keep.shape[1]).to(x.dtype)  # [B, N, K]
    return groups.transpose(1, 2) @ x / groups.sum(1)[..., None], assign


def _both(fn: Callable[..., Tensor], inputs: list[Tensor], kind: Kind, restore: str) -> tuple[Tensor, Reduce]:
    """Run eagerly and in a graph; both must agree."""
    program = make_program(fn, inputs)
    action = Reduce(kind, restore=restore)
    _, (value,) = walk_eager(program, "b n c", [action], inputs)
    _, (found,) = walk_graph(program, "b n c", [Reduce(kind, restore=restore)], inputs)
    torch.testing.assert_close(found, value.handle, rtol=1e-5, atol=1e-6)
    return found, action


@pytest.fixture
def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(BATCH, TOKENS, WIDTH, generator=generator), torch.randn(WIDTH, WIDTH, generator=generator) / 3]


def test_dropped_tokens_stand_in_windows_as_they_were(inputs: list[Tensor]) -> None:
    x, weight = inputs
    found, action = _both(_pre_norm, inputs, "drop", "scatter")
    keep = action.handles["keep"]
    kept = _update(_rows(x, keep), weight)
    full = x.scatter(1, keep[..., None].expand_as(kept), kept)
    windows = _windowed(torch.nn.functional.layer_norm(full, [WIDTH]))
    expected = _tail(kept + _rows(windows, keep), weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_merged_tokens_stand_in_windows_for_each_of_theirs(inputs: list[Tensor]) -> None:
    x, weight = inputs
    found, action = _both(_pre_norm, inputs, "merge", "unmerge")
    merged, assign = _merged(x, action)
    reduced = _update(merged, weight)
    windows = _windowed(torch.nn.functional.layer_norm(_rows(reduced, assign), [WIDTH]))
    expected = _tail(reduced + _merged(windows, action)[0], weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_an_operation_without_a_rule_gets_all_tokens(inputs: list[Tensor]) -> None:
    def fn(x: Tensor, weight: Tensor) -> Tensor:
        y = _update(aten.alias.default(x), weight)
        return y + aten.roll.default(y, [1], [1])

    x, weight = inputs
    found, action = _both(fn, inputs, "drop", "scatter")
    keep = action.handles["keep"]
    kept = _update(_rows(x, keep), weight)
    full = x.scatter(1, keep[..., None].expand_as(kept), kept)
    torch.testing.assert_close(found, kept + _rows(full.roll([1], [1]), keep), rtol=1e-4, atol=1e-5)


def test_a_post_norm_stream_is_restored_behind_its_norm(inputs: list[Tensor]) -> None:
    """The cut is a norm: what a dropped token had there is not normed again."""

    def fn(x: Tensor, weight: Tensor) -> Tensor:
        y = aten.layer_norm.default(x, [WIDTH])
        y = aten.layer_norm.default(y + aten.linear.default(y, weight), [WIDTH])
        return y + _windowed(y)

    x, weight = inputs
    program = make_program(fn, inputs)
    cut = next(node for node in program.graph.nodes if node.target is aten.layer_norm.default)
    names = [node.name for node in program.graph.nodes if node.op == "placeholder"]
    action = Reduce("drop", restore="scatter")
    walk = Walk(
        program,
        EagerBuilder(),
        Entry(names[0]),
        actions={cut.name: [action]},
        inputs=dict(zip(names, inputs, strict=True)),
    )
    (value,) = walk.run()
    keep = action.handles["keep"]
    base = torch.nn.functional.layer_norm(x, [WIDTH])
    kept = _rows(base, keep)
    kept = torch.nn.functional.layer_norm(kept + kept @ weight.T, [WIDTH])
    full = base.scatter(1, keep[..., None].expand_as(kept), kept)
    torch.testing.assert_close(value.handle, kept + _rows(_windowed(full), keep), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kinds", [("drop", "merge"), ("merge", "drop"), ("merge", "merge"), ("drop", "drop")])
def test_restoring_through_several_reductions(inputs: list[Tensor], kinds: tuple[Kind, ...]) -> None:
    """Every token that was dropped is as it was, every one that was merged has its group's value."""

    def fn(x: Tensor) -> Tensor:
        return aten.roll.default(aten.alias.default(x), [0], [1])

    x = inputs[0]
    program = make_program(fn, [x])
    actions = [Reduce(kind, restore="unmerge") for kind in kinds]
    _, (value,) = walk_eager(program, "b n c", actions, [x])
    expected = actions[1].handles["x"]
    streams = [x, actions[0].handles["x"]]
    for action, before in zip(reversed(actions), reversed(streams), strict=True):
        keep = action.handles["keep"]
        if action.kind == "merge":
            expected = _rows(expected, _merged(before, action)[1])
        else:
            expected = before.scatter(1, keep[..., None].expand_as(expected), expected)
    torch.testing.assert_close(value.handle, expected, rtol=1e-5, atol=1e-6)


def test_padding_slots_are_not_written_back(inputs: list[Tensor]) -> None:
    def fn(x: Tensor, weight: Tensor) -> Tensor:
        return aten.roll.default(_update(aten.alias.default(x), weight), [0], [1])

    x, weight = inputs
    found, action = _both(fn, inputs, "padded", "scatter")
    keep, valid = action.handles["keep"], action.handles["valid"]
    expected = x.clone()
    for b in range(BATCH):
        for i, real in zip(keep[b].tolist(), valid[b].tolist(), strict=True):
            if real:
                expected[b, i] = _update(x[b, i], weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_rest_behind_protected_tokens_is_restored(inputs: list[Tensor]) -> None:
    """A sub-space without the protected tokens goes back to the same sub-space of the root."""

    def fn(x: Tensor) -> Tensor:
        return aten.roll.default(aten.slice.Tensor(aten.alias.default(x), 1, 2, 99), [0], [1])

    found, action = _both(fn, inputs[:1], "merge", "unmerge")
    merged, assign = _merged(inputs[0], action)
    torch.testing.assert_close(found, _rows(merged, assign)[:, 2:], rtol=1e-4, atol=1e-5)


def test_without_restore_it_is_refused(inputs: list[Tensor]) -> None:
    program = make_program(_pre_norm, inputs)
    with pytest.raises(AxisError, match="splits the token axis") as caught:
        walk_eager(program, "b n c", [Reduce("drop")], inputs)
    assert "restore" in str(caught.value.help)


def test_a_fused_axis_cannot_be_restored(inputs: list[Tensor]) -> None:
    def fn(x: Tensor) -> Tensor:
        return aten.roll.default(aten.alias.default(x).reshape(-1, WIDTH), [1], [0])

    with pytest.raises(AxisError, match="fused"):
        _both(fn, inputs[:1], "drop", "scatter")


MERGE: dict[str, Any] = {
    "preset": "tome",
    "r": 8,
    "at": {"layers": [0]},
    "select": {"kind": "bipartite", "of": "features"},
}
SWIN = {"version": 1, "steps": [{**MERGE, "restore": "unmerge"}]}


def test_swin_merges_between_windows() -> None:
    """Windowed attention runs over all tokens, the MLP behind the cut over fewer; patch merging sees all again."""
    entry = ZOO["swin"]
    inputs = entry.inputs(2)
    program = trace(entry.build(), inputs)
    reduced, plan = reduce_program(program, SWIN)
    eager, _ = run_eager(program, SWIN, inputs)
    found = run_program(reduced, inputs)
    for a, b in zip(found, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    (space,) = plan.made
    assert space.size == entry.tokens - 8
    assert [tuple(t.shape) for t in found] == [tuple(t.shape) for t in run_program(program, inputs)]
    mlp = [n for n in reduced.graph.nodes if n.target is aten.gelu.default]
    assert [n.meta["val"].shape[1] for n in mlp[:2]] == [entry.tokens - 8] * 2
    windows = [n for n in reduced.graph.nodes if n.target is aten.scaled_dot_product_attention.default]
    assert all(n.meta["val"].shape == o.meta["val"].shape for n, o in zip(windows, _attentions(program), strict=True))


def _attentions(program: Program) -> list[torch.fx.Node]:
    return [n for n in program.graph.nodes if n.target is aten.scaled_dot_product_attention.default]


def test_swin_without_restore_says_what_to_do() -> None:
    entry = ZOO["swin"]
    program = trace(entry.build(), entry.inputs(2))
    with pytest.raises(AxisError, match="splits the token axis") as caught:
        reduce_program(program, {"version": 1, "steps": [MERGE]})
    assert "restore: unmerge" in str(caught.value.help)
