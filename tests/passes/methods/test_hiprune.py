"""HiPrune (arXiv:2508.00553) against sets in Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.passes.oracle import Cut, Feeds, Method, Result, Scene, compare, drop, policy, program_of, reference, top
from tests.passes.reference_models import audio, frames, patches, sentences, text, vision
from tokcc.errors import AxisError
from tokcc.passes.methods import library
from tokcc.testing import run_eager


def hiprune(
    count: int, protected: int, *, alpha: float = 0.1, layer: int = 1, width: int | None = None, wrap: bool = True
) -> Method:
    def method(scene: Scene) -> Cut | None:
        n = scene.n - protected
        w = width or round(n**0.5)
        low, deep = (scene.maps[i].mean(0).mean(0)[protected:].tolist() for i in (layer, scene.layer))
        kept: set[int] = set()
        for i in top(low, range(n), round(count * alpha / 5)):
            if wrap:
                kept |= {min(max(i + step, 0), n - 1) for step in (0, -1, 1, -w, w)}
            else:
                row, column = divmod(i, w)
                around = [(row, column), (row, column - 1), (row, column + 1), (row - 1, column), (row + 1, column)]
                kept |= {r * w + c for r, c in around if 0 <= c < w and 0 <= r < n // w}
        others = [i for i in range(n) if i not in kept]
        kept |= set(top(deep, others, count - len(kept)))
        assert len(kept) == count
        return drop(scene, [*range(protected), *sorted(i + protected for i in kept)])

    return method


def oracle(model: Any, method: Method) -> Callable[[Feeds], Result]:
    def run(sample: Feeds) -> Result:
        return reference(model, sample, method, layers=[len(model.blocks) - 1], at_end=True)

    return run


@pytest.mark.parametrize(("tokens", "alpha"), [(20, 0.5), (20, 1.0), (40, 0.1), (12, 0.1)])
def test_images(tokens: int, alpha: float) -> None:
    """Two, four, one and no anchor; layer 1 of 4 is that at a fraction of 0.35."""
    step = {"preset": "hiprune", "tokens": tokens, "alpha": alpha}
    results = compare(
        vision(), {"patches": patches(3, 65)}, step, oracle(vision(), hiprune(tokens, 1, alpha=alpha)), engine=True
    )
    assert results[0].lengths == [tokens + 1]


@pytest.mark.parametrize("wrap", [True, False])
def test_ends_of_rows(wrap: bool) -> None:
    """With anchors everywhere, some stand at the ends of rows and of the grid."""
    step = {"preset": "hiprune", "tokens": 60, "alpha": 1.0, "wrap": wrap, "layer": 0}
    method = hiprune(60, 1, alpha=1.0, layer=0, wrap=wrap)
    compare(vision(), {"patches": patches(4, 65)}, step, oracle(vision(), method))


def test_a_grid_that_is_no_square_without_a_class_token() -> None:
    step = {"preset": "hiprune", "tokens": 10, "alpha": 1.0, "layer": 2, "width": 10}
    method = hiprune(10, 0, alpha=1.0, layer=2, width=10)
    compare(audio(), {"frames": frames(2, 30)}, step, oracle(audio(), method), full=True)


def test_without_anchors_it_is_the_best_of_the_last_layer() -> None:
    feeds = {"patches": patches(3, 50)}
    program = program_of(vision(), feeds)
    plain = {"preset": "fastervlm", "tokens": 10, "score": {"kind": "attention_received"}}
    steps = [{"preset": "hiprune", "tokens": 10, "alpha": 0.0}, plain]
    outputs = [run_eager(program, policy(step), feeds)[0] for step in steps]
    for mine, theirs in zip(*outputs, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 7}, "no grid with rows of 7"),
        ({}, "no grid of equal sides"),
        ({"layer": 9}, "layer 9 does not exist"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    feeds = {"patches": patches(1, 51 if not change else 65)}
    step = {"preset": "hiprune", "tokens": 20, "alpha": 0.5, **change}
    with pytest.raises(AxisError, match=message):
        run_eager(program_of(vision(), feeds), policy(step), feeds)


def test_padded_batches_are_refused() -> None:
    feeds = sentences([20, 12])
    with pytest.raises(AxisError, match="no grid"):
        run_eager(program_of(text(), feeds), policy({"preset": "hiprune", "tokens": 8}), feeds)


def test_default_layer_of_clip() -> None:
    """The 9th layer, whether the layer behind LLaVA's features is in the graph or not."""
    preset = library()["hiprune"]
    assert preset.params["tokens"].default == 192
    assert [int(preset.params["layer"].default * depth) for depth in (23, 24)] == [8, 8]
