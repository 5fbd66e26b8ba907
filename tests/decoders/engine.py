"""Compile a small decoder with a policy and run it in ONNX Runtime, call after call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from torch import Tensor

from tests.decoders.oracle import Rule, run_alone
from tests.decoders.tiny import VOCABULARY, model_of, program_of
from tokcc.analysis.cache_sites import cache_sites
from tokcc.backends.onnx import build_onnx, save_onnx
from tokcc.config import load_policy
from tokcc.ir.program import Program
from tokcc.ir.verify import verify
from tokcc.passes.cache.plan import CachePlan
from tokcc.passes.cache.planning import make_cache_plan
from tokcc.passes.cache.rebuild import RebuildCaches
from tokcc.passes.cache.right_padding import RightPadding
from tokcc.passes.methods import library

__all__ = ["Engine", "assert_equals_alone", "build", "tokens"]

_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
    "tensor(int64)": np.int64,
}
Given = Mapping[int, Mapping[str, npt.NDArray[Any]]]
CALLS = (9, 1, 1, 5, *[1] * 64)
"""A prompt, single tokens, a second piece of text, and a generation."""


@dataclass(frozen=True)
class Engine:
    """An engine and where it came from."""

    session: ort.InferenceSession
    program: Program
    plan: CachePlan

    def run(
        self, ids: Tensor, mask: Tensor, calls: Sequence[int], given: Given | None = None
    ) -> tuple[npt.NDArray[Any], dict[str, Any]]:
        """Run padded rows ``[B, T]`` in calls of the given lengths.

        Args:
            ids: The rows.
            mask: 1 = real.
            calls: New tokens of each call.
            given: Values of inputs that the policy added, by call and name; nothing in all others.

        Returns:
            Logits ``[B, T, V]``, and the outputs of the last call by name.
        """
        results = list(self.each(ids, mask, calls, given))
        return np.concatenate([result["logits"] for result in results], 1), results[-1]

    def each(
        self, ids: Tensor, mask: Tensor, calls: Sequence[int], given: Given | None = None
    ) -> Iterator[dict[str, npt.NDArray[Any]]]:
        """The same, with the outputs of every call by name."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        past = {}
        for item in self.session.get_inputs():
            if "past" in item.name:
                _, heads, rows, width = item.shape
                rows = rows if isinstance(rows, int) else 0  # fixed slots are there from the beginning
                # Runtimes begin with states as wide as a head, see tokcc.backends.onnx.
                shape = (len(ids), heads, rows, width if isinstance(width, int) else 16)
                past[item.name] = np.zeros(shape, _DTYPES[item.type])
        names = [item.name for item in self.session.get_outputs()]
        start = 0
        for number, length in enumerate(calls):
            stop = start + length
            known = {"B": len(ids), "S": length}
            feeds = {
                **{
                    spec.name: np.full([known.get(str(size), 0) for size in spec.shape], int(spec.unguided))
                    for spec in self.plan.inputs
                },
                "input_ids": ids[:, start:stop].numpy(),
                "attention_mask": mask[:, :stop].numpy(),
                "position_ids": positions[:, start:stop].numpy(),
                **past,
                **(given or {}).get(number, {}),
            }
            results = dict(zip(names, self.session.run(None, feeds), strict=True))
            past = {name: results[name.replace("past_key_values", "present")] for name in past}
            start = stop
            yield results


def build(family: str, policy: Mapping[str, Any] | str, folder: Path, opset: int = 18) -> Engine:
    """Compile one family with a policy."""
    program = program_of(family)
    plan = make_cache_plan(load_policy(policy, presets=library()), program, cache_sites(program))
    rebuilt = RebuildCaches(plan).run(program).program
    verify(rebuilt, "RebuildCaches")
    if plan.fixed and plan.attention_mask is not None:
        rebuilt = RightPadding(plan.attention_mask).run(rebuilt).program
        verify(rebuilt, "RightPadding")
    path = folder / "model.onnx"
    save_onnx(build_onnx(rebuilt, opset=opset), path)
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return Engine(ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]), rebuilt, plan)


def tokens(rows: int, length: int, padding: Sequence[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random ids and left-padded masks ``[B, T]``; no row has a token twice while the vocabulary lasts."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(VOCABULARY - 3, generator=generator)[:length] + 3 for _ in range(rows)])
    mask = torch.ones(rows, length, dtype=torch.int64)
    for row, count in enumerate(padding):
        mask[row, :count] = 0
        ids[row, :count] = 0
    return ids, mask


def assert_equals_alone(
    family: str,
    policy: Mapping[str, Any] | str,
    rule: Rule | None,
    folder: Path,
    *,
    calls: Sequence[int] = CALLS,
    padding: Sequence[int] = (0, 3, 5),
    tolerance: float = 2e-4,
    slots: bool = False,
    given: Given | None = None,
) -> Engine:
    """Every row of a padded batch gives what it gives alone under the rule: logits, and the kept keys and values."""
    engine = build(family, policy, folder)
    ids, mask = tokens(len(padding), sum(calls), padding)
    logits, last = engine.run(ids, mask, calls, given)
    model = model_of(family)
    for row, count in enumerate(padding):
        alone = run_alone(model, ids[row, count:], _without(calls, count), rule, slots=slots)
        scale = float(alone.logits.abs().max())
        np.testing.assert_allclose(logits[row, count:], alone.logits.numpy(), rtol=0, atol=tolerance * scale)
        for layer, (keys, values) in enumerate(zip(alone.keys, alone.values, strict=True)):
            for name, wanted in (("key", keys), ("value", values)):
                # Of fixed slots the last ones are filled, and states may lie behind them.
                got = last[f"present.{layer}.{name}"][row][:, : engine.plan.otherwise.always()]
                np.testing.assert_allclose(
                    got[:, got.shape[1] - wanted.shape[1] :],
                    wanted.numpy(),
                    rtol=0,
                    atol=tolerance * float(wanted.abs().max()),
                )
    return engine


def _without(calls: Sequence[int], padding: int) -> list[int]:
    """The calls of a row that is shorter at the beginning."""
    first, *rest = calls
    assert first > padding
    return [first - padding, *rest]
