"""The uniform baseline: evenly spaced tokens."""

from __future__ import annotations

from typing import Any

import pytest
from torch.export import Dim

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
    reference,
    share_of,
)
from tests.passes.reference_models import audio, frames, patches, sentences, text, vision
from tokcc.testing import run_eager


def uniform(keep: float, protected: int) -> Method:
    def method(scene: Scene) -> Cut | None:
        n = scene.n - protected
        count = share_of(n, keep)
        return drop(scene, [*range(protected), *(protected + i * n // count for i in range(count))])

    return method


def check(model: Model, feeds: Feeds, keep: float, protected: int, **kwargs: Any) -> list[Result]:
    def oracle(sample: Feeds) -> Result:
        return reference(
            model, sample, uniform(keep, protected), layers=sorted({len(model.blocks) * i // 4 for i in (1, 2, 3)})
        )

    return compare(model, feeds, {"preset": "uniform", "keep": keep}, oracle, **kwargs)


@pytest.mark.parametrize("keep", [0.7, 0.3])
def test_images(keep: float) -> None:
    check(vision(), {"patches": patches(3, 50)}, keep, 1, full=keep == 0.3)


def test_padded_rows_are_what_they_are_alone() -> None:
    check(text(), sentences([20, 13, 6, 2, 1]), 0.6, 1, full=True)


def test_positions() -> None:
    """13 of 31: floor(31 i / 13)."""
    feeds = {"frames": frames(1, 31)}
    step = {"preset": "uniform", "at": {"layers": [0]}, "budget": {"tokens": 13}}
    _, plan = run_eager(program_of(audio(), feeds), policy(step), feeds)
    assert plan.made[0].index.tolist() == [0, 2, 4, 7, 9, 11, 14, 16, 19, 21, 23, 26, 28]


def test_every_other_token() -> None:
    feeds = {"frames": frames(1, 31)}
    step = {"preset": "uniform", "at": {"layers": [0]}, "budget": {"stride": 2}}
    _, plan = run_eager(program_of(audio(), feeds), policy(step), feeds)
    assert plan.made[0].size == 15
    assert plan.made[0].index.ndim == 1


def test_dynamic_batch_and_sequence() -> None:
    shapes = {name: {0: Dim("batch", min=1, max=9), 1: Dim("sequence", min=4, max=40)} for name in ("ids", "mask")}
    for lengths in ([17, 8, 16], [5, 4]):
        check(text(2), sentences(lengths), 0.7, 1, dynamic=shapes, traced=sentences([12, 7]))
