"""STILL's selector against its formula: what moves most when it may not attend to itself stays."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.decoders.engine import assert_equals_alone
from tests.decoders.methods.cuts import cut_of
from tests.decoders.methods.rules import best
from tests.decoders.oracle import Call, Rule
from tokcc.passes.cache.cut import CacheCut
from tokcc.passes.cache.scores.self_saliency import SelfSaliency

EPS = 1e-6


def divergence(probs: Tensor) -> float:
    """The sum as published, for what a token gives a window whose last entry is its own."""
    total, rest = float(probs.sum()), float(probs[:-1].sum())
    found = 0.0
    for place, value in enumerate(probs.tolist()):
        with_it = value / total
        without = 0.0 if place == len(probs) - 1 else value / rest
        found += with_it * math.log((with_it + EPS) / (without + EPS))
    return found


def saliency(probs: Tensor, window: int) -> Tensor:
    """For probabilities ``[H, S, L]`` of the last S slots, the divergence of each, ``[H, S]``."""
    heads, new, total = probs.shape
    own = [total - new + i for i in range(new)]
    rows = [[divergence(probs[h, i, max(s - window + 1, 0) : s + 1].double()) for i, s in enumerate(own)]
            for h in range(heads)]  # fmt: skip
    return torch.tensor(rows, dtype=torch.float64)


def rule(capacity: int, window: int, recent: int, sinks: int = 0) -> Rule:
    def evict(call: Call) -> Tensor | None:
        fresh = saliency(call.probs, window).unflatten(0, (call.key.shape[0], -1)).mean(1)  # [Hkv, S]
        before = call.memory.values.get("score", fresh[:, :0])
        scores = torch.cat([before, fresh], 1)
        keep = best(scores, capacity, sinks=sinks, recent=recent)
        rows = torch.arange(len(scores))[:, None]
        call.memory.values["score"] = scores if keep is None else scores[rows, keep]
        return keep

    return evict


def policy(**given: object) -> dict[str, object]:
    return {"version": 1, "name": "still", "steps": [{"preset": "still", **given}]}


@pytest.mark.parametrize("family", ["llama", "llama-mqa", "qwen3", "gpt2"])
def test_equals_the_formula(family: str, tmp_path: Path) -> None:
    engine = assert_equals_alone(family, policy(tokens=8, window=4, recent=3), rule(8, 4, 3), tmp_path)
    assert engine.program.output_names[-1] == "present.2.key_saliency"


@pytest.mark.parametrize(
    ("window", "recent", "sinks"), [(1, 2, 1), pytest.param(6, 0, 0, marks=pytest.mark.slow), (200, 4, 0)]
)
def test_windows(window: int, recent: int, sinks: int, tmp_path: Path) -> None:
    """Of one token all are equal; one longer than the cache sees all that is there."""
    given = {"tokens": 9, "window": window, "recent": recent, "sinks": sinks}
    assert_equals_alone("llama", policy(**given), rule(9, window, recent, sinks), tmp_path)


def test_a_capacity_that_does_not_bind(tmp_path: Path) -> None:
    assert_equals_alone("llama", policy(tokens=200, window=4, recent=3), None, tmp_path)


def rated(window: int, total: int, new: int, padding: tuple[int, ...] = (), softcap: float = 0.0) -> CacheCut:
    """Rate random keys of two heads and two batches; the score is in ``left``."""
    key = 2.0 * torch.randn(2, 2, total, 8, generator=torch.Generator().manual_seed(total))
    before = torch.randn(2, 2, total - new, generator=torch.Generator().manual_seed(1))
    cut = cut_of(key, new=new, padding=padding, softcap=softcap, states={"key_saliency": before})
    score = SelfSaliency(window=window).emit(cut)
    torch.testing.assert_close(score[..., : total - new], before, rtol=0, atol=0)
    return cut


@pytest.mark.parametrize(("total", "new"), [(1, 1), (2, 1), (9, 1), (9, 9), (9, 4), (40, 40), (37, 15), (64, 63)])
@pytest.mark.parametrize("window", [1, 4, 16, 64])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_the_closed_form_is_the_sum(total: int, new: int, window: int, softcap: float) -> None:
    cut = rated(window, total, new, softcap=softcap)
    probs = cut.probs(new).flatten(1, 2)  # [B, H, S, L]
    for row in range(2):
        wanted = saliency(probs[row], window).unflatten(0, (2, -1)).mean(1)
        torch.testing.assert_close(
            cut.left["key_saliency"][row, :, total - new :].double(), wanted, rtol=1e-4, atol=2e-5
        )


def test_padding_is_in_no_window() -> None:
    padding = (3, 7)
    cut = rated(4, 20, 20, padding)
    probs = cut.probs(20).flatten(1, 2)
    for row, count in enumerate(padding):
        wanted = saliency(probs[row, :, count:, count:], 4).unflatten(0, (2, -1)).mean(1)
        torch.testing.assert_close(cut.left["key_saliency"][row, :, count:].double(), wanted, rtol=1e-4, atol=2e-5)


def test_ranks_as_what_a_token_gives_itself() -> None:
    """One query head for each key head: no mean in between."""
    generator = torch.Generator().manual_seed(3)
    key, query = (torch.randn(1, 3, 50, 8, generator=generator) for _ in range(2))
    cut = cut_of(key, states={"key_saliency": torch.zeros(1, 3, 0)})
    cut.query = query
    score = SelfSaliency(window=8).emit(cut)[0]
    logits = torch.einsum("hsd,hld->hsl", query[0], key[0]) * cut.scale
    for head in range(3):
        own = [float(torch.softmax(logits[head, t, max(t - 7, 0) : t + 1], 0)[-1]) for t in range(50)]
        assert min(own) > 10 * EPS
        by_score = sorted(range(50), key=lambda t: float(score[head, t]))
        assert by_score == sorted(range(50), key=lambda t: own[t])
