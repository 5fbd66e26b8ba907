"""The cascade top-k baseline (SpAtten, arXiv:2012.09852) against a brute-force reading."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from tests.passes.oracle import (
    Cut,
    Feeds,
    Method,
    Model,
    Result,
    Scene,
    compare,
    drop,
    received,
    reference,
    share_of,
    top,
)
from tests.passes.reference_models import audio, frames, sentences, text


def spatten(keep: str, protected: int) -> Method:
    def method(scene: Scene) -> Cut | None:
        p = max(3, math.ceil(0.15 * scene.depth))
        if scene.layer < p:
            return None
        share = max(Fraction(1, 100), 1 + (Fraction(keep) - 1) * Fraction(scene.layer - p + 1, scene.depth - p))
        count = share_of(scene.initial - protected, str(float(share)), "round")
        count = min(max(count, 1), scene.n - protected)
        return drop(scene, [*range(protected), *sorted(top(received(scene), range(protected, scene.n), count))])

    return method


def check(model: Model, feeds: Feeds, keep: float, protected: int, **kwargs: Any) -> list[Result]:
    def oracle(sample: Feeds) -> Result:
        return reference(model, sample, spatten(str(keep), protected), layers=range(len(model.blocks)))

    return compare(model, feeds, {"preset": "spatten-topk", "keep": keep}, oracle, **kwargs)


def test_padded_rows_are_what_they_are_alone() -> None:
    results = check(text(5), sentences([21, 13, 6, 2]), 0.5, 1)
    assert results[0].lengths == [16, 11]


def test_without_a_class_token() -> None:
    results = check(audio(5), {"frames": frames(2, 31)}, 0.3, 0)
    assert results[0].lengths == [20, 9]


def test_one_token_is_left_at_least() -> None:
    results = check(text(5), sentences([5, 4]), 0.01, 1)
    assert results[0].lengths[-1] == 2
