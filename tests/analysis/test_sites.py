"""Sites are found by structure in every zoo model."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from tests.zoo import ZOO, ZooModel
from tokcc.analysis.sites import Sites, find_sites
from tokcc.errors import PlanError
from tokcc.ir.program import Program
from tokcc.testing import trace

aten = torch.ops.aten
ACTIVATIONS = {aten.gelu.default, aten.relu.default, aten.silu.default, aten.erf.default}
# Text models whose outputs never read token 0 alone: that it is a class token is not in the graph.
UNSEEN_CLS = {"bert_mean_pooled", "distilbert", "electra", "modernbert"}
# One of each structure runs by default, its variants with `make test-all`.
VARIANTS = {
    "vit_classifier",
    "dinov2",
    "clip_vision",
    "videomae",
    "ast",
    "bert_classifier",
    "roberta",
    "distilbert",
    "electra",
    "deit",
    "mpnet",
    "torch_encoder_bnc_pre",
    "torch_encoder_bnc_post",
    "torch_encoder_nbc_pre",
}


def _params(*, dynamic: bool) -> list[Any]:
    slow = set(ZOO) if dynamic else VARIANTS
    return [pytest.param(name, marks=[pytest.mark.slow] if name in slow else []) for name in ZOO]


@cache
def _found(name: str, dynamic: bool) -> tuple[ZooModel, Program, Sites]:
    entry = ZOO[name]
    if reason := entry.available():
        pytest.skip(reason)
    program = trace(entry.build(), entry.inputs(2), entry.dynamic_shapes() if dynamic else None)
    return entry, program, find_sites(program)


def _check(name: str, dynamic: bool) -> None:
    entry, program, sites = _found(name, dynamic)
    nodes = {node.name: node for node in program.graph.nodes}
    assert len(sites.layers) == entry.num_layers  # a pooling head is no layer
    assert (sites.entry.batch_axis, sites.entry.token_axis) == (entry.batch_axis, entry.token_axis)
    if not (dynamic and entry.has_length):
        assert sites.tokens == entry.tokens
    assert sites.prefix == (0 if name in UNSEEN_CLS else entry.prefix)
    assert sites.suffix == 0
    assert [bool(layer.windowed) for layer in sites.layers] == [entry.windowed] * entry.num_layers
    if entry.windowed:
        return
    assert not sites.lost
    if entry.scanned:
        assert all(layer.mixer is not None and layer.block_output is not None for layer in sites.layers)
        return
    _check_cuts(entry, sites, nodes, list(program.graph.nodes))


def _check_cuts(entry: ZooModel, sites: Sites, nodes: dict[str, fx.Node], order: list[fx.Node]) -> None:
    """In every layer: attention, the cut after it, the MLP, the cut after the block; all of the stream's shape."""
    names = [
        name
        for layer in sites.layers
        for name in (layer.attention.output, layer.after_attention, layer.block_output)
        if name is not None
    ]
    assert len(names) == 3 * entry.num_layers
    places = [sites.order[name] for name in names]
    assert places == sorted(set(places))
    shape = nodes[sites.entry.node].meta["val"].shape
    for layer in sites.layers:
        assert layer.after_attention is not None
        assert layer.block_output is not None
        after, output = sites.order[layer.after_attention], sites.order[layer.block_output]
        assert any(node.target in ACTIVATIONS for node in order[after:output])
        between = order[sites.order[layer.attention.output] : after]
        assert not any(node.target in ACTIVATIONS for node in between)
        for name in (layer.after_attention, layer.block_output):
            assert nodes[name].meta["val"].shape == shape
            assert sites.has_tokens(name)
            axes = sites.axes[name]
            assert axes.axis_of(axes.spaces.pop()) == sites.entry.token_axis
            assert axes.batch_axis() == sites.entry.batch_axis
        assert layer.label
    assert len({layer.label for layer in sites.layers}) == entry.num_layers
    assert sites.order[sites.encoder_output] >= places[-1]
    assert sites.has_tokens(sites.encoder_output)


@pytest.mark.parametrize("name", _params(dynamic=False))
def test_layers_and_cuts(name: str) -> None:
    _check(name, dynamic=False)


@pytest.mark.parametrize("name", _params(dynamic=True))
def test_layers_and_cuts_with_symbolic_sizes(name: str) -> None:
    _check(name, dynamic=True)


def test_post_norm_cuts_are_the_norms() -> None:
    _, program, sites = _found("torch_encoder_nbc_post", False)
    targets = {node.name: node.target for node in program.graph.nodes}
    for layer in sites.layers:
        assert targets[str(layer.after_attention)] is aten.layer_norm.default
        assert targets[str(layer.block_output)] is aten.layer_norm.default


def test_pre_norm_cuts_are_the_residual_sums() -> None:
    _, program, sites = _found("vit", False)
    targets = {node.name: node.target for node in program.graph.nodes}
    assert all(
        targets[str(name)] is aten.add.Tensor for x in sites.layers for name in (x.after_attention, x.block_output)
    )


def test_attention_written_out_has_the_same_cuts_as_fused() -> None:
    _, _, fused = _found("vit", False)
    _, _, eager = _found("vit_eager", False)
    assert all(layer.attention.fused for layer in fused.layers)
    assert not any(layer.attention.fused for layer in eager.layers)
    assert len(fused.layers) == len(eager.layers)


def test_windows_are_named() -> None:
    """Swin: the refusal names the node, and the stages behind patch merging have no cut."""
    _, _, sites = _found("swin", False)
    for layer in sites.layers:
        assert layer.windowed is not None
        assert "splits the token axis" in layer.windowed.what
    assert sites.layers[0].after_attention is not None
    assert sites.cut(2, "after_attention") is None
    assert sites.cut(3, "block_output") is None


# hand-made models -----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, parallel: bool = False) -> None:
        super().__init__()
        self.parallel = parallel
        self.norm = nn.LayerNorm(8)
        self.second = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (t.unsqueeze(1) for t in self.qkv(normed).chunk(3, -1))
        attended = nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1)
        if self.parallel:
            return x + attended + self.mlp(normed)
        x = x + attended
        return x + self.mlp(self.second(x))


class Stack(nn.Module):
    def __init__(self, head: str, parallel: bool = False) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(parallel), Block(parallel))
        self.embed = nn.Linear(8, 8)
        self.head = head

    def forward(self, x: Tensor) -> Any:
        x = self.blocks(self.embed(x))
        if self.head == "tokens":
            return x
        if self.head == "cls and last":
            return x[:, 0] + x[:, -1]
        return x.mean(1) if self.head == "mean" else x[:, 0]


@pytest.mark.parametrize(
    ("head", "special"), [("tokens", (0, 0)), ("mean", (0, 0)), ("cls", (1, 0)), ("cls and last", (1, 1))]
)
def test_special_tokens_are_what_a_head_selects(head: str, special: tuple[int, int]) -> None:
    sites = find_sites(trace(Stack(head), {"x": torch.randn(2, 8, 8)}))
    assert (sites.prefix, sites.suffix) == special
    assert len(sites.layers) == 2


def test_a_parallel_block_has_one_cut() -> None:
    sites = find_sites(trace(Stack("tokens", parallel=True), {"x": torch.randn(2, 7, 8)}))
    assert [layer.after_attention for layer in sites.layers] == [None, None]
    assert sites.cut(0, "block_output") is not None


@pytest.mark.parametrize("size", [2, 7, 8])
def test_the_token_axis_is_found_where_sizes_coincide(size: int) -> None:
    """Batch, tokens and channels of one size: only where the axis goes tells which is which."""
    sites = find_sites(trace(Stack("tokens"), {"x": torch.randn(size, size, 8)}))
    assert (sites.entry.batch_axis, sites.entry.token_axis) == (0, 1)


@pytest.mark.parametrize(
    "module",
    [nn.Sequential(nn.Linear(8, 8), nn.GELU()), nn.Sequential(nn.Linear(8, 8), nn.Softmax(-1), nn.Linear(8, 8))],
)
def test_a_model_without_attention_is_refused(module: nn.Module) -> None:
    with pytest.raises(PlanError, match="no attention found"):
        find_sites(trace(module, {"input": torch.randn(2, 7, 8)}))


def test_attention_without_a_residual_is_refused() -> None:
    class Bare(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x * 2, x * 3, x * 4)

    with pytest.raises(PlanError, match="no residual stream") as caught:
        find_sites(trace(Bare(), {"x": torch.randn(2, 4, 7, 8)}))
    assert caught.value.help
