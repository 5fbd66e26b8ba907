"""What a reduced token axis does not allow is refused by name and with a remedy, never guessed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.analysis.cases.places import PLACES
from tests.analysis.oracle import Kind, Reduce, make_program, walk_eager, walk_graph
from tokcc.errors import AxisError

aten = torch.ops.aten
sdpa = aten.scaled_dot_product_attention.default
BATCH, TOKENS = 2, 12


@dataclass(frozen=True)
class Refused:
    name: str
    fn: Callable[[Tensor], Any]
    what: str
    node: str
    kind: Kind = "drop"
    help: str = "restore: unmerge"


def _weight(*shape: int) -> Tensor:
    return torch.ones(shape)


CASES = [
    Refused("windows", lambda x: x.reshape(2, 4, 3, 8), "splits the token axis", "reshape"),
    Refused("windows in the batch", lambda x: x.reshape(6, 4, 8), "splits the token axis", "reshape"),
    Refused("windows by view", lambda x: aten.view.default(x, [2, 3, 4, 8]), "splits the token axis", "view"),
    Refused("windows by unflatten", lambda x: aten.unflatten.int(x, 1, [3, 4]), "splits the token axis", "unflatten"),
    Refused("tokens into channels", lambda x: x.reshape(2, 6, 16), "splits the token axis", "reshape"),
    Refused("conv1d", lambda x: aten.conv1d.default(x.transpose(1, 2), _weight(8, 8, 3)), "convolution", "conv1d"),
    Refused(
        "conv1d, padding by name",
        lambda x: aten.conv1d.padding(x.transpose(1, 2), _weight(8, 8, 3), None, [1], "same"),
        "convolution",
        "conv1d",
    ),
    Refused(
        "conv1d that reads tokens behind",
        lambda x: aten.conv1d.default(x.transpose(1, 2), _weight(8, 1, 3), None, [1], [1], [1], 8),
        "convolution",
        "conv1d",
    ),
    Refused(
        "a part of what a causal convolution gives",
        lambda x: aten.conv1d.default(x.transpose(1, 2), _weight(8, 1, 4), None, [1], [3], [1], 8)[..., 1:13],
        "does not hold all of them",
        "slice",
    ),
    Refused(
        "causal convolution of merged tokens",
        lambda x: aten.conv1d.default(x.transpose(1, 2), _weight(8, 1, 4), None, [1], [3], [1], 8),
        "merged tokens have no one place",
        "conv1d",
        "merge",
        help="reduce: {kind: drop}",
    ),
    Refused(
        "merged tokens from behind",
        lambda x: aten.flip.default(x, [1]),
        "merged tokens have no one place",
        "flip",
        "merge",
        help="reduce: {kind: drop}",
    ),
    Refused("samples from behind", lambda x: aten.flip.default(x, [0]), "holds samples", "flip"),
    Refused(
        "tokens and their reversal",
        lambda x: x + aten.flip.default(x, [1]),
        "neither was made from the other",
        "add",
    ),
    Refused(
        "tokens padded by others", lambda x: aten.pad.default(x.transpose(1, 2), [1, 1], "reflect"), "by others", "pad"
    ),
    Refused(
        "samples padded", lambda x: aten.constant_pad_nd.default(x, [0, 0, 0, 0, 1, 0]), "holds samples", "constant"
    ),
    Refused("tokens cut off", lambda x: aten.constant_pad_nd.default(x, [0, 0, -1, 0]), "negative padding", "constant"),
    Refused(
        "a state over merged tokens",
        lambda x: torch.ops.tokcc.recurrence.default(x, x, 1),
        "merged tokens have no one place",
        "recurrence",
        "merge",
        help="reduce: {kind: drop}",
    ),
    Refused("a state over samples", lambda x: torch.ops.tokcc.recurrence.default(x, x, 0), "samples", "recurrence"),
    Refused(
        "a state over padding",
        lambda x: torch.ops.tokcc.recurrence.default(*[aten.constant_pad_nd.default(x, [0, 0, 1, 0])] * 2, 1),
        "tokens and padding",
        "recurrence",
    ),
    Refused(
        "a sum over tokens with letters",
        lambda x: aten.einsum.default("bnc,bnd->bcd", [x, x]),
        "without attention weights",
        "einsum",
    ),
    Refused(
        "a diagonal with letters",
        lambda x: aten.einsum.default("bnn->bn", [x[..., :1].expand(2, 12, 12)]),
        "einsum",
        "einsum",
    ),
    Refused("conv2d", lambda x: aten.conv2d.default(x.unsqueeze(1), _weight(1, 1, 1, 1)), "convolution", "conv2d"),
    Refused(
        "conv2d, padding by name",
        lambda x: aten.conv2d.padding(x.unsqueeze(1), _weight(1, 1, 1, 1), None, [1, 1], "same"),
        "convolution",
        "conv2d",
    ),
    Refused(
        "conv3d",
        lambda x: aten.conv3d.default(x.unsqueeze(1).unsqueeze(1), _weight(1, 1, 1, 1, 1)),
        "convolution",
        "conv3d",
    ),
    Refused(
        "convolution",
        lambda x: aten.convolution.default(x.transpose(1, 2), _weight(8, 8, 1), None, [1], [0], [1], False, [0], 1),
        "convolution",
        "convolution",
    ),
    Refused(
        "layer over tokens",
        lambda x: aten.linear.default(x.transpose(1, 2), _weight(5, 12)),
        "mixes the token axis",
        "linear",
    ),
    Refused("mixer", lambda x: aten.matmul.default(_weight(12, 12), x), "without attention weights", "matmul"),
    Refused(
        "vector over tokens",
        lambda x: aten.matmul.default(x.transpose(1, 2), _weight(12)),
        "attention weights",
        "matmul",
    ),
    Refused(
        "addmm over tokens",
        lambda x: aten.addmm.default(_weight(5), x[0].t(), _weight(12, 5)),
        "mixes the token axis",
        "addmm",
    ),
    Refused("gram matrix", lambda x: aten.matmul.default(x.transpose(1, 2), x), "without attention weights", "matmul"),
    Refused("gram matrix, bmm", lambda x: aten.bmm.default(x.transpose(1, 2), x), "without attention weights", "bmm"),
    Refused(
        "gram matrix, baddbmm",
        lambda x: aten.baddbmm.default(_weight(2, 8, 8), x.transpose(1, 2), x),
        "without attention weights",
        "baddbmm",
    ),
    Refused(
        "powers of probabilities",
        lambda x: ((x @ x.transpose(1, 2)).softmax(-1) ** 2) @ x,
        "without attention weights",
        "matmul",
    ),
    Refused(
        "log-probabilities",
        lambda x: aten.matmul.default(aten.log_softmax.int(x @ x.transpose(1, 2), -1), x),
        "without attention weights",
        "matmul",
    ),
    Refused("sum", lambda x: aten.sum.dim_IntList(x, [1]).relu(), "a sum over the token axis is used", "relu"),
    Refused(
        "sum into a layer",
        lambda x: aten.linear.default(x.sum(1), _weight(8, 8)),
        "a sum over the token axis",
        "linear",
    ),
    Refused("sum of everything", lambda x: aten.sum.default(x) * 1.0, "a sum over the token axis", "sum"),
    Refused("sum by a number", lambda x: x.sum(1) / 12, "divided by a fixed number", "div"),
    Refused(
        "sum by another sum", lambda x: x.sum(1) / torch.ones(2, 8).sum(1, keepdim=True), "divided by a sum over", "div"
    ),
    Refused("sum by a table", lambda x: x.sum(1) / (torch.ones(2, 8) * 3), "not count", "div"),
    Refused(
        "clamped sum", lambda x: x.sum(1).clamp(min=0) / torch.ones(2, 12).sum(1, keepdim=True), "not such a sum", "div"
    ),
    Refused("sum below the line", lambda x: torch.ones(2, 8) / x.sum(1), "not such a sum", "div"),
    Refused("sum and more", lambda x: x.sum(1) + x[:, 0], "a sum over the token axis is used", "add"),
    Refused("mean of everything", lambda x: aten.mean.default(x), "together with other axes", "mean"),
    Refused("mean over fused tokens", lambda x: aten.mean.dim(PLACES["(n b) c"](x), [0]), "fused", "mean", "merge"),
    Refused("mean over fused tokens, drop", lambda x: aten.mean.dim(PLACES["(n b) c"](x), [0]), "fused", "mean"),
    Refused("maximum", lambda x: aten.amax.default(x, [1]), "miss the dropped tokens", "amax"),
    Refused("minimum", lambda x: aten.amin.default(x, [1]), "miss the dropped tokens", "amin"),
    Refused("position of the maximum", lambda x: aten.argmax.default(x, 1), "miss the dropped tokens", "argmax"),
    Refused("position of the minimum", lambda x: aten.argmin.default(x, 1), "miss the dropped tokens", "argmin"),
    Refused("any token", lambda x: aten.any.dim(x > 0, 1), "miss the dropped tokens", "any"),
    Refused("any at all", lambda x: aten.any.default(x > 0), "miss the dropped tokens", "any"),
    Refused("all tokens", lambda x: aten.all.dim(x > 0, 1), "miss the dropped tokens", "all"),
    Refused(
        "norm over tokens", lambda x: aten.linalg_vector_norm.default(x, 2, [1]), "miss the dropped tokens", "linalg"
    ),
    Refused("norm over tokens, old", lambda x: aten.norm.ScalarOpt_dim(x, 2, [1]), "miss the dropped tokens", "norm"),
    Refused("layer norm over tokens", lambda x: aten.layer_norm.default(x, [12, 8]), "normalisation", "layer_norm"),
    Refused(
        "rms norm over tokens", lambda x: aten.rms_norm.default(x.transpose(1, 2), [12]), "normalisation", "rms_norm"
    ),
    Refused("group norm", lambda x: aten.group_norm.default(x.transpose(1, 2), 2), "normalisation", "group_norm"),
    Refused(
        "batch norm per token",
        lambda x: aten.batch_norm.default(x, None, None, _weight(12), _weight(12), False, 0.1, 1e-5, False),
        "normalisation",
        "batch_norm",
    ),
    Refused("cumsum", lambda x: aten.cumsum.default(x, 1), "no axis rule", "cumsum"),
    Refused("roll", lambda x: aten.roll.default(x, [1], [1]), "no axis rule", "roll"),
    Refused("sort", lambda x: aten.sort.default(x, 1)[0], "no axis rule", "sort"),
    Refused("unfold", lambda x: aten.unfold.default(x, 1, 3, 1), "no axis rule", "unfold"),
    Refused("unknown operation", lambda x: aten.logcumsumexp.default(x, 1), "no axis rule", "logcumsumexp"),
    Refused("index", lambda x: aten.index.Tensor(x, [None, torch.arange(3)]), "no axis rule", "index"),
    Refused(
        "gather", lambda x: aten.gather.default(x, 1, torch.zeros(2, 3, 8, dtype=torch.int64)), "computed", "gather"
    ),
    Refused("index_select", lambda x: aten.index_select.default(x, 1, torch.arange(3)), "computed", "index_select"),
    Refused("select", lambda x: aten.select.int(x, 1, 5), "token 5 is selected", "select", help="protect: {first: 6}"),
    Refused(
        "select the last",
        lambda x: aten.select.int(x, 1, -1),
        "token 11 is selected",
        "select",
        help="protect: {first: 12}",
    ),
    Refused(
        "slice", lambda x: aten.slice.Tensor(x, 1, 0, 6), "may have been dropped", "slice", help="protect: {first: P}"
    ),
    Refused(
        "slice the rest",
        lambda x: aten.slice.Tensor(x, 1, 5, 99),
        "may have been dropped",
        "slice",
        help="protect: {first: P}",
    ),
    Refused(
        "every second", lambda x: aten.slice.Tensor(x, 1, 0, 99, 2), "with a step", "slice", help="protect: {first: P}"
    ),
    Refused("slice a fused axis", lambda x: aten.slice.Tensor(PLACES["(n b) c"](x), 0, 0, 4), "fused", "slice"),
    Refused(
        "split", lambda x: aten.split.Tensor(x, 6, 1)[0], "the token axis is split", "split", help="protect: {first: P}"
    ),
    Refused(
        "split by sizes", lambda x: aten.split_with_sizes.default(x, [5, 7], 1)[1], "is split", "split", help="protect"
    ),
    Refused(
        "split by sizes, composite", lambda x: aten.split.sizes(x, [5, 7], 1)[0], "is split", "split", help="protect"
    ),
    Refused("chunk", lambda x: aten.chunk.default(x, 2, 1)[1], "is split", "chunk", help="protect"),
    Refused("unbind", lambda x: aten.unbind.int(x, 1)[0], "taken apart", "unbind"),
    Refused("split the batch", lambda x: aten.split.Tensor(x, 1, 0)[0], "the batch axis is", "split"),
    Refused("slice the batch", lambda x: aten.slice.Tensor(x, 0, 0, 1), "the batch axis is sliced", "slice"),
    Refused("repeat", lambda x: aten.repeat.default(x, [1, 2, 1]), "repeated", "repeat"),
    Refused("more tokens", lambda x: aten.cat.default([x, torch.zeros(2, 3, 8)], 1), "concatenated", "cat"),
    Refused("more tokens in front", lambda x: aten.cat.default([torch.zeros(2, 3, 8), x], 1), "concatenated", "cat"),
    Refused("twice the tokens", lambda x: aten.cat.default([x, x], 1), "concatenated", "cat"),
    Refused(
        "another head in front",
        lambda x: aten.cat.default([torch.zeros(2, 3, 8), x[:, 2:]], 1),
        "concatenated",
        "cat",
    ),
    Refused("softmax over a fused axis", lambda x: aten.softmax.int(PLACES["(b n) c"](x), 0), "fused", "softmax"),
    Refused("merged softmax over a fused axis", lambda x: PLACES["(b n) c"](x).softmax(0), "fused", "softmax", "merge"),
    Refused(
        "causal attention of merged tokens",
        lambda x: sdpa(x, x, x, None, 0.0, True),
        "reordered",
        "scaled_dot_product_attention",
        "merge",
    ),
    Refused(
        "causal attention to other tokens",
        lambda x: sdpa(x, torch.ones(2, 12, 8), torch.ones(2, 12, 8), None, 0.0, True),
        "different token sets",
        "scaled_dot_product_attention",
    ),
    Refused(
        "probabilities over all tokens",
        lambda x: (x @ x.transpose(1, 2)).softmax(-1) @ aten.alias.default(x),
        "would lose their sum",
        "matmul",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("how", ["eager", "graph"])
def test_refused(case: Refused, how: str) -> None:
    x = torch.randn(BATCH, TOKENS, 8, generator=torch.Generator().manual_seed(0))
    program = make_program(case.fn, [x])
    walk = walk_eager if how == "eager" else walk_graph
    with pytest.raises(AxisError) as caught:
        walk(program, "b n c", [Reduce(case.kind)], [x])
    error = caught.value
    assert case.what in error.what
    assert error.node is not None
    assert error.node.startswith(case.node), error.node
    assert "->" in error.node
    assert error.help is not None
    assert case.help in error.help
