"""PoWER-BERT against a brute-force reading of arXiv:2001.08950."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import pytest
import torch

from tests.passes.oracle import (
    Cut,
    Feeds,
    Method,
    Model,
    Result,
    Scene,
    compare,
    drop,
    policy,
    program_of,
    received,
    reference,
    top,
)
from tests.passes.reference_models import patches, sentences, text, vision
from tokcc.testing import run_eager


def power_bert(lengths: Mapping[int, Any]) -> Method:
    """``lengths``: words to keep (without CLS) by layer, as a number or a function of the initial number of words."""

    def method(scene: Scene) -> Cut | None:
        wanted = lengths.get(scene.layer)
        if wanted is None:
            return None
        count = wanted(scene.initial - 1) if callable(wanted) else wanted
        score = received(scene, diagonal=False)
        return drop(scene, [0, *sorted(top(score, range(1, scene.n), min(count, scene.n - 1)))])

    return method


def ramp(keep: str, depth: int = 4) -> dict[int, Any]:
    """The first 15 % of the layers (one of four) keep everything, then the share falls linearly."""
    shares = {1 + i: 1 + (Fraction(keep) - 1) * Fraction(i + 1, depth - 1) for i in range(depth - 1)}
    return {layer: (lambda n, s=share: math.ceil(n * s)) for layer, share in shares.items()}


def check(
    model: Model, feeds: Feeds, step: Mapping[str, Any], lengths: Mapping[int, Any], **kwargs: Any
) -> list[Result]:
    def oracle(sample: Feeds) -> Result:
        return reference(model, sample, power_bert(lengths), layers=range(4))

    return compare(model, feeds, {"preset": "power-bert", **step}, oracle, **kwargs)


def test_padded_rows_are_what_they_are_alone() -> None:
    results = check(text(), sentences([21, 14, 5, 1]), {}, ramp("0.25"), full=True)
    assert results[0].lengths == [16, 11, 6]
    assert results[3].lengths == [1, 1, 1]
    for result in results:
        assert all(cut.kept[0] == 0 for cut in result.cuts)


def test_a_learned_schedule() -> None:
    """A list of lengths counts the words beside CLS."""
    schedule = [14, 14, 6, 2]
    results = check(text(), sentences([16, 9]), {"budget": {"schedule": schedule}}, dict(enumerate(schedule)))
    assert results[0].lengths == [15, 15, 7, 3]
    assert results[1].lengths == [9, 9, 7, 3]


def test_images() -> None:
    check(vision(), {"patches": patches(2, 26)}, {"keep": 0.5}, ramp("0.5"))


@pytest.mark.parametrize("padded", [False, True])
def test_padding_votes_only_when_asked(padded: bool) -> None:
    """As published, rows of padding vote: no difference without padding, one with it."""
    feeds = sentences([40] + [14 if padded else 40] * 7)
    kept = []
    for mask_query_rows in (True, False):
        step = {"preset": "power-bert", "mask_query_rows": mask_query_rows, "budget": {"tokens": 6}}
        _, plan = run_eager(program_of(text(), feeds), policy(step), feeds)
        kept.append([space.index for space in plan.made])
    assert all(torch.equal(one, other) for one, other in zip(*kept, strict=True)) != padded
