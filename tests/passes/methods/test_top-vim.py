"""ToP-ViM against a brute-force reading of arXiv:2409.18962, on a Vision Mamba that is run token by token."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import Dim

from tests.passes.oracle import run_engine
from tests.passes.reference_models import patches, vision
from tests.zoo.vim import Vim, VimBlock
from tokcc.config import load_policy
from tokcc.errors import AxisError, PlanError
from tokcc.ir.program import Program
from tokcc.passes.methods import library
from tokcc.pipeline.measuring import kept_tokens
from tokcc.testing import plan_for, reduce_program, run_eager, run_program, trace

# torch's own pytree copies a deprecated class in run_decompositions.
pytestmark = pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning")

CLS = -1
"""Among places of patches."""


def images(count: int, seed: int = 0, side: int = 16) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))}


@cache
def vim(depth: int = 4, seed: int = 0) -> Vim:
    return Vim(side=16, depth=depth, form="loop", tokens_out=True, seed=seed)


@cache
def program(depth: int = 4) -> Program:
    return trace(vim(depth), images(3))


def policy(step: dict[str, Any], tokens: str = "reduced") -> dict[str, Any]:
    return {"version": 1, "steps": [{"preset": "top-vim", **step}], "outputs": {"last_hidden_state": tokens}}


# the paper, one sample and one token at a time -----------------------------------------------------------------


def passed_before(order: list[int], total: int, middle: int) -> list[int]:
    """How many removed patches lie directly in front of each kept token.

    All patches stand in a line with holes where they were removed. The class token stands between the kept patches
    beside it, as near to its own place in the line as they let it.
    """
    line: list[int | None] = [i if i in order else None for i in range(total)]
    where = order.index(CLS)
    low = order[where - 1] + 1 if where else 0
    high = order[where + 1] if where + 1 < len(order) else total
    line.insert(min(max(middle, low), high), CLS)
    found, holes = {}, 0
    for slot in line:
        if slot is None:
            holes += 1
        else:
            found[slot], holes = holes, 0
    return [found[token] for token in order]


def scan(direction: Any, x: Tensor, holes: list[int]) -> Tensor:
    """``[N, E]`` -> ``[N, E]``: the selective scan; the state also decays over the holes in front of a token."""
    kernel, bias = direction.conv1d.weight[:, 0], direction.conv1d.bias
    width = kernel.shape[1]
    a = -torch.exp(direction.A_log)
    rows, state = [], torch.zeros_like(a)
    for n in range(len(x)):
        mixed = bias.clone()
        for tap in range(width):
            if n - width + 1 + tap >= 0:
                mixed = mixed + kernel[:, tap] * x[n - width + 1 + tap]
        u = F.silu(mixed)
        dt, b, c = (direction.x_proj.weight @ u).split(direction.split)
        dt = torch.log1p(torch.exp(direction.dt_proj.weight @ dt + direction.dt_proj.bias))
        state = torch.exp((1 + holes[n]) * dt[:, None] * a) * state + (dt * u)[:, None] * b[None]
        rows.append(state @ c + direction.D * u)
    return torch.stack(rows)


def mix(block: VimBlock, x: Tensor, holes: list[int]) -> tuple[Tensor, Tensor]:
    """Return what the mixer adds to the stream, and its gated output before the projection."""
    mixer = block.mixer
    inner, gate = (mixer.in_proj.weight @ block.norm(x).T).T.chunk(2, dim=1)
    y = scan(mixer.forward_direction, inner, holes) * F.silu(gate)
    # From behind, the holes in front of a token are those behind it.
    back = [0, *holes[::-1][:-1]] if len(holes) > 1 else [0]
    y = y + (scan(mixer.backward_direction, inner.flip(0), back) * F.silu(gate.flip(0))).flip(0)
    return y @ mixer.out_proj.weight.T, y


@torch.no_grad()
def oracle(model: Vim, image: Tensor, layers: list[int], keep: float, align: str) -> tuple[Tensor, Tensor, list[Any]]:
    x = model.embed(image[None])[0]
    total, middle = len(x) - 1, model.middle
    order = [*range(middle), CLS, *range(middle, total)]
    holes, cuts = [0] * len(x), []
    for number, block in enumerate(model.layers):
        assert isinstance(block, VimBlock)
        added, y = mix(block, x, holes)
        x = x + added
        if number in layers:
            score = [sum(max(0.0, float(e)) for e in row) for row in y]
            candidates = [i for i, token in enumerate(order) if token != CLS]
            count = math.ceil(round(keep * len(candidates), 9))
            count += 1 - count % 2  # with the class token in it, an odd number
            best = sorted(sorted(candidates, key=lambda i: -score[i])[: count - 1])
            half = len(best) // 2
            chosen = [*best[:half], order.index(CLS), *best[half:]]
            x, order = x[chosen], [order[i] for i in chosen]
            holes = passed_before(order, total, middle) if align == "gap" else [0] * len(order)
            cuts.append(list(order))
    x = model.norm_f(x)
    return model.head(x[order.index(CLS)]), x, cuts


def root_places(order: list[int], middle: int) -> list[int]:
    return [middle if token == CLS else token + (token >= middle) for token in order]


@pytest.mark.parametrize("align", ["none", "gap"])
@pytest.mark.parametrize(("keep", "layers"), [(0.8, [0, 1, 2]), (0.5, [1])])
def test_equals_brute_force(align: str, keep: float, layers: list[int]) -> None:
    feeds, step = images(3), {"keep": keep, "align": align, "at": {"layers": layers}}
    reduced, _ = reduce_program(program(), policy(step))
    outputs = run_program(reduced, feeds)
    engine = run_engine(reduced, feeds)
    eager, plan = run_eager(program(), policy(step), feeds)
    moved = False
    for row, image in enumerate(feeds["pixel_values"]):
        logits, tokens, cuts = oracle(vim(), image, layers, keep, align)
        for found in (outputs, engine, eager):
            torch.testing.assert_close(found[0][row], logits, rtol=0, atol=2e-4)
            torch.testing.assert_close(found[1][row], tokens, rtol=0, atol=2e-4)
            assert found[2][row].tolist() == root_places(cuts[-1], vim().middle)
        for space, cut in zip(plan.made, cuts, strict=True):
            assert space.size == len(cut)
            assert cut.index(CLS) == len(cut) // 2
        place = cuts[-1].index(CLS)
        moved |= not (cuts[-1][place - 1] < vim().middle <= cuts[-1][place + 1])
    assert moved or keep > 0.5, "no class token had to leave its place: the test shows too little"


def test_layers_of_vim_small() -> None:
    """Behind layers 5, 10 and 15 of 24."""
    (step,) = load_policy("top-vim", presets=library()).policy.steps
    assert step.at.resolve(24) == (4, 9, 14)
    assert step.at.site == "block_output"
    assert step.budget.rounding == "ceil"


@pytest.mark.slow
def test_counts_of_vim_small() -> None:
    """Of 197 tokens 157, 125 and 101 are left."""
    model = Vim(side=56, depth=3, width=2, state=1)
    assert model.middle == 98
    feeds = {"pixel_values": torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))}
    wanted = {"version": 1, "steps": [{"preset": "top-vim", "at": {"layers": [0, 1, 2]}}]}
    _, plan = run_eager(trace(model, feeds), wanted, feeds)
    assert [space.size for space in plan.made] == [157, 125, 101]


def test_everything_kept_is_the_model() -> None:
    feeds = images(3)
    reduced, _ = reduce_program(program(), policy({"keep": 1.0}))
    with torch.no_grad():
        dense = vim()(**feeds)
    torch.testing.assert_close(run_program(reduced, feeds)[0], dense["logits"], rtol=0, atol=1e-6)


@torch.no_grad()
def test_gaps_are_zeroed_tokens_where_steps_are_constant() -> None:
    """With a constant step, decaying over gaps is what all tokens give with nothing put in at removed places."""
    found = False
    for seed in range(12):
        model = Vim(side=16, depth=2, form="loop", tokens_out=True, seed=seed)
        mixer = model.layers[1].mixer  # type: ignore[union-attr]  # a module
        for direction in (mixer.forward_direction, mixer.backward_direction):  # type: ignore[union-attr]  # modules
            direction.dt_proj.weight.zero_()
            direction.conv1d.weight.zero_()
            direction.conv1d.weight[:, :, -1] = 1.0
            direction.conv1d.bias.zero_()
        (image,) = images(1, seed)["pixel_values"]
        _, _, ((*order,),) = oracle(model, image, [0], 0.5, "gap")
        half = order.index(CLS)
        if not order[half - 1] < model.middle <= order[half + 1]:
            continue
        found = True
        kept = root_places(order, model.middle)
        x = model.embed(image[None])[0]
        x = x + mix(model.layers[0], x, [0] * len(x))[0]  # type: ignore[arg-type]  # a block
        gone = torch.tensor([i for i in range(len(x)) if i not in kept])
        holes = torch.zeros_like(x)
        holes[kept] = x[kept]
        assert len(gone)  # a zero token is a zero behind the norm, the projection and the convolution
        wanted = model.norm_f((holes + mix(model.layers[1], holes, [0] * len(x))[0])[kept])  # type: ignore[arg-type]
        feeds = {"pixel_values": image[None]}
        reduced, _ = reduce_program(trace(model, feeds), policy({"keep": 0.5, "at": {"layers": [0]}}))
        torch.testing.assert_close(run_program(reduced, feeds)[1][0], wanted, rtol=0, atol=1e-5)
        break
    assert found, "no image kept as many patches on both sides"


def test_dropped_tokens_come_back() -> None:
    """A `full` output: dropped patches keep the value they had when they were dropped."""
    feeds, step = images(3), {"keep": 0.5, "align": "none", "at": {"layers": [1]}}
    reduced, _ = reduce_program(program(), policy(step, "full"))
    found = run_program(reduced, feeds)[1]
    torch.testing.assert_close(run_engine(reduced, feeds)[1], found, rtol=0, atol=1e-5)
    for row, image in enumerate(feeds["pixel_values"]):
        _, tokens, (order,) = oracle(vim(), image, [1], 0.5, "none")
        with torch.no_grad():
            x = vim().embed(image[None])[0]
            for block in vim().layers[:2]:
                assert isinstance(block, VimBlock)
                x = x + mix(block, x, [0] * len(x))[0]
            x = vim().norm_f(x)
        x[root_places(order, vim().middle)] = tokens
        torch.testing.assert_close(found[row], x, rtol=0, atol=2e-4)


def test_pictures_show_the_patches() -> None:
    """The class token in the middle is no patch: what is painted is the grid without it."""
    feeds = images(3)
    plan = plan_for(program(), policy({"keep": 0.5, "at": {"layers": [1]}}))
    (stage,) = kept_tokens(program(), plan, feeds, (16, 16))
    assert stage.grid == (4, 4)
    _, _, (order,) = oracle(vim(), feeds["pixel_values"][0], [1], 0.5, "none")
    alive, _ = stage.patches(0)
    assert alive.tolist() == [i in order for i in range(16)]
    assert stage.count() == 8


@pytest.mark.parametrize("order", ["sequence", "score"])
def test_a_class_token_in_the_middle_is_not_marked(order: str) -> None:
    """A mark is about the candidates: the class token stays without having been chosen."""
    changes = {"at": {"layers": [1]}, "select": {"kind": "topk", "order": order}, "budget": {"tokens": 5}}
    changes["reduce"] = {"kind": "mark", "name": "chosen"}
    reduced, _ = reduce_program(program(), policy(changes))
    given = images(3, seed=4)
    outputs = dict(zip(reduced.output_names, run_program(reduced, given), strict=True))
    marks = next(value for name, value in outputs.items() if name.endswith("chosen"))
    assert marks.sum(1).tolist() == [5] * 3
    assert marks[:, vim().middle].tolist() == [0] * 3


def test_a_rating_of_the_candidates_leaves_the_class_token_out() -> None:
    """What is given for a candidate behind the class token is about the token one place further on."""
    changes = {"at": {"layers": [1]}, "score": {"kind": "given"}, "budget": {"tokens": 5}, "select": {"kind": "topk"}}
    changes["reduce"] = {"kind": "mark", "name": "chosen"}
    reduced, _ = reduce_program(program(), policy(changes))
    importance = torch.zeros(3, 16)
    importance[:, [2, 12, 13, 14, 15]] = 1.0
    outputs = run_program(reduced, {**images(3, seed=4), "importance": importance})
    marks = next(v for name, v in zip(reduced.output_names, outputs, strict=True) if name.endswith("chosen"))
    assert vim().middle == 8
    assert [row.nonzero()[:, 0].tolist() for row in marks] == [[2, 13, 14, 15, 16]] * 3


def test_dynamic_batch() -> None:
    small = Vim(side=8, depth=2, form="loop", tokens_out=True)
    traced = trace(small, images(2, side=8), {"pixel_values": {0: Dim("batch", min=1, max=9)}})
    reduced, _ = reduce_program(traced, policy({"keep": 0.7, "at": {"layers": [0]}}))
    for count in (1, 5):
        feeds = images(count, seed=count, side=8)
        engine = run_engine(reduced, feeds)
        for row, image in enumerate(feeds["pixel_values"]):
            logits, tokens, _ = oracle(small, image, [0], 0.7, "gap")
            torch.testing.assert_close(engine[0][row], logits, rtol=0, atol=2e-4)
            torch.testing.assert_close(engine[1][row], tokens, rtol=0, atol=2e-4)


def test_methods_that_read_attention_are_refused() -> None:
    with pytest.raises(PlanError, match="no attention") as caught:
        plan_for(program(), "evit")
    assert caught.value.help is not None
    assert "`top-vim`" in caught.value.help
    assert "`evit`" not in caught.value.help


def test_a_transformer_has_no_mixer() -> None:
    with pytest.raises(PlanError, match="reads a state-space mixer") as caught:
        plan_for(trace(vision(), {"patches": patches(2, 26)}), "top-vim")
    assert caught.value.help


def test_merged_tokens_have_no_place_in_a_sequence() -> None:
    step = {
        "node": "merge",
        "at": {"layers": [0], "site": "block_output"},
        "select": {"kind": "bipartite", "of": "features"},
        "budget": {"remove": 4},
    }
    with pytest.raises(PlanError, match="stands in the middle") as caught:
        reduce_program(program(), {"version": 1, "steps": [step]})
    assert caught.value.help


def test_a_state_runs_over_an_ordered_sequence_only() -> None:
    """By falling score, the class token has no place of its own, and nothing may run over the others."""
    step = {"keep": 0.5, "align": "none", "at": {"layers": [1]}, "select": {"kind": "topk", "order": "score"}}
    with pytest.raises(AxisError, match="in another one") as caught:
        reduce_program(program(), policy(step))
    assert caught.value.help is not None
    assert "order: sequence" in caught.value.help
    with pytest.raises(AxisError, match="not in the order") as caught:
        reduce_program(program(), policy({**step, "align": "gap"}))
    assert caught.value.help


def test_a_cut_behind_attention_is_refused_with_another_one() -> None:
    with pytest.raises(PlanError, match="cuts after it") as caught:
        plan_for(program(), "uniform")
    assert caught.value.help is not None
    assert "site: block_output" in caught.value.help


def test_a_fused_token_has_no_place_in_a_sequence() -> None:
    step = {"keep": 0.5, "at": {"layers": [1]}, "reduce": {"kind": "fuse_rest"}}
    with pytest.raises(AxisError, match="in another one") as caught:
        reduce_program(program(), policy(step))
    assert caught.value.help


@pytest.mark.parametrize("preset", ["random", "uniform"])
def test_other_methods_keep_the_class_token_in_the_middle(preset: str) -> None:
    step = {"preset": preset, "keep": 0.5, "at": {"layers": [1], "site": "block_output"}}
    reduced, plan = reduce_program(program(), {"version": 1, "steps": [step]})
    assert plan.made[0].fixed == {vim().middle: 4}
    feeds = images(3)
    for mine, theirs in zip(run_engine(reduced, feeds), run_program(reduced, feeds), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
