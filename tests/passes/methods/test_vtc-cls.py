"""VTC-CLS (arXiv:2412.05819) against a brute-force reading."""

from __future__ import annotations

import pytest
import torch

from tests.passes.oracle import Cut, Feeds, Result, Scene, compare, drop, policy, program_of, reference, top
from tests.passes.reference_models import patches, vision
from tokcc.testing import run_eager


def vtc_cls(scene: Scene, count: int, first: int) -> Cut:
    score = [0.0] * scene.n
    for layer in range(first, scene.layer + 1):
        row = scene.rows[layer]
        for j in range(scene.n):
            score[j] += sum(float(row[h, j]) for h in range(len(row))) / len(row)
    return drop(scene, [0, *sorted(top(score, range(1, scene.n), count))])


@pytest.mark.parametrize(("since", "first"), [(-3, 1), (2, 2), (0, 0), (-6, 0)])
def test_images(since: int, first: int) -> None:
    """A model with fewer layers than ``since`` reaches back gives all it has, each once."""

    def oracle(sample: Feeds) -> Result:
        return reference(vision(), sample, lambda scene: vtc_cls(scene, 16, first), layers=(3,), at_end=True)

    compare(vision(), {"patches": patches(3, 50)}, {"preset": "vtc-cls", "tokens": 16, "since": since}, oracle)


def test_the_last_layer_alone_is_fastervlm() -> None:
    feeds = {"patches": patches(3, 50)}
    program = program_of(vision(), feeds)
    steps = [{"preset": "vtc-cls", "tokens": 10, "since": -1}, {"preset": "fastervlm", "tokens": 10}]
    outputs = [run_eager(program, policy(step), feeds)[0] for step in steps]
    for mine, theirs in zip(*outputs, strict=True):
        assert torch.equal(mine, theirs)


def test_the_order_of_layers_does_not_matter() -> None:
    feeds = {"patches": patches(2, 50)}
    program = program_of(vision(), feeds)
    kept = []
    for layers in ([0, -1, -2], [-2, 0, -1]):
        score = {"kind": "attention_rows", "rows": "cls", "from_layers": layers}
        step = {"preset": "vtc-cls", "budget": {"tokens": 10}, "score": score}
        kept.append(run_eager(program, policy(step), feeds)[1].made[0].index)
    assert torch.equal(*kept)
