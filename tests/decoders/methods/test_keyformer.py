"""Keyformer against its formula, without noise: column sums of softened probabilities."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.decoders.engine import assert_equals_alone, build
from tests.decoders.methods.cuts import cut_of
from tests.decoders.methods.rules import best
from tests.decoders.methods.test_h2o import rule as h2o
from tests.decoders.oracle import Call, Rule


def rule(capacity: int, recent: int, start: float, end: float, over: int) -> Rule:
    def evict(call: Call) -> Tensor | None:
        # The number of generated tokens is remembered by the entries: text begins it anew once the others are gone.
        heads, memory = call.key.shape[0], call.memory.values
        steps = memory.get("steps", torch.zeros(heads, 0))
        step = float(steps.max()) + 1 if call.new == 1 else 0.0
        tau = start + min(step / over, 1.0) * (end - start)
        score = torch.zeros(heads, call.total)
        old = memory.get("score", torch.zeros(heads, 0))
        score[:, : old.shape[1]] = old
        group = call.probs.shape[0] // heads
        for h, head in enumerate(call.probs.double()):
            for row in head:
                # softmax(x / tau) from softmax(x)
                raised = torch.tensor([float(p) ** (1.0 / tau) if p > 0 else 0.0 for p in row])
                score[h // group] += raised / raised.sum() / group
        steps = torch.cat([steps, torch.full((heads, call.new), step)], 1)
        keep = best(score, capacity, recent=recent)
        rows = torch.arange(heads)[:, None]
        memory["score"] = score if keep is None else score[rows, keep]
        memory["steps"] = steps if keep is None else steps[rows, keep]
        return keep

    return evict


def policy(**given: object) -> dict[str, object]:
    return {"version": 1, "name": "keyformer", "steps": [{"preset": "keyformer", **given}]}


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_equals_the_formula(family: str, tmp_path: Path) -> None:
    """A temperature that rises during the generation and reaches its end in it."""
    assert_equals_alone(family, policy(tokens=12, over=16), rule(12, 4, 1.0, 2.0, 16), tmp_path)


def test_a_constant_temperature(tmp_path: Path) -> None:
    given = policy(tokens=9, recent=0.0, start=3.0, end=3.0)
    assert_equals_alone("llama", given, rule(9, 0, 3.0, 3.0, 1), tmp_path)


def test_a_model_that_caps_its_logits(tmp_path: Path) -> None:
    given = policy(tokens=10, over=16, at={"layers": [1]})
    of_layer = rule(10, 3, 1.0, 2.0, 16)
    # Sliding windows leave less in the other layers; the logits say whether the cap stands in the right place.
    with_others = lambda call: of_layer(call) if call.layer == 1 else window(call)  # noqa: E731
    assert_equals_alone("gemma2", given, with_others, tmp_path)


def window(call: Call) -> Tensor | None:
    kept = range(max(0, call.total - 7), call.total)
    return torch.tensor([list(kept)] * call.key.shape[0])


def test_without_temperature_it_is_h2o(tmp_path: Path) -> None:
    assert_equals_alone("llama", policy(tokens=12, recent=0.5, end=1.0), h2o(12, 6), tmp_path)


def test_a_capacity_that_does_not_bind(tmp_path: Path) -> None:
    assert_equals_alone("llama", policy(tokens=200), None, tmp_path)


def test_both_ways_to_a_temperature_agree() -> None:
    """The fused attention, and the one written out for models that cap their logits."""
    key = torch.randn(2, 2, 11, 8, generator=torch.Generator().manual_seed(0))
    temperature = torch.full((2, 1, 1, 1), 1.7)
    plain = cut_of(key, new=6, padding=(0, 7))
    capped = cut_of(key, new=6, padding=(0, 7), softcap=1e6)
    torch.testing.assert_close(plain.received_at(temperature), capped.received_at(temperature), atol=1e-5, rtol=1e-4)


def test_every_query_gives_one_in_all(tmp_path: Path) -> None:
    """A prompt behind the size at which attention goes by blocks, and single tokens."""
    engine = build("llama", policy(tokens=400), tmp_path)
    ids = torch.randint(3, 97, (2, 302), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 302, dtype=torch.int64)
    mask[1, :7] = 0
    _, last = engine.run(ids, mask, (300, 1, 1))
    for layer in range(3):
        given = torch.from_numpy(last[f"present.{layer}.key_score"]).sum((2, 3))
        torch.testing.assert_close(given, torch.tensor([[302.0] * 2, [295.0] * 2]), atol=1e-2, rtol=0)
