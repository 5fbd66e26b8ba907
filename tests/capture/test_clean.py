"""Each clean-up pass on small graphs: what it removes, what it must keep, and that nothing changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from tokcc.capture.drop_noops import DropNoops
from tokcc.capture.export import clean
from tokcc.capture.fold_constants import FoldConstants
from tokcc.capture.narrow_masks import NarrowMasks
from tokcc.ir.program import Pass, Program
from tokcc.ir.verify import verify
from tokcc.testing import run_program

aten = torch.ops.aten
# torch's own pytree copies a deprecated class in run_decompositions.
pytestmark = pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning")


class Function(nn.Module):
    """A function with tables, as a module."""

    def __init__(self, fn: Callable[..., Any], tables: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.fn = fn
        for name, table in tables.items():
            self.register_buffer(name, table)

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        return self.fn(self, x, mask)


INPUTS = {"x": torch.randn(2, 7, 8), "mask": torch.tensor([[True] * 7, [True] * 4 + [False] * 3])}


def _program(fn: Callable[..., Any], dynamic: bool = False, **tables: Tensor) -> Program:
    batch, tokens = Dim("batch", min=2, max=16), Dim("tokens", min=2, max=32)
    shapes = {"x": {0: batch, 1: tokens}, "mask": {0: batch, 1: tokens}} if dynamic else None
    module = Function(fn, tables).eval()
    with torch.no_grad():
        exported = torch.export.export(module, (), dict(INPUTS), dynamic_shapes=shapes, strict=False)
    return Program.from_exported(exported.run_decompositions({}))


def _run(step: Pass, fn: Callable[..., Any], dynamic: bool = False, **tables: Tensor) -> tuple[Program, bool]:
    """Apply one pass, after dropping no-ops; the outputs must stay."""
    program = _program(fn, dynamic, **tables)
    feeds = [INPUTS]
    if dynamic:
        feeds.append({"x": torch.randn(3, 9, 8), "mask": torch.rand(3, 9) > 0.2})
    expected = [Function(fn, tables).eval()(**feed) for feed in feeds]
    if not isinstance(step, DropNoops):
        program = DropNoops().run(program).program
    result = step.run(program)
    verify(result.program, type(step).__name__)
    for feed, wanted in zip(feeds, expected, strict=True):
        for found, value in zip(
            run_program(result.program, feed), torch.utils._pytree.tree_leaves(wanted), strict=True
        ):
            torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-6)
    again = step.run(result.program)
    assert not again.modified, "a second run finds nothing to do"
    return result.program, result.modified


def _targets(program: Program) -> list[Any]:
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


def _attention_mask(program: Program) -> fx.Node | None:
    node = next(n for n in program.graph.nodes if n.target is aten.scaled_dot_product_attention.default)
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    assert mask is None or isinstance(mask, fx.Node)
    return mask


def _shape(node: fx.Node | None) -> list[Any]:
    assert node is not None
    return [size if isinstance(size, int) else str(size) for size in node.meta["val"].shape]


def _attend(x: Tensor, mask: Tensor | None) -> Tensor:
    heads = x.unsqueeze(1)
    return nn.functional.scaled_dot_product_attention(heads, heads, heads, mask).squeeze(1)


# no-ops ---------------------------------------------------------------------------------------------------------------


def test_copies_views_and_dropout_go() -> None:
    def fn(m: Function, x: Tensor, mask: Tensor) -> Tensor:
        y = nn.functional.dropout(x.clone().contiguous().detach(), 0.5, m.training)
        y = y.view(2, 7, 8).to(torch.float32).expand(2, 7, 8)[:, :]
        heads = y.view(2, 7, 2, 4).reshape(2, 7, 8)
        return heads * 2

    program, modified = _run(DropNoops(), fn)
    assert modified
    assert _targets(program) == [aten.mul.Tensor]


def test_views_become_reshapes() -> None:
    """A copy between a transpose and a view is what made the view legal."""

    def fn(m: Function, x: Tensor, mask: Tensor) -> Tensor:
        return x.transpose(0, 1).contiguous().view(7, 16)

    program, _ = _run(DropNoops(), fn)
    assert _targets(program) == [aten.transpose.int, aten.reshape.default]


def test_two_reshapes_are_one() -> None:
    def fn(m: Function, x: Tensor, mask: Tensor) -> Tensor:
        return x.reshape(14, 8).reshape(14, 2, 4).reshape(2, 7, 2, 4)

    program, _ = _run(DropNoops(), fn)
    assert _targets(program) == [aten.reshape.default]


def test_what_changes_something_stays() -> None:
    def fn(m: Function, x: Tensor, mask: Tensor) -> Any:
        return x.to(torch.float64), x[:, ::2], x[:, 1:], x[:, :1].expand(2, 7, 8), mask.to(torch.int64)

    program, _ = _run(DropNoops(), fn)
    kinds = _targets(program)
    assert len([t for t in kinds if t in (aten._to_copy.default, aten.to.dtype)]) == 2
    assert kinds.count(aten.expand.default) == 1
    assert kinds.count(aten.slice.Tensor) == 3


def test_symbolic_views_of_the_same_shape_go() -> None:
    def fn(m: Function, x: Tensor, mask: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1], 2, 4).reshape(x.shape[0], x.shape[1], 8) + 1

    program, _ = _run(DropNoops(), fn, dynamic=True)
    assert [t for t in _targets(program) if isinstance(t, torch._ops.OpOverload)] == [aten.add.Tensor]


def test_dropout_in_training_is_kept() -> None:
    program = _program(lambda m, x, mask: nn.functional.dropout(x, 0.5, True))
    assert aten.native_dropout.default in _targets(DropNoops().run(program).program)


# constants ------------------------------------------------------------------------------------------------------------


def test_what_depends_on_no_input_is_computed() -> None:
    def fn(m: Function, x: Tensor, mask: Tensor) -> Tensor:
        positions = torch.arange(7)
        bias = (positions[None, :] - positions[:, None]).abs().float() * m.table.mean()
        return x @ x.transpose(1, 2) + bias

    program, modified = _run(FoldConstants(), fn, table=torch.randn(3))
    assert modified
    assert set(_targets(program)) == {aten.matmul.default, aten.transpose.int, aten.add.Tensor}
    (constant,) = program.constants.values()
    assert constant.shape == (7, 7)
    assert not any(node.name.endswith("table") for node in program.placeholders.values())


def test_a_parameter_alone_is_not_copied() -> None:
    program, modified = _run(FoldConstants(), lambda m, x, mask: x + m.table, table=torch.randn(8))
    assert not modified
    assert len(program.placeholders) == 3


def test_large_results_stay_in_the_graph() -> None:
    def fn(m: Function, x: Tensor, mask: Tensor) -> Tensor:
        return x + m.table.expand(100, 7, 8).mean(0)

    program, _ = _run(FoldConstants(max_bytes=1000), fn, table=torch.randn(7, 8))
    assert aten.expand.default in _targets(program)
    assert all(value.numel() * value.element_size() <= 1000 for value in program.constants.values())
    program, _ = _run(FoldConstants(), fn, table=torch.randn(7, 8))
    assert aten.expand.default not in _targets(program)


def test_randomness_and_symbolic_sizes_are_not_folded() -> None:
    def fn(m: Function, x: Tensor, mask: Tensor) -> Tensor:
        return x + torch.arange(x.shape[1])[:, None]

    program, _ = _run(FoldConstants(), fn, dynamic=True)
    assert any(t in (aten.arange.start_step, aten.arange.default) for t in _targets(program))
    program = _program(lambda m, x, mask: x + torch.rand(8))
    assert aten.rand.default in _targets(FoldConstants().run(program).program)


def test_parts_of_several_outputs_are_folded() -> None:
    def fn(m: Function, x: Tensor, mask: Tensor) -> Tensor:
        first, second = m.table.split([3, 5])
        return torch.cat([x[..., :3] * first, x[..., 3:] * second], -1)

    program, modified = _run(FoldConstants(), fn, table=torch.randn(8))
    assert modified
    assert aten.split_with_sizes.default not in _targets(program)


# masks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_mask_of_all_true_goes(dynamic: bool) -> None:
    """As the factories of masks write it: positions that are at least zero, expanded over the batch."""

    def fn(m: Function, x: Tensor, mask: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1]) + 0
        seen = positions[None, None, None, :] >= 0
        return _attend(x, seen.expand(x.shape[0], 1, x.shape[1], x.shape[1]))

    program, modified = _run(NarrowMasks(), fn, dynamic)
    assert modified
    assert _attention_mask(program) is None
    assert aten.expand.default not in _targets(program)


def test_an_additive_mask_of_zeros_goes() -> None:
    def fused(m: Function, x: Tensor, mask: Tensor) -> Tensor:
        return _attend(x, torch.zeros(2, 1, 7, 7))

    def written(m: Function, x: Tensor, mask: Tensor) -> Tensor:
        return (x @ x.transpose(1, 2) + torch.zeros(2, 7, 7)).softmax(-1) @ x

    def chosen(m: Function, x: Tensor, mask: Tensor) -> Tensor:
        seen = torch.arange(7)[None, :] >= 0
        return (x @ x.transpose(1, 2) + torch.where(seen, 0.0, -1e9).expand(2, 7, 7)).softmax(-1) @ x

    program, _ = _run(NarrowMasks(), fused)
    assert _attention_mask(program) is None
    for fn in (written, chosen):
        program, modified = _run(NarrowMasks(), fn)
        assert modified
        assert aten.add.Tensor not in _targets(program)


@pytest.mark.parametrize(
    "seen",
    [
        lambda x: x.new_full([7], False, dtype=torch.bool).logical_not() & (torch.arange(3, -4, -1) >= 0),
        lambda x: x.new_full([2, 7, 7], False, dtype=torch.bool) | torch.eye(7, dtype=torch.bool),
        lambda x: torch.arange(7) - 3 >= 0,
        lambda x: torch.add(torch.arange(7), torch.arange(7), alpha=-1) - torch.arange(7) >= 0,
        lambda x: torch.arange(7) >= 1,
    ],
)
def test_a_mask_that_hides_something_is_kept(seen: Callable[[Tensor], Tensor]) -> None:
    def fn(m: Function, x: Tensor, mask: Tensor) -> Tensor:
        return _attend(x, seen(x).expand(2, 1, 7, 7) if seen(x).ndim < 3 else seen(x)[:, None])

    program, _ = _run(NarrowMasks(), fn)
    assert _attention_mask(program) is not None


def test_a_band_is_kept() -> None:
    def fn(m: Function, x: Tensor, mask: Tensor) -> Tensor:
        positions = torch.arange(7)
        band = (positions[None, :] - positions[:, None]).abs() <= 2
        return _attend(x, band.expand(2, 1, 7, 7))

    program, _ = _run(NarrowMasks(), fn)
    assert _shape(_attention_mask(program)) == [7, 7]


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_padding_mask_is_narrowed(dynamic: bool) -> None:
    """``all_true[1, 1, N, 1] & padding[B, 1, 1, N]``, expanded: what is needed is ``[B, 1, 1, N]``."""

    def fn(m: Function, x: Tensor, mask: Tensor) -> Tensor:
        tokens = x.shape[1]
        seen = torch.arange(tokens)[None, None, :, None] >= 0
        both = seen & mask[:, None, None, :]
        return _attend(x, both.expand(x.shape[0], 1, tokens, tokens))

    program, modified = _run(NarrowMasks(), fn, dynamic)
    assert modified
    shape = _shape(_attention_mask(program))
    assert shape[1:3] == [1, 1]
    assert (shape[0] != 1, shape[3] != 1) == (True, True)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_look_up_by_positions_is_a_view(dynamic: bool) -> None:
    def fn(m: Function, x: Tensor, mask: Tensor) -> Tensor:
        batch, tokens = mask.shape
        rows, columns = torch.arange(batch)[:, None, None, None], torch.arange(tokens)[None, None, None, :]
        return _attend(x, mask[rows, columns].expand(batch, 1, tokens, tokens))

    program, _ = _run(NarrowMasks(), fn, dynamic)
    assert aten.index.Tensor not in _targets(program)
    assert _shape(_attention_mask(program))[1:3] == [1, 1]


def test_a_look_up_at_other_positions_is_kept() -> None:
    def fn(m: Function, x: Tensor, mask: Tensor) -> Tensor:
        rows, columns = torch.arange(2)[:, None, None, None], (torch.arange(7) + 1)[None, None, None, :] % 7
        return _attend(x, mask[rows, columns])

    program, _ = _run(NarrowMasks(), fn)
    assert aten.index.Tensor in _targets(program)


def test_band_and_padding_keep_both() -> None:
    def fn(m: Function, x: Tensor, mask: Tensor) -> Tensor:
        positions = torch.arange(7)
        band = ((positions[None, :] - positions[:, None]).abs() <= 2)[None, None]
        return _attend(x, (band & mask[:, None, None, :]).expand(2, 1, 7, 7))

    program, _ = _run(NarrowMasks(), fn)
    assert _shape(_attention_mask(program)) == [2, 1, 7, 7]


def test_an_additive_padding_mask_is_narrowed() -> None:
    def fused(m: Function, x: Tensor, mask: Tensor) -> Tensor:
        both = mask[:, None, None, :].expand(2, 1, 7, 7)
        return _attend(x, torch.where(both, 0.0, -1e9))

    def written(m: Function, x: Tensor, mask: Tensor) -> Tensor:
        both = torch.where(mask[:, None, :].expand(2, 7, 7), 0.0, -1e9)
        return (x @ x.transpose(1, 2) + both).softmax(-1) @ x

    program, _ = _run(NarrowMasks(), fused)
    assert _shape(_attention_mask(program)) == [2, 1, 1, 7]
    program, _ = _run(NarrowMasks(), written)
    add = next(node for node in program.graph.nodes if node.target is aten.add.Tensor)
    assert _shape(add.args[1]) == [2, 1, 7]


def test_a_mask_that_others_read_in_full_is_kept_for_them() -> None:
    def fn(m: Function, x: Tensor, mask: Tensor) -> Any:
        full = mask[:, None, None, :].expand(2, 1, 7, 7)
        return _attend(x, full), full.float()

    program, _ = _run(NarrowMasks(), fn)
    assert _shape(_attention_mask(program)) == [2, 1, 1, 7]
    assert aten.expand.default in _targets(program)


def test_an_added_operand_that_sets_the_shape_is_kept() -> None:
    """``x[:, :1] + zeros[B, N, C]``: the zeros are what makes the result large."""

    def fn(m: Function, x: Tensor, mask: Tensor) -> Tensor:
        return x[:, :1] + torch.zeros(2, 7, 8)

    program, _ = _run(NarrowMasks(), fn)
    assert _shape(program.output_values[0]) == [2, 7, 8]


def test_all_passes_together_leave_attention_bare() -> None:
    def fn(m: Function, x: Tensor, mask: Tensor) -> Tensor:
        seen = torch.ones(7, dtype=torch.bool)[None, None, None, :].expand(2, 1, 7, 7)
        return _attend(x.clone(), seen & (torch.arange(7)[None, None, :, None] >= 0)).view(2, 7, 8)

    program = clean(_program(fn))
    assert _attention_mask(program) is None
    assert list(program.placeholders) == ["x", "mask"]
    torch.testing.assert_close(run_program(program, INPUTS)[0], _attend(INPUTS["x"], None))
