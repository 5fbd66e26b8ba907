"""VFlowOpt in the vision encoder (arXiv:2508.05211): global rows and cells, token by token."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim

from tests.passes.oracle import Cut, Feeds, Result, Scene, at_output, compare, policy, program_of, run_engine, top
from tests.passes.reference_models import audio, frames, patches, sentences, text, vision
from tokcc.errors import AxisError
from tokcc.testing import reduce_program, run_eager, run_program, trace


def relevance(scene: Scene, above: float, protected: int) -> list[float]:
    mean = scene.probs.mean(0)
    own = range(protected, scene.n)
    received = {j: sum(float(mean[i, j]) for i in own) / len(own) for j in own}
    level = above * sum(received.values()) / len(received)
    rows = [i for i in own if received[i] > level] or list(own)
    return [sum(float(mean[i, j]) for i in rows) / len(rows) for j in range(scene.n)]


def recycled(scene: Scene, rating: list[float], keep: float, side: float, rows: int, protected: int) -> Cut:
    """The published loops: lowest tokens, their cells, a mean at the best member of each."""
    n = scene.n - protected
    width = n // rows
    low = math.ceil(n * (1 - keep) - 0.5) + int(n / side**2)
    order = sorted(range(protected, scene.n), key=lambda i: (rating[i], -i))
    lowest, kept = order[:low], order[low:]
    cells: dict[tuple[int, int], list[int]] = {}
    for i in lowest:
        r, c = divmod(i - protected, width)
        cells.setdefault((math.floor(r / side), math.floor(c / side)), []).append(i)
    new = {}
    for members in cells.values():
        total = sum(rating[i] for i in members)
        mean = sum((rating[i] / total * scene.x[i] for i in members), torch.zeros_like(scene.x[0]))
        new[top(rating, members, 1)[0]] = mean
    places = [*range(protected), *sorted([*kept, *new])]
    return Cut(places, torch.stack([new.get(i, scene.x[i]) for i in places]))


def vflowopt(
    model: Any, keep: float, above: float, side: float, rows: int, protected: int, found: list[Tensor] | None = None
) -> Callable[[Feeds], Result]:
    def run(sample: Feeds) -> Result:
        cuts: list[Cut] = []

        def method(scene: Scene) -> Cut:
            rating = relevance(scene, above, protected)
            if "patch_entropy" in sample:
                share = sample["patch_entropy"][0].softmax(0).tolist()
                rating = [
                    value - 0.1 * (share[i - protected] if i >= protected else 0) for i, value in enumerate(rating)
                ]
            cuts.append(recycled(scene, rating, keep, side, rows, protected))
            if found is not None:
                found.append(torch.tensor([rating[i] for i in cuts[-1].kept]))
            return cuts[-1]

        result = at_output(model, method)(sample)
        whole = list(range(len(result.full)))  # the step that tells the rating keeps all tokens
        return Result(result.tokens, result.pooled, [Cut(whole, result.full), *result.cuts], result.full)

    return run


@pytest.mark.parametrize(
    ("keep", "above", "side", "rows"),
    [(0.723, 1.0, 2.4, 6), (0.5, 28.7, 3.0, 4), (0.4, 1.1, 6.0, 9), (0.3, 0.0, 4.5, 6)],
)
def test_images(keep: float, above: float, side: float, rows: int) -> None:
    """Broken cells, no global token at all, one cell, all tokens global."""
    step = {"preset": "vflowopt", "keep": keep, "above": above, "cell": side, "grid_rows": rows}
    feeds = {"frames": frames(3, 36)}
    ratings: list[Tensor] = []
    compare(audio(), feeds, step, vflowopt(audio(), keep, above, side, rows, 0, ratings), engine=True)
    reduced, _ = reduce_program(program_of(audio(), feeds), policy(step))
    outputs = dict(zip(reduced.output_names, run_engine(reduced, feeds), strict=True))
    for row, rating in enumerate(ratings):
        told = outputs["tokens.importance"][row]
        torch.testing.assert_close(told[: len(rating)], rating, rtol=0, atol=1e-5)
        assert not told[len(rating) :].any()
        assert outputs["tokens.token_valid"][row].tolist() == [i < len(rating) for i in range(len(told))]


def test_samples_differ_in_their_cells() -> None:
    """Cells that lose nothing have no token: the slots are empty, and how many depends on the image."""
    step = {"preset": "vflowopt", "keep": 0.9, "above": 1.0, "cell": 2.0}
    results = compare(audio(), {"frames": frames(6, 49)}, step, vflowopt(audio(), 0.9, 1.0, 2.0, 7, 0))
    assert len({len(result.tokens) for result in results}) > 1


def test_with_a_class_token() -> None:
    """It is kept, rates nothing and receives nothing."""
    step = {"preset": "vflowopt", "keep": 0.6, "above": 1.0, "cell": 2.5}
    compare(vision(), {"patches": patches(3, 50)}, step, vflowopt(vision(), 0.6, 1.0, 2.5, 7, 1), engine=True)


def test_any_number_of_images() -> None:
    step = {"preset": "vflowopt", "keep": 0.5, "above": 1.0, "cell": 2.5}
    for batch in (1, 4):
        compare(
            audio(),
            {"frames": frames(batch, 25)},
            step,
            vflowopt(audio(), 0.5, 1.0, 2.5, 5, 0),
            dynamic={"frames": {0: Dim("batch", min=1, max=9)}},
            traced={"frames": frames(2, 25)},
        )


def test_with_the_entropy_of_patches() -> None:
    score = {"kind": "combined", "by": "sum", "weights": [1.0, -0.1]}
    score["of"] = [{"kind": "relevant_rows"}, {"kind": "given", "name": "patch_entropy", "softmax": True}]
    step = {"preset": "vflowopt", "keep": 0.5, "cell": 2.0, "score": score}
    given = {"frames": frames(3, 36)}
    entropy = {"patch_entropy": 8 * torch.rand(3, 36, generator=torch.Generator().manual_seed(4))}
    run = vflowopt(audio(), 0.5, 1.0, 2.0, 6, 0)
    compare(audio(), {**given, **entropy}, step, run, traced=given, engine=True)


def test_equal_entropies_change_nothing() -> None:
    """As of an image of one colour: the same tokens are left as without them."""
    score = {"kind": "combined", "by": "sum", "weights": [1.0, -0.1]}
    score["of"] = [
        {"kind": "relevant_rows", "above": 28.7},
        {"kind": "given", "name": "patch_entropy", "softmax": True},
    ]
    step = {"preset": "vflowopt", "keep": 0.5, "cell": 2.0}
    given = {"frames": frames(2, 36)}
    program = program_of(audio(), given)
    _, plain = run_eager(program, policy(step), given)
    flat = {**given, "patch_entropy": torch.full((2, 36), 3.0)}
    _, rated = run_eager(program, policy({**step, "score": score}), flat)
    assert torch.equal(plain.made[-1].index, rated.made[-1].index)


def test_half_precision() -> None:
    step = policy({"preset": "vflowopt", "keep": 0.5, "cell": 2.0})
    half = {"frames": frames(2, 36).half()}
    reduced, _ = reduce_program(trace(copy.deepcopy(audio()).half(), half), step)
    outputs = dict(zip(reduced.output_names, run_program(reduced, half), strict=True))
    assert outputs["tokens"].dtype == torch.float16
    assert outputs["tokens"].isfinite().all()


def test_no_room() -> None:
    step = policy({"preset": "vflowopt", "keep": 0.2, "cell": 2.0})
    with pytest.raises(AxisError, match="leave no room for others"):
        reduce_program(program_of(audio(), {"frames": frames(1, 36)}), step)


def test_no_grid() -> None:
    with pytest.raises(AxisError, match="24 tokens are no grid of equal sides"):
        reduce_program(program_of(audio(), {"frames": frames(1, 24)}), policy({"preset": "vflowopt", "cell": 2.0}))


def test_padding() -> None:
    with pytest.raises(AxisError, match="no grid of fixed size"):
        reduce_program(program_of(text(), sentences([37, 12])), policy("vflowopt"))


def test_a_given_score_behind_a_cut() -> None:
    steps = [
        {"node": "prune", "score": {"kind": "norm"}, "select": {"kind": "topk"}, "at": {"layers": [0]}},
        {"node": "prune", "score": {"kind": "given"}, "select": {"kind": "topk"}, "at": {"layers": [2]}},
    ]
    wanted = {"version": 1, "steps": [{**step, "budget": {"keep": 0.5}} for step in steps]}
    feeds = {"frames": frames(1, 24)}
    with pytest.raises(AxisError, match="the given score is of all tokens"):
        run_eager(program_of(audio(), feeds), wanted, {**feeds, "importance": torch.zeros(1, 24)})
