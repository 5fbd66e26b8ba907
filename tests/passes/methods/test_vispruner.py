"""VisPruner (arXiv:2412.01818) against lists in Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.passes.oracle import (
    Cut,
    Feeds,
    Method,
    Result,
    Scene,
    compare,
    cosine,
    drop,
    policy,
    program_of,
    reference,
    top,
)
from tests.passes.reference_models import audio, frames, patches, sentences, text, vision
from tokcc.errors import AxisError
from tokcc.testing import run_eager


def thinned(scene: Scene, members: list[int], wanted: int, per_round: int, resort: bool) -> list[int]:
    y = vision().norm(scene.x)
    while len(members) > wanted:
        if resort:
            members = sorted(members)
        even, odd = members[0::2], members[1::2]
        gone = min(per_round, len(members) - wanted, len(even))
        closest = {i: max(cosine(y[i], y[j]) for j in odd) for i in even}
        members = [*sorted(even, key=lambda i: -closest[i])[gone:], *odd]
    return members


def vispruner(count: int, important: float = 0.5, per_round: int = 8, *, resort: bool = False) -> Method:
    def method(scene: Scene) -> Cut | None:
        row = scene.rows[-1].mean(0).tolist()
        order = top(row, range(1, scene.n), scene.n)
        best = int(count * important)
        rest = thinned(scene, order[best:], count - best, per_round, resort) if count > best else []
        return drop(scene, [0, *sorted([*order[:best], *rest])])

    return method


def oracle(method: Method) -> Callable[[Feeds], Result]:
    def run(sample: Feeds) -> Result:
        return reference(vision(), sample, method, layers=(3,), at_end=True)

    return run


@pytest.mark.parametrize(("tokens", "per_round"), [(20, 8), (11, 3), (2, 8)])
def test_images(tokens: int, per_round: int) -> None:
    """64 patches: the last round of each deletes fewer than the others, and lists of odd length occur."""
    step = {"preset": "vispruner", "tokens": tokens, "per_round": per_round}
    results = compare(
        vision(), {"patches": patches(3, 65)}, step, oracle(vispruner(tokens, 0.5, per_round)), engine=True
    )
    assert results[0].lengths == [tokens + 1]


def test_full_output_and_other_shares() -> None:
    step = {"preset": "vispruner", "tokens": 13, "important": 0.3}
    compare(vision(), {"patches": patches(2, 50)}, step, oracle(vispruner(13, 0.3)), full=True)
    step = {"preset": "vispruner", "tokens": 12, "important": 0.0}
    compare(vision(), {"patches": patches(2, 50)}, step, oracle(vispruner(12, 0.0)))


def test_list_in_sequence_order() -> None:
    """Another set than with the published order of the list."""
    step: dict[str, Any] = {"preset": "vispruner", "tokens": 20, "select": {"kind": "thinning", "resort": True}}
    mine = compare(vision(), {"patches": patches(3, 65)}, step, oracle(vispruner(20, resort=True)))
    published = oracle(vispruner(20))({"patches": patches(3, 65)[:1]})
    assert mine[0].cuts[0].kept != published.cuts[0].kept


def test_all_important_is_fastervlm() -> None:
    feeds = {"patches": patches(3, 50)}
    program = program_of(vision(), feeds)
    steps = [{"preset": "vispruner", "tokens": 10, "important": 1.0}, {"preset": "fastervlm", "tokens": 10}]
    outputs = [run_eager(program, policy(step), feeds)[0] for step in steps]
    for mine, theirs in zip(*outputs, strict=True):
        assert torch.equal(mine, theirs)


def test_padded_and_dynamic_lengths_are_refused() -> None:
    feeds = sentences([20, 12])
    with pytest.raises(AxisError, match="number of rounds") as caught:
        run_eager(program_of(text(), feeds), policy({"preset": "vispruner", "tokens": 5}), feeds)
    assert "fixed number" in (caught.value.help or "")


def test_a_score_that_needs_no_class_token() -> None:
    def method(scene: Scene) -> Cut | None:
        score = scene.probs.mean(0).mean(0).tolist()
        order = top(score, range(scene.n), scene.n)
        y = audio().norm(scene.x)
        members = order[3:]
        while len(members) > 4:
            even, odd = members[0::2], members[1::2]
            closest = {i: max(cosine(y[i], y[j]) for j in odd) for i in even}
            gone = min(8, len(members) - 4, len(even))
            members = [*sorted(even, key=lambda i: -closest[i])[gone:], *odd]
        return drop(scene, sorted([*order[:3], *members]))

    step = {"preset": "vispruner", "tokens": 7, "score": {"kind": "attention_received"}}
    compare(
        audio(),
        {"frames": frames(2, 31)},
        step,
        lambda sample: reference(audio(), sample, method, layers=(3,), at_end=True),
    )
