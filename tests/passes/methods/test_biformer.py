"""BiFormer against a brute-force reading of arXiv:2303.08810: one sample, one region and one query at a time."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import tokcc
from tests.decoders import tiny
from tests.passes.oracle import run_engine
from tests.passes.reference_models import HEADS, WIDTH, Audio, Vision, audio, frames, patches, sentences, text, vision
from tests.zoo.models import ZOO
from tokcc.config import load_policy
from tokcc.errors import PlanError, PolicyError, TokccError
from tokcc.ir.program import Program
from tokcc.passes.methods import library
from tokcc.pipeline.reducing import reduce_program as reduce_all
from tokcc.pipeline.stages import Stages
from tokcc.testing import plan_for, reduce_program, run_eager, run_program, trace

# torch's own pytree copies a deprecated class in run_decompositions.
pytestmark = pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning")

WIDE = WIDTH // HEADS
Lists = list[list[set[int]]]
"""By layer and region: the regions that it reads."""


# the paper -------------------------------------------------------------------------------------------------------


def region_of(patch: int, rows: int, columns: int, across: int) -> int:
    row, column = divmod(patch, columns)
    return (row // (rows // across)) * across + column // (columns // across)


def attended(
    q: Tensor, k: Tensor, v: Tensor, special: int, grid: tuple[int, int], across: int, best: int, scale: float
) -> tuple[Tensor, list[set[int]]]:
    """``[N, C]`` each; the first ``special`` tokens are no patches."""
    members: list[list[int]] = [[] for _ in range(across**2)]
    for patch in range(grid[0] * grid[1]):
        members[region_of(patch, *grid, across)].append(patch + special)
    mean_q = [sum((q[i] for i in region), torch.zeros(WIDTH)) / len(region) for region in members]
    mean_k = [sum((k[i] for i in region), torch.zeros(WIDTH)) / len(region) for region in members]
    lists, out = [], torch.zeros_like(v)
    for own in mean_q:
        affinity = [float(own @ other) * scale for other in mean_k]
        lists.append(set(sorted(range(len(members)), key=lambda region: -affinity[region])[:best]))
    for i in range(len(q)):
        read = list(range(len(q)))
        if i >= special:
            mine = region_of(i - special, *grid, across)
            read = [*range(special), *(j for region in lists[mine] for j in members[region])]
        for head in range(HEADS):
            part = slice(head * WIDE, (head + 1) * WIDE)
            logits = torch.stack([q[i, part] @ k[j, part] for j in read]) * scale
            weights = logits.exp() / logits.exp().sum()
            out[i, part] = sum((w * v[j, part] for w, j in zip(weights, read, strict=True)), torch.zeros(WIDE))
    return out, lists


@torch.no_grad()
def oracle(
    model: Vision | Audio,
    x: Tensor,
    special: int,
    grid: tuple[int, int],
    across: int,
    best: int,
    layers: tuple[int, ...],
    scale: float = WIDE**-0.5,
) -> tuple[Tensor, Lists]:
    lists: Lists = []
    for number, block in enumerate(model.blocks):
        q, k, v = block.qkv(block.norm1(x)).split(WIDTH, dim=1)
        if number in layers:
            y, read = attended(q, k, v, special, grid, across, best, scale)
            lists.append(read)
        else:
            y, _ = attended(q, k, v, len(q), (0, 0), 1, 1, WIDE**-0.5)
        x = x + block.out(y)
        x = x + block.feed(block.norm2(x))
    return model.norm(x), lists


# the models ------------------------------------------------------------------------------------------------------


def images(batch: int = 3, side: int = 6, seed: int = 0) -> dict[str, Tensor]:
    return {"patches": patches(batch, side * side + 1, seed)}


def sounds(batch: int = 3, tokens: int = 24) -> dict[str, Tensor]:
    """Without a class token, and no convolution tells the grid."""
    return {"frames": frames(batch, tokens, seed=5)}


@cache
def with_class() -> Program:
    return trace(vision(), images())


def policy(**params: Any) -> dict[str, Any]:
    return {"version": 1, "steps": [{"preset": "biformer", **params}], "outputs": {"*": "full"}}


def check(program: Program, step: dict[str, Any], feeds: dict[str, Tensor], expected: list[Tensor]) -> None:
    """The graph, the walk of real tensors and the engine give what is expected, as first output."""
    reduced, plan = reduce_program(program, policy(**step))
    assert plan.layers
    mine, (eager, _) = run_program(reduced, feeds), run_eager(program, policy(**step), feeds)
    for found in (mine, eager, run_engine(reduced, feeds)):
        assert found[0].shape == torch.stack(expected).shape
        for row, want in zip(found[0], expected, strict=True):
            torch.testing.assert_close(row, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("regions", "k", "layers"), [(3, 4, (0, 1, 2, 3)), (2, 1, (1, 3)), (3, 1, (0,))])
def test_equals_brute_force(regions: int, k: int, layers: tuple[int, ...]) -> None:
    feeds, model = images(), vision()
    embedded = model.embed(feeds["patches"]).detach()
    found = [oracle(model, x, 1, (6, 6), regions, k, layers) for x in embedded]
    dense = model(**feeds)["tokens"].detach()
    assert (
        max(float((tokens - want).abs().max()) for tokens, want in zip(dense, [f[0] for f in found], strict=True))
        > 0.01
    )
    lists = [read for _, of_sample in found for layer in of_sample for read in layer]
    assert len({tuple(sorted(read)) for read in lists}) > 1
    step = {"regions": regions, "k": k, "at": {"layers": list(layers)}}
    check(with_class(), step, feeds, [want for want, _ in found])


def test_a_region_may_leave_itself_out() -> None:
    (_, (lists,)) = oracle(vision(), vision().embed(images(1)["patches"])[0].detach(), 1, (6, 6), 3, 2, (0,))
    assert any(number not in read for number, read in enumerate(lists))


@pytest.mark.parametrize("k", [1, 3])
def test_without_a_class_token_on_a_grid_that_is_not_square(k: int) -> None:
    """4 rows of 6."""
    feeds, model = sounds(), audio()
    expected = [oracle(model, x, 0, (4, 6), 2, k, (0, 1, 2, 3))[0] for x in model.embed(feeds["frames"]).detach()]
    check(trace(model, feeds), {"regions": 2, "k": k, "grid_rows": 4}, feeds, expected)


def test_other_tokens_fill_several_blocks() -> None:
    """Regions of one patch, and two tokens in front, which are as long as two regions."""
    feeds, model = sounds(2, 11), audio()
    expected = [oracle(model, x, 2, (3, 3), 3, 2, (1,))[0] for x in model.embed(feeds["frames"]).detach()]
    step = {"regions": 3, "k": 2, "protect": {"first": 2}, "at": {"layers": [1]}}
    check(trace(model, feeds), step, feeds, expected)


def test_all_regions_are_dense_attention() -> None:
    feeds = images()
    with torch.no_grad():
        want = vision()(**feeds)
    reduced, _ = reduce_program(with_class(), policy(regions=3, k=9))
    for found in (run_program(reduced, feeds), run_engine(reduced, feeds)):
        for mine, dense in zip(found, want.values(), strict=True):
            torch.testing.assert_close(mine, dense, rtol=0, atol=1e-5)


def test_scale_of_the_original_block() -> None:
    feeds, model = images(2), vision()
    embedded = model.embed(feeds["patches"]).detach()
    expected = [oracle(model, x, 1, (6, 6), 2, 2, (2,), WIDTH**-0.5)[0] for x in embedded]
    check(trace(model, feeds), {"regions": 2, "k": 2, "scale": "width", "at": {"layers": [2]}}, feeds, expected)


def test_batch_of_any_size() -> None:
    """And the rest of the pipeline: demand slicing, folding."""
    model = vision()
    program = trace(model, images(2), {"patches": {0: Dim("batch", min=1, max=16)}})
    step = policy(regions=3, k=2, at={"layers": [0, 3]})
    made = reduce_all(program, load_policy(step, presets=library()), Stages())
    for batch in (1, 3, 5):
        feeds = images(batch, seed=batch)
        expected = [oracle(model, x, 1, (6, 6), 3, 2, (0, 3))[0] for x in model.embed(feeds["patches"]).detach()]
        for found in (run_program(made.program, feeds), run_engine(made.sliced, feeds)):
            for row, want in zip(found[0], expected, strict=True):
                torch.testing.assert_close(row, want, rtol=0, atol=1e-4)


class _WrittenOut(nn.Module):
    """The same attention, without the fused operation; ``added`` is added to its logits."""

    def __init__(self, model: Vision, added: Tensor | None = None, *, maps: bool = False) -> None:
        super().__init__()
        self.model, self.added, self.maps = model, added, maps

    def forward(self, patches: Tensor) -> dict[str, Tensor]:
        x, seen = self.model.embed(patches), []
        for block in self.model.blocks:
            shape = [x.shape[0], x.shape[1], 3, HEADS, WIDE]
            q, k, v = block.qkv(block.norm1(x)).reshape(shape).permute(2, 0, 3, 1, 4)
            logits = (q @ k.transpose(2, 3)) / math.sqrt(WIDE)
            probs = (logits if self.added is None else logits + self.added).softmax(-1)
            seen.append(probs)
            x = x + block.out((probs @ v).transpose(1, 2).reshape(x.shape))
            x = x + block.feed(block.norm2(x))
        return {"tokens": self.model.norm(x), **({"map": seen[0]} if self.maps else {})}


def test_attention_that_is_written_out() -> None:
    feeds, model = images(2), vision()
    embedded = model.embed(feeds["patches"]).detach()
    expected = [oracle(model, x, 1, (6, 6), 3, 3, (0, 1, 2, 3))[0] for x in embedded]
    program = trace(_WrittenOut(model), feeds)
    check(program, {"regions": 3, "k": 3}, feeds, expected)
    reduced, _ = reduce_program(program, policy(regions=3, k=3))
    targets = {node.target for node in reduced.graph.nodes}
    assert torch.ops.aten.softmax.int not in targets  # the map of all to all is computed no more


@pytest.mark.parametrize("name", ["vit", "dinov2_registers", "siglip_vision"])
def test_real_architectures_with_all_regions_are_themselves(name: str) -> None:
    entry = ZOO[name]
    feeds = entry.inputs(3)
    program = trace(entry.build(), feeds)
    dense = run_program(program, feeds)
    reduced, plan = reduce_program(program, policy(regions=4, k=16))
    assert plan.sparse[0].grid == (8, 8)
    assert plan.layers == [0, 1, 2, 3]
    for mine, want in zip(run_engine(reduced, feeds), dense, strict=True):
        torch.testing.assert_close(mine, want, rtol=0, atol=1e-4)
    fewer = run_program(reduce_program(program, policy(regions=4, k=2))[0], feeds)
    assert float((fewer[0] - dense[0]).abs().max()) > 0.01


def test_the_plan_can_be_replayed() -> None:
    plan = plan_for(with_class(), policy(regions=3, k=2, at={"layers": ["2:"]}))
    again = plan_for(with_class(), plan.to_dict())
    assert [(p.layer, p.select) for p in again.sparse] == [(p.layer, p.select) for p in plan.sparse]
    assert plan.layers == again.layers == [2, 3]


def test_the_report_says_where(tmp_path: Path) -> None:
    step = policy(regions=3, k=2, at={"layers": [1]})
    bundle = tokcc.compile(vision(), step, example_inputs=images(1), output=tmp_path / "bundle")
    rows = [(row.step, row.site, row.tokens_in, row.tokens_out) for row in bundle.report.layers]
    assert rows == [("", "", 37, 37), ("biformer", "attention", 37, 37), ("", "", 37, 37), ("", "", 37, 37)]
    assert bundle.report.layers[1].flops_after < bundle.report.layers[1].flops_before
    assert bundle.report.parity.passed


# what is refused -------------------------------------------------------------------------------------------------


def refused(program: Program, step: dict[str, Any], kind: type[TokccError] = PlanError) -> TokccError:
    with pytest.raises(kind) as caught:
        reduce_all(program, load_policy(step, presets=library()), Stages())
    assert (caught.value.help or "").strip()
    assert "biformer" in (caught.value.policy or "")
    return caught.value


def test_sides_that_are_not_multiples() -> None:
    error = refused(with_class(), policy(regions=4, k=2))
    assert "6 x 6" in error.what
    assert "1, 2, 3, 6" in (error.help or "")
    assert "grid_rows" in (refused(trace(audio(), sounds()), policy(regions=2, k=2)).help or "")


def test_more_regions_than_there_are() -> None:
    assert "at most 9" in (refused(with_class(), policy(regions=3, k=10)).needed or "")


def test_texts() -> None:
    program = trace(text(), sentences([9, 6]))
    assert "looked up" in refused(program, policy(regions=3, k=2)).what


def test_a_number_of_tokens_that_depends_on_the_input() -> None:
    program = trace(audio(), sounds(), {"frames": {1: Dim("length", min=4, max=64)}})
    assert "depends on the input" in refused(program, policy(regions=3, k=2)).what


def test_decoders() -> None:
    assert "for the encoder" in refused(tiny.program_of("llama"), policy()).what


@pytest.mark.parametrize("name", ["prune", "sparse"])
def test_other_steps_beside_it(name: str) -> None:
    step = policy(regions=3, k=2)
    own = {"preset": "evit"} if name == "prune" else {"preset": "biformer", "regions": 2, "k": 2, "at": {"layers": [3]}}
    step["steps"].append(own)
    error = refused(with_class(), step)
    assert ("cannot go together" if name == "prune" else "layer 3") in error.what


def test_masks_and_biases() -> None:
    added = torch.randn(1, HEADS, 37, 37, generator=torch.Generator().manual_seed(3))
    program = trace(_WrittenOut(vision(), added), images(2))
    assert "mask or a bias" in refused(program, policy(regions=3, k=2)).what
    beit = trace(ZOO["beit"].build(), ZOO["beit"].inputs(2))
    assert "mask or a bias" in refused(beit, policy(regions=4, k=2)).what


def test_maps_that_are_given_away() -> None:
    program = trace(_WrittenOut(vision(), maps=True), images(2))
    assert "attention map" in refused(program, policy(regions=3, k=2), TokccError).what


def test_an_attention_that_got_scaled_queries() -> None:
    """Two factors would be one too many."""

    class Scaled(nn.Module):
        def forward(self, patches: Tensor) -> Tensor:
            x = vision().embed(patches)
            for block in vision().blocks:
                q, k, v = block.qkv(block.norm1(x)).reshape(*x.shape[:2], 3, HEADS, WIDE).permute(2, 0, 3, 1, 4)
                y = nn.functional.scaled_dot_product_attention(q * WIDE**-0.5, k, v, scale=1.0)
                x = x + block.out(y.transpose(1, 2).reshape(x.shape))
                x = x + block.feed(block.norm2(x))
            return x

    program = trace(Scaled(), images(2))
    assert "arrive scaled" in refused(program, policy(regions=3, k=2, scale="width")).what
    assert plan_for(program, policy(regions=3, k=2)).sparse[0].scale == 1.0


def test_keys_of_other_steps() -> None:
    for extra in ({"budget": {"keep": 0.5}}, {"score": {"kind": "norm"}}, {"reduce": {"kind": "drop"}}):
        refused(with_class(), policy(regions=3, k=2, **extra), PolicyError)
    step = policy(at={"layers": "all", "stage": "prefill"}, regions=3, k=2)
    assert "at.stage" in refused(with_class(), step).what
