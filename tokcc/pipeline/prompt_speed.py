"""What a shorter prompt saves: the first call of both engines, timed in turns on a prompt of which tokens go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tokcc.backends.generation import DecoderEngine
from tokcc.capture.loaded import Loaded
from tokcc.errors import UsageError
from tokcc.passes.prompt.plan import PromptPlan
from tokcc.passes.prompt.refill_plan import OLD_PLACES
from tokcc.pipeline.decoding import cache_facts, prompt_flops
from tokcc.pipeline.measuring import Measurement, latency_of
from tokcc.pipeline.needles import usual_tokens
from tokcc.pipeline.reading import Array, model_positions
from tokcc.pipeline.reducing import Reduced
from tokcc.pipeline.stages import Stages
from tokcc.report.measure import measure
from tokcc.report.schema import Report, Totals

__all__ = ["measure_prompt"]

_TEXT = 64
"""Tokens of the prompt beside those of the segments."""
_LEAST = 512


def measure_prompt(
    report: Report,
    reduced: Reduced,
    loaded: Loaded,
    engine: Path,
    baseline: Path,
    how: Measurement,
    stages: Stages,
) -> Measurement:
    """Time the first call.

    Args:
        report: The facts.
        reduced: The programs.
        loaded: The model.
        engine: The engine.
        baseline: The engine that keeps everything.
        how: Seed, threads, budget.
        stages: Progress.
    """
    assert reduced.caches is not None
    prompt = reduced.caches.prompt
    assert prompt is not None
    report = cache_facts(report, reduced, loaded)
    positions = model_positions(loaded, reduced.original)
    length = max(_LEAST, prompt.shortest + _TEXT)
    length = length if positions is None else min(length, positions - 1)
    why = f"the model has {positions} positions, and prompts need {prompt.shortest} tokens"
    try:
        one, two = (DecoderEngine(path, threads=how.threads) for path in (baseline, engine))
    except UsageError as error:
        why = error.what
        length = 0
    if length < prompt.shortest:
        return replace(how, report=report.noted(f"nothing was measured: {why}"))
    whole, feeds = _prompts(prompt, two, length, how.seed)
    given = {name: value for name, value in feeds.items() if name in two.added}
    with stages.stage("measure the prompt"):
        timed = measure(
            {
                "baseline": lambda: _read(one, whole, {}),
                "engine": lambda: _read(two, feeds, given),
            },
            budget_s=how.budget_s,
            seed=how.seed,
        )
    latency = latency_of(timed, feeds, how.threads)
    flops = prompt_flops(reduced, length)
    totals = Totals.of(*flops, latency=latency, shapes={name: tuple(x.shape) for name, x in feeds.items()})
    own = f", {prompt.needed} of them of the segments" if prompt.needed else ""
    if prompt.refill is not None:
        own = f", old entries are given for {feeds[OLD_PLACES].shape[1]} of them"
    if prompt.unmerge is not None:
        own = f", which share {feeds['input_ids'].shape[1]} rows"
    report = report.noted(f"latency and total FLOPs: the first call, a prompt of {length} tokens{own}")
    return replace(how, report=report.model_copy(update={"latency": latency, "totals": totals}))


def _prompts(
    prompt: PromptPlan, engine: DecoderEngine, length: int, seed: int
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return random tokens for baseline and engine, with as many of the segments as are needed.

    They are the same but where tokens share rows: then the engine has fewer.
    """
    ids = usual_tokens(engine.vocabulary or 2, length, np.random.default_rng(seed))[None]
    feeds: dict[str, Any] = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.ones(1, length).long()}
    blind = any(segment.mask_input in engine.added for segment in prompt.segments)
    seen = {name: value for name, value in feeds.items() if name != "input_ids"} if blind else feeds
    tokens = feeds["input_ids"]
    feeds |= prompt.dressed(seen)
    feeds["position_ids"] = torch.arange(length)[None]
    arrays = {name: value.numpy() for name, value in feeds.items()}
    old = {} if prompt.refill is None else prompt.refill.random(length, seed)
    made = {**engine.nothing(1, length), **arrays, **{name: value.numpy() for name, value in old.items()}}
    return (made if prompt.unmerge is None else {**made, "input_ids": tokens.numpy()}), made


def _read(engine: DecoderEngine, feeds: Mapping[str, Array], given: Mapping[str, Array]) -> object:
    ids, mask, positions = (feeds[name] for name in ("input_ids", "attention_mask", "position_ids"))
    return engine.read(ids, mask, positions, engine.empty_past(1), given)
