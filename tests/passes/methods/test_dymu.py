"""DyMU's merging in the encoder against a brute-force reading of arXiv:2504.17040, section 3.1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.export import Dim

from tests.passes.oracle import Cut, Feeds, Method, Model, Result, Scene, compare, cosine, merge, policy, program_of
from tests.passes.oracle import reference as run_reference
from tests.passes.reference_models import audio, frames, patches, sentences, text, vision
from tokcc.errors import AxisError
from tokcc.testing import reduce_program, run_program


def dymu(thresholds: Sequence[float], protected: int, r: int) -> Method:
    def method(scene: Scene) -> Cut | None:
        key = [sum(scene.keys[h, i] for h in range(len(scene.keys))) for i in range(scene.n)]
        evens = [i for i in range(0, scene.n, 2) if i >= protected]
        odds = [i for i in range(1, scene.n, 2) if i >= protected]
        to = {a: max(odds, key=lambda b: (cosine(key[a], key[b]), -b)) for a in evens if odds}
        alike = {a: cosine(key[a], key[b]) for a, b in to.items()}
        passing = [a for a in alike if alike[a] > thresholds[scene.layer % len(thresholds)]]
        count = min(max(len(passing), r), (scene.n - protected) // 2)
        sources = sorted(alike, key=lambda a: (-alike[a], a))[:count]
        unmerged = [a for a in evens if a not in sources]
        return merge(scene, [*range(protected), *unmerged, *odds], [(a, to[a]) for a in sources])

    return method


def check(model: Model, feeds: Feeds, thresholds: Sequence[float], r: int, protected: int, **kw: Any) -> list[Result]:
    step = {"preset": "dymu", "thresholds": list(thresholds), "r": r}

    def oracle(sample: Feeds) -> Result:
        return run_reference(model, sample, dymu(thresholds, protected, r), layers=range(len(model.blocks)))

    return compare(model, feeds, step, oracle, **kw)


def test_images_merge_different_numbers() -> None:
    results = check(vision(), {"patches": patches(4, 50)}, [0.55, 0.6, 0.6, 0.65], 2, 1, full=True, engine=True)
    assert len({tuple(result.lengths) for result in results}) > 1
    for result in results:
        assert result.cuts[-1].sizes is not None
        assert float(result.cuts[-1].sizes.sum()) == 50


def test_one_threshold_for_all_layers_and_no_class_token() -> None:
    check(audio(), {"frames": frames(3, 31)}, [0.5], 1, 0)


def test_low_thresholds_merge_half_and_high_ones_the_least() -> None:
    assert check(vision(), {"patches": patches(2, 50)}, [-1.0], 0, 1)[0].lengths == [26, 14, 8, 5]
    assert check(vision(), {"patches": patches(2, 50)}, [1.0], 6, 1)[0].lengths == [44, 38, 32, 26]


def test_without_thresholds_it_is_tome() -> None:
    feeds = {"patches": patches(2, 50)}
    found = []
    for step in ({"preset": "dymu", "r": 9}, {"preset": "tome", "r": 9}):
        reduced, _ = reduce_program(program_of(vision(), feeds), policy(step))
        found.append(run_program(reduced, feeds))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_padded_rows_are_what_they_are_alone() -> None:
    check(text(), sentences([20, 13, 6, 2]), [0.6, 0.7, 0.7, 0.7], 1, 1)


def test_dynamic_batch_and_resolution() -> None:
    shapes = {"frames": {0: Dim("batch", min=1, max=9), 1: Dim("sequence", min=4, max=60)}}
    for tokens in (23, 8):
        feeds = {"frames": frames(3, tokens)}
        check(audio(2), feeds, [0.5, 0.6], 1, 0, engine=True, dynamic=shapes, traced={"frames": frames(2, 16)})


def test_thresholds_for_other_layers_are_refused() -> None:
    feeds = {"patches": patches(2, 20)}
    with pytest.raises(AxisError, match="`above` has 3 entries for the step's 4 layers"):
        reduce_program(program_of(vision(), feeds), policy({"preset": "dymu", "thresholds": [0.5, 0.5, 0.5]}))


@torch.no_grad()
def test_the_map_that_a_language_model_expands_with() -> None:
    """Every token's slot holds a real token, and equal slots are exactly the groups that merged."""
    feeds = {"patches": patches(3, 50)}
    step = {"preset": "dymu", "thresholds": [0.6], "r": 2}
    reduced, _ = reduce_program(program_of(vision(), feeds), policy(step))
    assert reduced.output_names[-2:] == ("tokens.token_assign", "tokens.token_valid")
    _, _, assign, valid = run_program(reduced, feeds)
    for row in range(3):
        alone = {"patches": feeds["patches"][row : row + 1]}
        result = run_reference(vision(), alone, dymu([0.6], 1, 2), layers=range(4))
        groups = [[i] for i in range(50)]
        for cut in result.cuts:
            joined = dict(cut.pairs)
            members: list[list[int]] = [[] for _ in cut.kept]
            for old, group in enumerate(groups):
                members[cut.kept.index(joined.get(old, old))] += group
            groups = members
        assert valid[row].tolist() == [k < len(groups) for k in range(valid.shape[1])]
        for k, group in enumerate(groups):
            assert {int(assign[row, i]) for i in group} == {k}
