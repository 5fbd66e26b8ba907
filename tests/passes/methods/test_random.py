"""The random baseline: a fixed random set, the same for every sample."""

from __future__ import annotations

from typing import Any

import torch
from torch.export import Dim

from tests.passes.oracle import Feeds, Result, Scene, compare, drop, policy, program_of, reference
from tests.passes.reference_models import patches, sentences, text, vision
from tokcc.testing import run_eager


def kept_sets(model: Any, feeds: Feeds, step: dict[str, Any], dynamic: Any = None, traced: Feeds | None = None) -> Any:
    program = program_of(model, traced or feeds, dynamic)
    return run_eager(program, policy(step), feeds)[1].made


def test_outputs_are_those_of_the_kept_tokens() -> None:
    feeds = {"patches": patches(3, 50)}
    made = kept_sets(vision(), feeds, {"preset": "random"})
    assert [space.size for space in made] == [36, 26, 19]
    sets = [space.index[0].tolist() for space in made]
    for space, kept in zip(made, sets, strict=True):
        assert kept[0] == 0
        assert kept == sorted(set(kept))
        assert (space.index == space.index[:1]).all()

    def oracle(sample: Feeds) -> Result:
        def method(scene: Scene) -> Any:
            return drop(scene, sets[scene.layer - 1])

        return reference(vision(), sample, method, layers=(1, 2, 3))

    compare(vision(), feeds, "random", oracle)


def test_the_set_depends_on_seed_and_layer_only() -> None:
    feeds = {"patches": patches(2, 50)}
    first = kept_sets(vision(), feeds, {"preset": "random", "budget": {"tokens": 20}})
    again = kept_sets(vision(), {"patches": patches(2, 50, seed=9)}, {"preset": "random", "budget": {"tokens": 20}})
    other = kept_sets(vision(), feeds, {"preset": "random", "budget": {"tokens": 20}, "seed": 1})
    assert all(torch.equal(a.index, b.index) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0].index, other[0].index)
    alone = {"preset": "random", "budget": {"tokens": 20}, "at": {"layers": [2]}}
    assert not torch.equal(kept_sets(vision(), feeds, alone)[0].index, first[0].index)


def test_no_place_is_favoured() -> None:
    feeds = {"patches": patches(1, 50)}
    hits = torch.zeros(50)
    for seed in range(60):
        step = {"preset": "random", "at": {"layers": [0]}, "budget": {"keep": 0.5}, "seed": seed}
        hits[kept_sets(vision(), feeds, step)[0].index[0]] += 1
    assert hits[0] == 60
    # 30 expected, standard deviation 3.9.
    assert hits[1:].min() > 12
    assert hits[1:].max() < 48


def test_static_dynamic_and_padded_choose_alike() -> None:
    shapes = {name: {0: Dim("batch", min=1, max=9), 1: Dim("sequence", min=4, max=40)} for name in ("ids", "mask")}
    feeds = sentences([20, 13])
    step = {"preset": "random", "keep": 0.6}
    static = kept_sets(text(), feeds, step)
    dynamic = kept_sets(text(), feeds, step, shapes, sentences([12, 7]))
    alone = kept_sets(text(), {name: t[1:, :13] for name, t in feeds.items()}, step)
    for one, two, three in zip(static, dynamic, alone, strict=True):
        assert torch.equal(one.index, two.index)
        length = int(one.valid[1].sum())
        assert length == int(three.valid.sum()) == three.size
        assert torch.equal(one.index[1, :length], three.index[0])
