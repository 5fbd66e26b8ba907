"""Cuts in front of a layer, the first one among them; positions counted anew where any number of tokens goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.prompt.engine import PADDING, PROMPT, build, policy
from tests.prompt.models import LAYERS, model_of, program_of, prompts
from tests.prompt.rules import best
from tokcc.analysis.cache_sites import cache_sites
from tokcc.config import load_policy
from tokcc.errors import AxisError, PlanError, PolicyError, TokccError
from tokcc.passes.cache.planning import make_cache_plan
from tokcc.passes.methods import library

START, STOP, KEPT, STEPS = 3, 15, 6, 4
SEGMENTS = {"document": {"start": START, "stop": STOP}}
FRONT = {"layers": [0], "site": "block_input"}


def planned(wanted: Mapping[str, Any]) -> Any:
    program = program_of("llama")
    return make_cache_plan(load_policy(wanted, presets=library()), program, cache_sites(program))


def attended_first(ids: Tensor) -> list[int]:
    """What stays of a prompt: those that its last token attends to most in the first layer of the whole model."""
    with torch.no_grad():
        row = model_of("llama")(input_ids=ids[None], output_attentions=True).attentions[0][0, :, -1].mean(0)
    among = best(row, range(START, STOP), KEPT)
    return [j for j in range(len(ids)) if j in among or not START <= j < STOP]


@pytest.mark.parametrize("positions", ["keep", pytest.param("compact", marks=pytest.mark.slow)])
def test_what_the_first_layer_would_attend_to(positions: str, tmp_path: Path) -> None:
    """The layer's own attention decides in front of it; then all layers read a shorter prompt."""
    step = {"preset": "pyramiddrop", "keep": [0.5], "at": FRONT, "positions": positions}
    engine = build("llama", policy([step], segments=SEGMENTS), tmp_path)
    ids, mask = prompts(PADDING, PROMPT, PROMPT + STEPS, 0)
    logits, last = engine.run(ids, mask, (PROMPT, *[1] * STEPS))
    gone = STOP - START - KEPT
    assert {last[f"present.{layer}.key"].shape[2] for layer in range(LAYERS)} == {PROMPT + STEPS - gone}
    for row, count in enumerate(PADDING):
        own, prompt = ids[row, count:], PROMPT - count
        stay = [*attended_first(own[:prompt]), *range(prompt, prompt + STEPS)]
        places = torch.tensor(stay) if positions == "keep" else torch.arange(len(stay))
        given = {"input_ids": own[stay], "position_ids": places, "attention_mask": torch.ones(len(stay))}
        with torch.no_grad():  # without a mask, transformers takes a leap in the positions for another text
            alone = model_of("llama")(**{name: x[None] for name, x in given.items()}, use_cache=False).logits[0]
        got = logits[row, count:][stay]
        np.testing.assert_allclose(got, alone.numpy(), rtol=0, atol=2e-4 * float(alone.abs().max()))


def test_in_front_of_a_layer_is_behind_the_one_before() -> None:
    def prune(layer: int, site: str) -> Any:
        step = {"preset": "fastv", "at": {"layers": [layer], "site": site}}
        plan = planned(policy([step], segments=SEGMENTS))
        assert plan.to_dict()["steps"][0]["at"]["layers"] == [layer]
        return plan.prompt.prunes[0], [plan.prompt.stage(i) for i in range(LAYERS)]

    (front, stages), (behind, same) = prune(2, "block_input"), prune(1, "block_output")
    assert (front.cut, front.behind, stages) == (behind.cut, behind.behind, same)
    assert stages == [0, 0, 1, 1, 1]
    first, stages = prune(0, "block_input")
    assert (first.behind, stages) == (-1, [1] * LAYERS)
    assert prune(LAYERS - 1, "block_input")[1] == [0] * (LAYERS - 1) + [1]


def refused(kind: type[TokccError], what: str, steps: Sequence[Mapping[str, Any]]) -> Any:
    return pytest.param(kind, what, policy(steps, segments=SEGMENTS), id=what)


GIVEN = {"preset": "specpc", "tokens": 9, "window": 4}


@pytest.mark.parametrize(
    ("kind", "what", "wanted"),
    [
        refused(PlanError, "layer 5 does not exist", [{**GIVEN, "at": {"layers": [5]}}]),
        refused(PlanError, "in front of them", [{**GIVEN, "at": {"site": "encoder_output"}}]),
        refused(PlanError, "by the cache of layer 0", [GIVEN, {"preset": "h2o", "tokens": 8}]),
        refused(PlanError, "none is gone", [{"preset": "cacheblend", "layer": 1, "positions": "compact"}]),
        refused(
            PlanError,
            "no layer is in front of the first",
            [{"preset": "cacheblend", "at": FRONT, "score": {"kind": "given"}}],
        ),
        refused(PolicyError, "counted anew by another", [GIVEN, {"preset": "lazyllm-prefill"}]),
    ],
)
def test_refused(kind: type[TokccError], what: str, wanted: Mapping[str, Any]) -> None:
    with pytest.raises(kind, match=what):
        planned(wanted)


def test_no_layer_is_in_front_of_the_first(tmp_path: Path) -> None:
    """A method that reads one is refused there."""
    with pytest.raises(AxisError, match="there is none"):
        build("llama", policy([{"preset": "fastv", "at": FRONT}], segments=SEGMENTS), tmp_path)


def test_evictions_beside_it(tmp_path: Path) -> None:
    """Positions are counted by the first layer's cache; the others may lose entries."""
    steps = [{**GIVEN, "tokens": 12}, {"preset": "tova", "tokens": 8, "at": {"layers": "1:"}}]
    engine = build("llama", policy(steps), tmp_path)
    alone = build("llama", policy([{**GIVEN, "tokens": 12}]), tmp_path)
    ids, mask = prompts(PADDING, PROMPT, PROMPT + STEPS, 0)
    given = {
        call: {"importance": np.linspace(0, 1, 3 * length, dtype=np.float32).reshape(3, length)}
        for call, length in enumerate((PROMPT, *[1] * STEPS))
    }
    (_, last), (_, whole) = (e.run(ids, mask, (PROMPT, *[1] * STEPS), given) for e in (engine, alone))
    assert [last[f"present.{layer}.key"].shape[2] for layer in range(LAYERS)] == [16 + STEPS, 8, 8, 8, 8]
    # What the first layer makes depends on tokens and positions alone.
    for part in ("key", "value"):
        np.testing.assert_allclose(last[f"present.0.{part}"], whole[f"present.0.{part}"], rtol=0, atol=1e-5)
