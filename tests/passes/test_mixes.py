"""Pieces that published methods use together, in other combinations: counts by input, merges, fused rests, sizes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.passes.oracle import Cut, Feeds, Result, Scene, cosine, drop, inputs_of, merge, program_of, reference
from tests.passes.reference_models import patches, sentences, text, vision
from tests.passes.test_pieces import BATCH, TOKENS, make_cut, random
from tokcc.config import PieceSpec
from tokcc.errors import AxisError, PolicyError
from tokcc.passes.cut import AttentionView
from tokcc.passes.piece import Score, resolve_piece
from tokcc.passes.scores.combined import Combined
from tokcc.testing import reduce_program, run_eager, run_program


def attention(scene: Scene) -> list[float]:
    heads = range(len(scene.probs))
    return [sum(float(scene.probs[h, 0, j]) for h in heads) / len(heads) for j in range(scene.n)]


def tome(scene: Scene, r: int) -> Cut:
    key = [sum(scene.keys[h, i] for h in range(len(scene.keys))) for i in range(scene.n)]
    evens, odds = range(2, scene.n, 2), range(1, scene.n, 2)
    to = {a: max(odds, key=lambda b: (cosine(key[a], key[b]), -b)) for a in evens}
    sources = sorted(evens, key=lambda a: (-cosine(key[a], key[to[a]]), a))[: min(r, (scene.n - 1) // 2)]
    kept = [0, *(a for a in evens if a not in sources), *odds]
    return merge(scene, kept, [(a, to[a]) for a in sources])


def passing(scene: Scene, threshold: float, *, fuse: bool) -> Cut:
    score = attention(scene)
    kept = [0, *(j for j in range(1, scene.n) if score[j] > threshold)]
    rest = [j for j in range(scene.n) if j not in kept]
    if not fuse or not rest:
        return drop(scene, kept)
    fused = sum((score[j] * scene.x[j] for j in rest), torch.zeros_like(scene.x[0]))
    return Cut([*kept, -1], torch.cat([scene.x[kept], fused[None]]))


def check(feeds: Feeds, steps: list[dict[str, Any]], method: Any, layers: list[int]) -> list[Result]:
    """Compare outputs of the graph and of the eager walk with each sample alone."""
    model = text() if "mask" in feeds else vision()
    program = program_of(model, feeds)
    wanted = {"version": 1, "steps": steps, "outputs": {"tokens": "reduced"}}
    outputs = run_program(reduce_program(program, wanted)[0], feeds)
    eager, _ = run_eager(program, wanted, feeds)
    for mine, theirs in zip(outputs, eager, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    results = [reference(model, sample, method, layers=layers) for sample in inputs_of(feeds)]
    for row, result in enumerate(results):
        torch.testing.assert_close(outputs[0][row, : len(result.tokens)], result.tokens, rtol=0, atol=1e-4)
        assert result.pooled is not None
        torch.testing.assert_close(outputs[1][row], result.pooled, rtol=0, atol=1e-4)
    return results


THRESHOLD: dict[str, Any] = {
    "node": "prune",
    "at": {"layers": [0]},
    "score": {"kind": "attention_rows"},
    "select": {"kind": "threshold", "above": [0.02]},
    "budget": {"keep": 1.0},
}


@pytest.mark.parametrize("feeds", [{"patches": patches(4, 40)}, sentences([30, 18, 7])], ids=["images", "text"])
def test_merging_what_a_threshold_left(feeds: Feeds) -> None:
    """Samples with different numbers of tokens merge as many pairs each as they would alone."""

    def method(scene: Scene) -> Cut:
        return passing(scene, 0.02, fuse=False) if scene.layer == 0 else tome(scene, 4)

    steps = [THRESHOLD, {"preset": "tome", "r": 4, "at": {"layers": [1, 2]}}]
    results = check(feeds, steps, method, [0, 1, 2])
    assert len({result.lengths[0] for result in results}) > 1


@pytest.mark.parametrize("feeds", [{"patches": patches(4, 40)}, sentences([30, 18, 7])], ids=["images", "text"])
def test_fusing_what_a_threshold_drops(feeds: Feeds) -> None:
    def method(scene: Scene) -> Cut:
        return passing(scene, 0.02, fuse=True)

    fused = {**THRESHOLD, "at": {"layers": [0, 2]}, "reduce": {"kind": "fuse_rest"}}
    check(feeds, [{**fused, "budget": {"schedule": [28, 27]}}], method, [0, 2])


def test_fusing_needs_a_slot() -> None:
    program = program_of(vision(), {"patches": patches(2, 40)})
    fused = {**THRESHOLD, "reduce": {"kind": "fuse_rest"}}
    with pytest.raises(AxisError, match="there is no slot for the fused one"):
        reduce_program(program, {"version": 1, "steps": [fused]})


@pytest.mark.parametrize("preset", ["tca", "token-transforming", "evit"])
def test_sizes_of_merged_tokens_go_on(preset: str) -> None:
    """What tokens stood for before is neither lost nor counted twice."""
    feeds = {"patches": patches(2, 50)}
    steps = [{"preset": "tome", "r": 9, "at": {"layers": [0]}}, {"preset": preset, "at": {"layers": [2]}}]
    if preset == "tca":
        steps[1]["rate"] = 0.9
    wanted = {"version": 1, "steps": steps, "outputs": {"tokens": "reduced"}}
    program = program_of(vision(), feeds)
    eager, plan = run_eager(program, wanted, feeds)
    total = plan.made[1].weight.float().sum(1)
    torch.testing.assert_close(total, torch.full((2,), 50.0), rtol=1e-4, atol=0)
    for mine, theirs in zip(run_program(reduce_program(program, wanted)[0], feeds), eager, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


# composed scores -----------------------------------------------------------------------------------------------------

NORMS = [{"kind": "norm", "of": "features"}, {"kind": "norm", "of": "keys", "sign": -1}]


def parts(x: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    return x.norm(dim=2), -keys.transpose(1, 2).flatten(2).norm(dim=2)


@pytest.mark.parametrize("lengths", [None, [15, 9]])
@pytest.mark.parametrize(
    "options",
    [
        {"by": "product"},
        {"by": "sum", "weights": (0.25, 3.0)},
        {"by": "sum", "normalise": "minmax"},
        {"by": "product", "normalise": "minmax"},
    ],
)
def test_composed_scores(options: dict[str, Any], lengths: list[int] | None) -> None:
    cut = make_cut(4, first=1, lengths=lengths)
    score = resolve_piece(PieceSpec(kind="combined", params={"of": NORMS, **options}), Score, "scores", "here")
    found = score.emit(cut)
    view = cut.attention()
    assert isinstance(view, AttentionView)
    for row in range(BATCH):
        stop = TOKENS if lengths is None else lengths[row]
        own = [part[row, 1:stop] for part in parts(cut.x, view.key)]
        if options.get("normalise") == "minmax":
            own = [(part - part.min()) / (part.max() - part.min()) for part in own]
        weights = options.get("weights", (1.0, 1.0))
        wanted = own[0] * own[1] if options["by"] == "product" else weights[0] * own[0] + weights[1] * own[1]
        torch.testing.assert_close(found[row, 1:stop], wanted, rtol=1e-4, atol=1e-5)


def test_shares_of_the_sum() -> None:
    cut = make_cut(4, first=2, x=random(BATCH, TOKENS, 8))
    score = Combined.model_validate({"of": [NORMS[0], NORMS[0]], "by": "sum", "normalise": "sum"})
    assert math.isclose(float(score.emit(cut)[0, 2:].sum()), 2.0, rel_tol=1e-5)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"of": NORMS[:1]}, "at least 2 items"),
        ({"of": NORMS, "weights": [1.0, 2.0]}, "`weights` goes with `by: sum`"),
        ({"of": NORMS, "by": "sum", "weights": [1.0]}, "one for each score"),
        ({"of": [NORMS[0], {"kind": "normm"}]}, "unknown score `normm`"),
    ],
)
def test_composed_scores_that_make_no_sense_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        resolve_piece(PieceSpec(kind="combined", params=params), Score, "scores", "policy.yaml:3")
