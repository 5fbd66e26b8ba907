"""Adaptive Token Sampling against a brute-force reading of arXiv:2111.15667."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.export import Dim

from tests.passes.oracle import Cut, Feeds, Method, Result, Scene, compare, drop, policy, program_of, reference
from tests.passes.reference_models import patches, sentences, text, vision
from tokcc.config import load_policy
from tokcc.errors import AxisError
from tokcc.passes.methods import library
from tokcc.testing import reduce_program, run_eager, run_program


def sampled(weight: dict[int, float], references: int) -> list[int]:
    """The tokens that inverse transform sampling takes, whatever the order."""
    order = sorted(weight, key=lambda j: (weight[j], j))
    sums, total = [], 0.0
    for j in order:
        total += weight[j]
        sums.append(total)
    if len(order) == 1:
        return order
    low, high = sums[0], sums[-1]
    shares = [(value - low) / (high - low) for value in sums]
    start = min(share for share in shares if share > 0)
    taken = set()
    for k in range(references - 1):
        wanted = start + (1 - start) * k / (references - 2)
        taken.add(order[min(range(len(order)), key=lambda i: abs(shares[i] - wanted))])
    return sorted(taken)


def significance(scene: Scene) -> dict[int, float]:
    heads = range(len(scene.probs))
    norms = scene.values.transpose(0, 1).flatten(1).norm(dim=1)
    return {j: sum(float(scene.probs[h, 0, j]) for h in heads) * float(norms[j]) for j in range(1, scene.n)}


def ats(references: int, slots: dict[int, int]) -> Method:
    def method(scene: Scene) -> Cut | None:
        weight = significance(scene)
        taken = sampled(weight, references)
        best = sorted(taken, key=lambda j: -weight[j])[: min(slots[scene.layer], scene.n - 1)]
        return drop(scene, [0, *sorted(best)])

    return method


def check(feeds: Feeds, references: int, slots: dict[int, int], **kwargs: Any) -> list[Result]:
    layers = sorted(slots)
    budget = {"schedule": [slots[layer] for layer in layers]}
    step = {"preset": "ats", "references": references, "at": {"layers": layers}, "budget": budget}
    model = text() if "mask" in feeds else vision()

    def oracle(sample: Feeds) -> Result:
        return reference(model, sample, ats(references, slots), layers=layers)

    return compare(model, feeds, step, oracle, **kwargs)


def test_images_keep_different_numbers() -> None:
    results = check({"patches": patches(4, 41)}, 31, {1: 40, 2: 40, 3: 40}, full=True, engine=True)
    counts = [result.lengths for result in results]
    assert len({tuple(lengths) for lengths in counts}) > 1
    assert all(lengths == sorted(lengths, reverse=True) and lengths[0] < 41 for lengths in counts)


def test_slots_are_a_cap() -> None:
    results = check({"patches": patches(4, 41)}, 31, {1: 16, 2: 12, 3: 9})
    assert [result.lengths[0] for result in results] == [17] * 4


def test_few_references_and_many() -> None:
    check({"patches": patches(3, 26)}, 5, {1: 25, 3: 25})
    check({"patches": patches(3, 26)}, 120, {1: 25, 3: 25})


def test_one_candidate_is_kept() -> None:
    assert check({"patches": patches(2, 3)}, 9, {1: 1, 2: 1})[0].lengths == [2, 2]


def test_padded_rows_are_what_they_are_alone() -> None:
    check(sentences([24, 17, 9, 4]), 15, {0: 23, 2: 20}, full=True)


def test_dynamic_batch_and_resolution() -> None:
    shapes = {"patches": {0: Dim("batch", min=1, max=9), 1: Dim("sequence", min=4, max=100)}}
    for tokens in (38, 12):
        check(
            {"patches": patches(3, tokens)},
            21,
            {1: 20, 2: 8},
            engine=True,
            dynamic=shapes,
            traced={"patches": patches(2, 26)},
        )


@torch.no_grad()
def test_what_empty_slots_hold_does_not_matter() -> None:
    """The masked engine gives every image what it gets alone, and says which slots are real."""
    feeds = {"patches": patches(4, 41)}
    step = {"preset": "ats", "references": 31, "at": {"layers": [1]}, "budget": {"tokens": 40}}
    reduced, _ = reduce_program(program_of(vision(), feeds), policy(step))
    assert reduced.output_names[-2:] == ("tokens.token_index", "tokens.token_valid")
    tokens, _, index, valid = run_program(reduced, feeds)
    _, plan = run_eager(program_of(vision(), feeds), policy(step), feeds)
    assert torch.equal(valid, plan.made[0].valid)
    for row in range(4):
        alone = reference(vision(), {"patches": feeds["patches"][row : row + 1]}, ats(31, {1: 40}), layers=[1])
        assert index[row][valid[row]].tolist() == alone.cuts[0].kept
        torch.testing.assert_close(tokens[row][valid[row]], alone.tokens, rtol=0, atol=1e-4)


def test_uniform_scores_take_all_but_the_lowest() -> None:
    """Section 3.2: with as many references as tokens, equal scores select (nearly) everything."""
    assert sampled(dict.fromkeys(range(1, 50), 1 / 49), 50) == list(range(2, 50))
    one_hot = {j: 1.0 if j == 7 else 1e-9 * j for j in range(1, 50)}
    assert 7 in sampled(one_hot, 50)
    assert len(sampled(one_hot, 50)) < 6


def test_defaults() -> None:
    (step,) = load_policy("ats", presets=library()).policy.steps
    assert step.at.resolve(12) == tuple(range(3, 12))
    assert step.select is not None
    assert step.select.params == {"references": 197}


def test_tokens_at_the_end_cannot_be_protected() -> None:
    feeds = {"patches": patches(2, 20)}
    step = {"preset": "ats", "at": {"layers": [1]}, "protect": {"last": 1}}
    with pytest.raises(AxisError, match="cannot be protected by their place"):
        reduce_program(program_of(vision(), feeds), policy(step))
