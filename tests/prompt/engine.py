"""Compile a small decoder with a policy that shortens prompts, and compare a padded batch with every row alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from tests.decoders.engine import Engine
from tests.prompt.models import IMAGE, LAYERS, model_of, program_of, prompts, texts
from tests.prompt.oracle import Cut, Trace, read_alone, run
from tokcc.analysis.cache_sites import cache_sites
from tokcc.backends.onnx import build_onnx, save_onnx
from tokcc.backends.parity import oracle
from tokcc.config import load_policy
from tokcc.ir.program import Program
from tokcc.ir.verify import verify
from tokcc.passes.cache.head import LastTokenHead
from tokcc.passes.cache.planning import make_cache_plan
from tokcc.passes.cache.rebuild import RebuildCaches
from tokcc.passes.methods import library

__all__ = ["PADDING", "PROMPT", "assert_reads_shorter", "build", "compare", "policy", "visual_policy"]

PROMPT, TOKENS, PADDING = 30, 16, (0, 3, 5)
"""Tokens of the longest prompt, of its image, and padding of the rows."""


def policy(steps: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
    """A policy of some steps."""
    return {"version": 1, "name": "prompt", "steps": list(steps), **more}


def visual_policy(step: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """A policy of one step that drops tokens of the image."""
    return policy([step], segments={"image": {"input_ids": IMAGE, "tokens": TOKENS}}, **more)


def build(family: str, wanted: Mapping[str, Any] | str, folder: Path, program: Program | None = None) -> Engine:
    """Compile one family with a policy."""
    program = program or program_of(family)
    plan = make_cache_plan(load_policy(wanted, presets=library()), program, cache_sites(program))
    rebuilt = RebuildCaches(plan).run(program).program
    verify(rebuilt, "RebuildCaches")
    for position in plan.last_token_outputs:
        rebuilt = LastTokenHead(position).run(rebuilt).program
        verify(rebuilt, "LastTokenHead")
    path = folder / "model.onnx"
    save_onnx(build_onnx(rebuilt, opset=18), path)
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return Engine(ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]), rebuilt, plan)


def compare(
    family: str,
    wanted: Mapping[str, Any] | str,
    cuts: Callable[[], Sequence[Cut]],
    folder: Path,
    *,
    steps: int = 8,
    lengths: Callable[[int], Sequence[int]] | None = None,
    compact: bool = False,
    tolerance: float = 2e-4,
    trace: Callable[[Tensor, int], Trace] | None = None,
) -> Engine:
    """Every row of a padded batch gives what it gives alone, without cache: logits; and caches have their lengths.

    Args:
        family: Of :mod:`tests.prompt.models`.
        wanted: The policy.
        cuts: Makes the oracle's cuts, for each row anew.
        folder: For the engine.
        steps: Tokens behind the prompt, one in each call.
        lengths: Tokens of the prompt in each layer, from all of them; None = as the oracle's cuts leave them.
        compact: Positions are counted anew behind a cut.
        tolerance: Relative to the largest logit.
        trace: Another oracle.
    """
    engine = build(family, wanted, folder)
    calls = (PROMPT, *[1] * steps)
    ids, mask = prompts(PADDING, PROMPT, sum(calls), TOKENS)
    logits, last = engine.run(ids, mask, calls)
    model = model_of(family)
    for row, count in enumerate(PADDING):
        alone_ids, alone = ids[row, count:], PROMPT - count
        found = trace(alone_ids, alone) if trace else run(model, alone_ids, alone, cuts(), compact=compact)
        known = ~found.logits.isnan().any(1)
        assert known[alone - 1 :].all()
        wanted_logits, got = found.logits[known], logits[row, count:][known.numpy()]
        scale = float(wanted_logits.abs().max())
        np.testing.assert_allclose(got, wanted_logits.numpy(), rtol=0, atol=tolerance * scale)
        if row == 0:
            layers = [cut.layer for cut in cuts()]
            for layer in range(LAYERS):
                behind = [kept for cut, kept in zip(layers, found.alive, strict=True) if cut < layer]
                length = lengths(PROMPT)[layer] if lengths else len(behind[-1]) if behind else PROMPT
                assert last[f"present.{layer}.key"].shape[2] == length + steps
    return engine


def assert_reads_shorter(
    engine: Engine,
    family: str,
    batch: Sequence[int],
    calls: Sequence[int],
    kept: Callable[[int, Tensor], list[int]],
    given: Mapping[int, Mapping[str, Any]] | None = None,
) -> None:
    """Every row gives what transformers' own model makes of what stays of its prompt: logits, and caches of all layers.

    Args:
        engine: The engine.
        family: Of :mod:`tests.prompt.models`.
        batch: Padding of the rows.
        calls: Tokens of the first call, padding included, and of later ones.
        kept: Takes a row's number and its prompt; returns what stays, ascending.
        given: Inputs that the policy added, by call.
    """
    ids, mask = texts(batch, sum(calls))
    results = list(engine.each(ids, mask, calls, given))
    for row, count in enumerate(batch):
        own, prompt = ids[row, count:], calls[0] - count
        stay = kept(row, own[:prompt])
        logits, cache = read_alone(model_of(family), torch.cat([own[:prompt][stay], own[prompt:]]))
        got = np.concatenate([results[0]["logits"][row, count:][stay], *(r["logits"][row] for r in results[1:])])
        np.testing.assert_allclose(got, logits.numpy(), rtol=0, atol=2e-4 * float(logits.abs().max()))
        read = len(stay)
        for call, result in enumerate(results):
            read += calls[call] if call else 0
            for layer in range(LAYERS):
                for part, whole in (("key", cache.layers[layer].keys), ("value", cache.layers[layer].values)):
                    want = whole[0, :, :read].numpy()
                    held = result[f"present.{layer}.{part}"][row]
                    held = held[:, held.shape[1] - read :]  # behind padding
                    np.testing.assert_allclose(held, want, rtol=0, atol=2e-4 * np.abs(want).max())


def reference_calls(program: Program, ids: Tensor, mask: Tensor, calls: Sequence[int]) -> Tensor:
    """Run the reduced program itself, in eager mode, call after call; returns the logits."""
    from tokcc.backends.calls import empty_past, next_past

    step, past, start, found = oracle(program), empty_past(program, len(ids)), 0, []
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for length in calls:
        stop = start + length
        feeds = {
            "input_ids": ids[:, start:stop],
            "attention_mask": mask[:, :stop],
            "position_ids": positions[:, start:stop],
            **past,
        }
        outputs = step(feeds)
        past = next_past(program.output_names, outputs)
        found.append(outputs[list(program.output_names).index("logits")])
        start = stop
    return torch.cat(found, 1)
