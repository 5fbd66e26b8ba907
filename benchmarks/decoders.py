"""What the benchmarks of decoders share: methods of the command line, engines, their inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
import yaml

from benchmarks.engines import Feeds
from benchmarks.grid import short
from tokcc.backends.onnx import build_onnx, save_onnx
from tokcc.backends.parity import oracle
from tokcc.config import Policy, load_policy
from tokcc.ir.program import Program
from tokcc.passes.methods import library
from tokcc.pipeline.reducing import Reduced, reduce_program
from tokcc.pipeline.stages import Stages

__all__ = ["PAST", "call_of", "eager_logits", "empty", "lowered", "policy_of", "present", "refuse_difference"]

PAST = "past_key_values."
_TOLERANCE = 1e-3


def policy_of(method: str, **given: Any) -> dict[str, Any]:
    """Return the policy of ``name`` or ``name:parameter=value,key.inner=value,...``.

    Args:
        method: A preset, or ``none``; what stands behind the colon comes last.
        given: Further parameters.
    """
    name, _, own = method.partition(":")
    if name == "none":
        return {"version": 1, "name": "none", "steps": []}
    found: dict[str, Any] = dict(given)
    for key, _, value in (part.partition("=") for part in own.split(",") if part):
        outer, _, inner = key.partition(".")
        read = yaml.safe_load(value)
        found[outer] = {**found.get(outer, {}), inner: read} if inner else read
    return short(name, **found)


def lowered(program: Program, policy: dict[str, Any] | Policy | str, path: Path) -> Reduced:
    """Write the engine of a captured decoder with a policy."""
    reduced = reduce_program(program, load_policy(policy, presets=library()), Stages())
    save_onnx(build_onnx(reduced.sliced, opset=18), path)
    return reduced


def eager_logits(program: Program, feeds: Feeds) -> npt.NDArray[Any]:
    """Return what the program gives that an engine was made of."""
    with torch.no_grad():
        found = oracle(program)({name: torch.from_numpy(value.copy()) for name, value in feeds.items()})
    return np.asarray(found[program.output_names.index("logits")].numpy())


def refuse_difference(name: str, got: npt.NDArray[Any], wanted: npt.NDArray[Any]) -> None:
    """Stop where an engine is not what it is meant to be: no figure is worth anything then.

    Raises:
        SystemExit: They differ by more than a thousandth of their scale.
    """
    apart = float(np.abs(got - wanted).max() / np.abs(wanted).max())
    if not apart <= _TOLERANCE:
        raise SystemExit(f"{name}: engine and eager program differ by {apart:.1e} of their scale: nothing is timed")


def empty(session: ort.InferenceSession) -> Feeds:
    """Caches before the first call; those of fixed slots are as long as they are."""
    carried = [item for item in session.get_inputs() if item.name.startswith(PAST.rstrip("."))]  # torch writes `_`
    sizes = {item.name: [n if isinstance(n, int) else 0 for n in item.shape[1:]] for item in carried}
    return {name: np.zeros((1, *size), np.float32) for name, size in sizes.items()}


def call_of(session: ort.InferenceSession, ids: npt.NDArray[np.int64], stop: int | None = None) -> Feeds:
    """Everything but the caches, of a call whose last token is number ``stop``; None = of a first call."""
    end = len(ids) if stop is None else stop
    known = {
        "input_ids": ids[None].astype(np.int64),
        "attention_mask": np.ones((1, end), np.int64),
        "position_ids": np.arange(end - len(ids), end)[None],
    }
    return {item.name: known[item.name] for item in session.get_inputs() if item.name in known}


def present(name: str) -> str:
    """Return the output that follows a cache's input."""
    return name.replace(PAST, "present.")
