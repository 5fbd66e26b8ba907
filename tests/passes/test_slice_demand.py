"""Demand slicing loses nothing and saves work."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from tests.passes.reference_models import audio, frames
from tests.zoo import ZOO
from tokcc.analysis.ledger import Ledger, ledger
from tokcc.analysis.sites import find_sites
from tokcc.ir.program import Program
from tokcc.ir.verify import verify
from tokcc.passes.plan import Plan
from tokcc.passes.slice_demand import SliceDemand
from tokcc.testing import plan_for, reduce_program, run_program, trace

# torch's own pytree copies a deprecated class in run_decompositions.
pytestmark = pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning")

Policy = str | Mapping[str, Any]


class Only(nn.Module):
    """One output of a zoo model."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model = model
        self.name = name

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        return {self.name: self.model(**inputs)[self.name]}


class Fused(nn.Module):
    """A ViT as timm writes it: one product for query, key and value, and the head on token 0."""

    def __init__(self, blocks: int = 3, width: int = 32, heads: int = 4, eager: bool = False) -> None:
        super().__init__()
        self.heads, self.eager = heads, eager
        self.patch = nn.Linear(12, width)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        names = {"norm1": nn.LayerNorm, "norm2": nn.LayerNorm}
        self.blocks = nn.ModuleList()
        for _ in range(blocks):
            block = nn.ModuleDict({name: kind(width) for name, kind in names.items()})
            block["qkv"] = nn.Linear(width, 3 * width)
            block["out"] = nn.Linear(width, width)
            block["up"], block["down"] = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
            self.blocks.append(block)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 7)

    def attend(self, block: Any, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        parts = block["qkv"](x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        if self.eager:
            y = torch.softmax(q @ k.transpose(-1, -2) * (width // self.heads) ** -0.5, -1) @ v
        else:
            y = nn.functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = block["out"](y.transpose(1, 2).reshape(batch, tokens, width))
        return out

    def forward(self, patches: Tensor) -> dict[str, Tensor]:
        x = torch.cat([self.cls.expand(patches.shape[0], -1, -1), self.patch(patches)], 1)
        for block in self.blocks:
            assert isinstance(block, nn.ModuleDict)
            x = x + self.attend(block, block["norm1"](x))
            x = x + block["down"](nn.functional.gelu(block["up"](block["norm2"](x))))
        return {"logits": self.head(self.norm(x)[:, 0])}


def sliced(program: Program, policy: Policy = "none") -> tuple[Program, Program, bool, Plan]:
    """The reduced program, the same after slicing, whether that changed it, and the plan."""
    whole, plan = reduce_program(program, policy)
    result = SliceDemand(plan.sites).run(whole)
    verify(result.program, "SliceDemand")
    return whole, result.program, result.modified, plan


def assert_lossless(whole: Program, result: Program, inputs: Mapping[str, Tensor]) -> None:
    for before, after in zip(run_program(whole, inputs), run_program(result, inputs), strict=True):
        assert float((before - after).abs().max()) <= 1e-5 * max(1.0, float(before.abs().max()))


def costs(plan: Plan, program: Program, inputs: Mapping[str, Tensor]) -> Ledger:
    return ledger(program, plan.sites, {name: tuple(value.shape) for name, value in inputs.items()})


@cache
def traced(name: str, only: str | None = None) -> Program:
    entry = ZOO[name]
    model = entry.build()
    return trace(Only(model, only).eval() if only else model, entry.inputs(2))


@cache
def dynamic(name: str) -> Program:
    entry = ZOO[name]
    return trace(entry.build(), entry.inputs(3), entry.dynamic_shapes())


ROWS = [
    ("vit_classifier", None),
    ("bert_classifier", None),
    ("deit", "pooler_output"),
    ("dinov2_registers", "pooler_output"),
]
MORE = [
    ("vit", "pooler_output"),
    ("vit_eager", "pooler_output"),
    ("beit", "pooler_output"),
    ("dinov2", "pooler_output"),
    ("clip_vision", "pooler_output"),
    ("ast", "pooler_output"),
    ("bert", "pooler_output"),
    ("bert_eager", "pooler_output"),
    ("roberta", "pooler_output"),
    ("mpnet", "pooler_output"),
    ("timm_vit", None),
    ("timm_deit_distilled", None),
]
EVERY = [*ROWS, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)]


@pytest.mark.parametrize(("name", "only"), EVERY)
def test_pooled_models_save_most_of_the_last_block(name: str, only: str | None) -> None:
    if reason := ZOO[name].available():
        pytest.skip(reason)
    inputs = ZOO[name].inputs(2, seed=1)
    whole, result, changed, plan = sliced(traced(name, only))
    assert changed, result.notes
    assert_lossless(whole, result, inputs)
    before, after = costs(plan, whole, inputs), costs(plan, result, inputs)
    assert after.blocks[-1].flops < 0.75 * before.blocks[-1].flops  # all but keys and values
    assert [b.flops for b in after.blocks[:-1]] == [b.flops for b in before.blocks[:-1]]


@pytest.mark.parametrize("name", ["siglip_vision", "bert_mean_pooled"])
def test_pooling_over_all_tokens_wants_all_of_them(name: str) -> None:
    whole, result, changed, _ = sliced(traced(name, None))
    assert not changed
    assert result is whole


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_hidden_states_are_untouched(name: str) -> None:
    """All tokens leave the model beside the pooled one: there is nothing to leave out."""
    _, result, changed, _ = sliced(traced(name))
    assert not changed
    assert not result.notes


def test_two_heads_keep_two_rows() -> None:
    """DeiT-distilled: one head on token 0 and one on token 1."""
    entry = ZOO["deit"]

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = entry.build()
            self.first, self.second = nn.Linear(64, 3), nn.Linear(64, 3)

        def forward(self, pixel_values: Tensor) -> Tensor:
            hidden = self.model(pixel_values)["last_hidden_state"]
            out: Tensor = (self.first(hidden[:, 0]) + self.second(hidden[:, 1])) / 2
            return out

    torch.manual_seed(0)
    inputs = entry.inputs(2, seed=3)
    whole, result, changed, plan = sliced(trace(Heads(), inputs))
    assert changed
    assert_lossless(whole, result, inputs)
    queries = [n.args[0] for n in result.graph.nodes if n.target is torch.ops.aten.scaled_dot_product_attention.default]
    assert [int(q.meta["val"].shape[-2]) for q in queries] == [66, 66, 66, 2]
    assert costs(plan, result, inputs).blocks[-1].flops < 0.5 * costs(plan, whole, inputs).blocks[-1].flops


@pytest.mark.parametrize("eager", [False, True], ids=["sdpa", "eager"])
@pytest.mark.parametrize(
    "policy", ["none", {"version": 1, "steps": [{"preset": "tome", "r": 4}]}], ids=["none", "tome"]
)
def test_fused_projections(eager: bool, policy: Policy) -> None:
    """At least nothing is lost; how much is saved depends on how the model is written."""
    torch.manual_seed(1)
    inputs = {"patches": torch.randn(2, 24, 12)}
    whole, result, changed, plan = sliced(trace(Fused(eager=eager), inputs), policy)
    assert changed, result.notes
    assert_lossless(whole, result, inputs)
    assert costs(plan, result, inputs).blocks[-1].flops < costs(plan, whole, inputs).blocks[-1].flops


@pytest.mark.parametrize("preset", ["tome", "evit", "uniform"])
def test_composes_with_reductions(preset: str) -> None:
    inputs = ZOO["vit_classifier"].inputs(2, seed=2)
    whole, result, changed, plan = sliced(traced("vit_classifier"), preset)
    assert changed, result.notes
    assert_lossless(whole, result, inputs)
    assert costs(plan, result, inputs).total.flops < costs(plan, whole, inputs).total.flops


def merges(program: Program) -> int:
    return sum(1 for node in program.graph.nodes if node.target is torch.ops.tokcc.merge_tokens.default)


def test_the_last_layers_merge_disappears() -> None:
    """Where only the class token is read, a merge behind the last attention changes nothing that is."""
    whole, result, _, _ = sliced(traced("vit_classifier"), "tome")
    assert merges(result) == merges(whole) - 1
    last = {"version": 1, "steps": [{"preset": "tome", "at": {"layers": [-1]}}]}
    whole, result, _, plan = sliced(traced("vit_classifier"), last)
    assert merges(result) == 0
    inputs = ZOO["vit_classifier"].inputs(2, seed=2)
    assert_lossless(whole, result, inputs)
    assert costs(plan, result, inputs).inserted.flops == 0


def test_a_fused_token_at_the_last_layer_disappears() -> None:
    policy = {"version": 1, "steps": [{"preset": "evit", "at": {"layers": [-1]}}]}
    whole, result, _, _ = sliced(traced("vit_classifier"), policy)
    inputs = ZOO["vit_classifier"].inputs(2, seed=2)
    assert_lossless(whole, result, inputs)
    selections = [n for n in result.graph.nodes if n.target is torch.ops.tokcc.topk_select.default]
    assert not selections


@pytest.mark.parametrize("preset", ["none", "evit"])
def test_symbolic_batch(preset: str) -> None:
    whole, result, changed, _ = sliced(dynamic("vit_classifier"), preset)
    assert changed
    for batch in (1, 4):
        assert_lossless(whole, result, ZOO["vit_classifier"].inputs(batch, seed=5))


def test_symbolic_length() -> None:
    whole, result, changed, _ = sliced(dynamic("bert_classifier"), "power-bert")
    assert changed, result.notes
    for batch, length in ((1, 9), (3, 25)):
        assert_lossless(whole, result, ZOO["bert_classifier"].inputs(batch, length, seed=5))


def test_without_sites_nothing_is_sliced() -> None:
    """It must know which axis holds tokens."""
    program = traced("vit_classifier")
    assert not SliceDemand().run(program).modified
    assert SliceDemand(find_sites(program)).run(program).modified
    assert plan_for(program, "none").reductions == ()


class Rows(nn.Module):
    """An encoder of frames of which some rows are read."""

    def __init__(self, rows: Any) -> None:
        super().__init__()
        self.encoder, self.rows = audio(2), rows

    def forward(self, frames: Tensor) -> Tensor:
        hidden = self.encoder(frames)
        hidden = next(iter(hidden.values())) if isinstance(hidden, dict) else hidden
        return torch.cat([hidden[:, row].flatten(1) for row in self.rows], 1)


ENDS = [[-1], [slice(-3, None)], [slice(-3, -1)], [0, -1], [0, 2, -2]]


HALF = {"node": "prune", "select": {"kind": "uniform"}, "budget": {"keep": 0.5}, "at": {"layers": [0]}}


@pytest.mark.parametrize(
    ("rows", "steps"), [*((rows, []) for rows in ENDS), ([-1], [HALF]), ([0, 2, -2], [HALF])], ids=str
)
def test_rows_from_a_dynamic_end(rows: list[Any], steps: list[Any]) -> None:
    """The end of a sequence of symbolic length is found when it runs."""
    shapes = {"frames": {0: Dim("batch", min=1, max=9), 1: Dim("sequence", min=4, max=60)}}
    program = trace(Rows(rows), {"frames": frames(2, 16)}, shapes)
    protect = {"first": max((row + 1 for row in rows if isinstance(row, int) and row >= 0), default=0), "last": 3}
    policy: Policy = {"version": 1, "steps": [{**step, "protect": protect} for step in steps]}
    whole, result, changed, plan = sliced(program, policy)
    assert changed, result.notes
    for length in (23, 9, 6):
        assert_lossless(whole, result, {"frames": frames(3, length, seed=length)})
    inputs = {"frames": frames(2, 40)}
    assert costs(plan, result, inputs).blocks[-1].flops < 0.75 * costs(plan, whole, inputs).blocks[-1].flops


@pytest.mark.parametrize("chosen", ["last_token", {"rows": [0, -1]}], ids=str)
def test_an_output_of_the_last_row(chosen: Any) -> None:
    """What a contract asks for is followed, also where the length is dynamic."""
    shapes = {"frames": {0: Dim("batch", min=1, max=9), 1: Dim("sequence", min=4, max=60)}}
    program = trace(audio(2), {"frames": frames(2, 16)}, shapes)
    whole, result, changed, plan = sliced(program, {"version": 1, "steps": [], "outputs": {"tokens": chosen}})
    assert changed, result.notes
    for length in (23, 7, 4):
        assert_lossless(whole, result, {"frames": frames(3, length, seed=length)})
    inputs = {"frames": frames(2, 40)}
    assert costs(plan, result, inputs).blocks[-1].flops < 0.75 * costs(plan, whole, inputs).blocks[-1].flops
