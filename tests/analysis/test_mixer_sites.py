"""State-space mixers are found by structure, alone and between attentions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokcc.kernels
from tests.lowering.harness import session_of
from tests.zoo.vim import Vim
from tokcc.analysis.sites import find_sites
from tokcc.backends.onnx import build_onnx
from tokcc.errors import AxisError, PlanError
from tokcc.ir.program import Program
from tokcc.testing import plan_for, reduce_program, run_program, trace

# torch's own pytree copies a deprecated class in run_decompositions.
pytestmark = pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning")
assert tokcc.kernels is not None

WIDTH = 8


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        decay, update = self.into(x).chunk(2, -1)
        return self.out(torch.ops.tokcc.recurrence(decay.sigmoid(), update, 1))  # type: ignore[no-any-return]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Model(nn.Module):
    """Blocks of a mixer or an attention (``m``, ``a``; capitals: with an MLP behind) and a norm."""

    def __init__(self, blocks: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, WIDTH)
        self.mixers = nn.ModuleList(Mixer() if kind in "mM" else Attention() for kind in blocks)
        self.mlps = nn.ModuleList(nn.Linear(WIDTH, WIDTH) if kind.isupper() else nn.Identity() for kind in blocks)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2 * len(blocks) + 1))
        self.blocks = blocks

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for i, kind in enumerate(self.blocks):
            x = x + self.mixers[i](self.norms[2 * i](x))
            if kind.isupper():
                x = x + self.mlps[i](self.norms[2 * i + 1](x)).relu()
        return self.norms[-1](x)  # type: ignore[no-any-return]  # a tensor


def traced(blocks: str) -> Program:
    return trace(Model(blocks), {"x": torch.randn(2, 9, 5)})


def test_vision_mamba() -> None:
    program = trace(Vim(side=8, depth=2, form="loop", tokens_out=True), {"pixel_values": torch.randn(2, 3, 8, 8)})
    sites = find_sites(program)
    assert (sites.tokens, sites.prefix, sites.suffix, sites.middle) == (5, 0, 0, 2)
    assert [len(layer.mixer.states) for layer in sites.layers if layer.mixer] == [2, 2]
    assert not sites.lost
    nodes = {node.name: node for node in program.graph.nodes}
    for layer in sites.layers:
        assert layer.attention is None
        assert layer.after_attention is None
        assert layer.block_output is not None
        assert nodes[layer.block_output].target is torch.ops.aten.add.Tensor
        assert layer.label.startswith(f"layers.{layer.index}.mixer")


def test_mamba_of_transformers() -> None:
    from transformers import MambaConfig, MambaModel

    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = MambaModel(MambaConfig(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=2))

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.model(input_ids=input_ids, use_cache=False).last_hidden_state  # type: ignore[no-any-return]

    sites = find_sites(trace(Text(), {"input_ids": torch.randint(0, 50, (2, 7))}))
    assert [layer.mixer is not None for layer in sites.layers] == [True, True]
    assert (sites.tokens, sites.middle) == (7, None)
    assert all(layer.block_output is not None for layer in sites.layers)


@pytest.mark.parametrize("blocks", ["m", "mm", "MM", "Mm", "aM", "AmA", "MA"])
def test_blocks_with_and_without_an_mlp(blocks: str) -> None:
    program = traced(blocks)
    sites = find_sites(program)
    assert [layer.attention is not None for layer in sites.layers] == [kind in "aA" for kind in blocks]
    assert [layer.mixer is not None for layer in sites.layers] == [kind in "mM" for kind in blocks]
    nodes = {node.name: node for node in program.graph.nodes}
    adds = [n.name for n in program.graph.nodes if n.target is torch.ops.aten.add.Tensor]
    ends, place = [], -1
    for kind in blocks:
        place += 2 if kind.isupper() else 1
        ends.append(adds[place])
    for layer, end in zip(sites.layers, ends, strict=True):
        if layer.mixer is not None:
            assert layer.block_output == end, nodes


@pytest.mark.parametrize("blocks", ["mm", "aM", "MA"])
def test_dropping_between_blocks(blocks: str) -> None:
    """What is left goes on as a sequence of its own."""
    model, feeds = Model(blocks), {"x": torch.randn(2, 9, 5)}
    program = trace(model, feeds)
    step = {"preset": "uniform", "keep": 0.5, "at": {"layers": [0], "site": "block_output"}}
    reduced, plan = reduce_program(program, {"version": 1, "steps": [step], "outputs": {"*": "reduced"}})
    found, _ = run_program(reduced, feeds)
    (engine, _) = session_of(build_onnx(reduced))(list(feeds.values()))
    with torch.no_grad():
        x = model.first(feeds["x"])
        for i, kind in enumerate(blocks):
            x = x + model.mixers[i](model.norms[2 * i](x))
            if kind.isupper():
                x = x + model.mlps[i](model.norms[2 * i + 1](x)).relu()
            if i == 0:
                x = x[:, [j * 9 // 5 for j in range(5)]]
        wanted = model.norms[-1](x)
    assert plan.made[0].size == 5
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(engine, wanted, rtol=0, atol=1e-5)


def test_attention_is_read_where_there_is_some() -> None:
    step = {"preset": "random", "score": {"kind": "attention_received"}, "keep": 0.5}
    at = {"layers": [0, 1], "site": "block_output"}
    with pytest.raises(PlanError, match="layer 1 has no attention") as caught:
        plan_for(traced("AM"), {"version": 1, "steps": [{**step, "at": at}]})
    assert caught.value.help
    with pytest.raises(PlanError, match="layer 0 has none") as caught:
        plan_for(traced("AM"), {"version": 1, "steps": [{"preset": "top-vim", "at": at}]})
    assert caught.value.help
    assert plan_for(traced("AM"), {"version": 1, "steps": [{**step, "at": {**at, "layers": [0]}}]}).reductions


def test_merged_tokens_have_no_place_in_a_sequence() -> None:
    step = {
        "node": "merge",
        "at": {"layers": [0], "site": "block_output"},
        "select": {"kind": "bipartite", "of": "features"},
        "budget": {"remove": 2},
    }
    with pytest.raises(AxisError, match="no one place") as caught:
        reduce_program(traced("mm"), {"version": 1, "steps": [step]})
    assert caught.value.help is not None
    assert "reduce: {kind: drop}" in caught.value.help


class Masked(Model):
    """With a padding mask, as state-space models of text have it."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        assert mask is not None
        return super().forward(x * mask[..., None])


def test_padding_is_not_guessed() -> None:
    program = trace(Masked("mm"), {"x": torch.randn(2, 9, 5), "mask": torch.ones(2, 9)})
    step = {"preset": "uniform", "keep": 0.5, "at": {"layers": [0], "site": "block_output"}}
    with pytest.raises(AxisError, match="which tokens are padding") as caught:
        reduce_program(program, {"version": 1, "steps": [step]})
    assert caught.value.help is not None
    assert "padding mask" in caught.value.help
