"""Is the engine equal to its eager reference?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tokcc.backends.arrays import to_array, to_tensor
from tokcc.backends.feeds import Feeds
from tokcc.errors import ParityError
from tokcc.ir.program import Program
from tokcc.progress import Advance

__all__ = ["Check", "Tolerance", "check_parity", "computed_in", "numpy_feeds", "oracle", "refuse_difference", "runner"]

Array = npt.NDArray[Any]
_PRESENT = "present."
_CODES = 0.02
"""Share of bytes that may differ: numbers that agree to 1e-4 of their scale round differently in one of 100 cases."""
_HALF_CODES = 0.25
"""The same of a model in half precision, whose numbers agree to 1e-3: of 255 steps one in four lies that near."""
_RELATIVE = {torch.float32: 2e-4, torch.float64: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Tolerance:
    """``|engine - oracle| <= atol + rtol * |oracle|``; atol None = a share of the output's scale, by dtype.

    Bytes of a cache are codes of rounded numbers (see tokcc.passes.cache.rounding): a number between two steps goes
    either way by its last bit. Of them a share may differ, and nothing is said about by how much.
    """

    atol: float | None = None
    rtol: float | None = None

    def of(self, reference: torch.Tensor, scale: float, made_in: torch.dtype = torch.float32) -> tuple[float, float]:
        """Return absolute and relative tolerance for one output.

        Args:
            reference: It.
            scale: Its largest number.
            made_in: What it is computed in: a sum in float32 of numbers in half precision is as exact as those.
        """
        if not reference.is_floating_point():
            return 0.0, 0.0
        share = max(_RELATIVE[reference.dtype], _RELATIVE[made_in])
        atol = self.atol if self.atol is not None else share * max(scale, 1e-6)
        return atol, self.rtol or 0.0


@dataclass(frozen=True)
class Check:
    """One output over all inputs.

    Attributes:
        output: Its name.
        max_abs_diff: The largest difference; of bytes, the share that differs.
        scale: The largest number.
        atol: Absolute tolerance.
        rtol: Relative tolerance.
        passed: Whether it is equal within both.
    """

    output: str
    max_abs_diff: float
    scale: float
    atol: float
    rtol: float
    passed: bool


def computed_in(program: Program) -> torch.dtype:
    """Return the least exact type of a program's weights."""
    types = {tensor.dtype for tensor in program.state_tensors().values()}
    return max((dtype for dtype in types if dtype in _RELATIVE), key=_RELATIVE.__getitem__, default=torch.float32)


def numpy_feeds(feeds: Feeds) -> dict[str, Array]:
    """Return feeds for a runtime."""
    return {name: to_array(value) for name, value in feeds.items()}


def oracle(program: Program) -> Callable[[Feeds], list[torch.Tensor]]:
    """Return a function that runs a program eagerly: user outputs in order."""
    return runner(program.to_exported().module(check_guards=False), program)


def runner(module: Callable[..., Any], program: Program) -> Callable[[Feeds], list[torch.Tensor]]:
    """Return a function that runs a program's module on named inputs: user outputs in order."""
    from torch.utils import _pytree as pytree

    signature = program.call_signature
    names = [program.public_name(n) for n in program.user_inputs if isinstance(n.meta.get("val"), torch.Tensor)]

    def run(feeds: Feeds) -> list[torch.Tensor]:
        leaves: list[Any] = [feeds[name] for name in names]
        with torch.no_grad():
            if signature is None:
                result = module(*leaves)
            else:
                args, kwargs = pytree.tree_unflatten(leaves, signature.in_spec)
                result = module(*args, **kwargs)
        return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]

    return run


def defined_rows(reference: torch.Tensor, feeds: Feeds) -> torch.Tensor | None:
    """Return which rows of a token-level output are defined, bool ``[B, N]``, when an input masks padding."""
    for name, value in feeds.items():
        if "mask" not in name or value.ndim != 2 or tuple(reference.shape[:2]) != tuple(value.shape):
            continue
        if reference.ndim < 3:
            continue
        kept = value.to(torch.bool)
        return ~kept if "padding" in name else kept
    return None


def check_parity(
    run: Callable[[Mapping[str, Array]], dict[str, Array]],
    names: Sequence[str],
    inputs: Sequence[Feeds],
    expected: Sequence[Sequence[torch.Tensor]],
    tolerance: Tolerance,
    advance: Advance = lambda units: None,
    made_in: torch.dtype = torch.float32,
) -> list[Check]:
    """Compare an engine with its reference on several inputs.

    Rows of padding tokens are not compared: what a model computes there is not defined.

    Args:
        run: Runs the engine.
        names: Of the outputs, in order.
        inputs: What to run on.
        expected: The reference's outputs for each input.
        tolerance: What counts as equal.
        advance: Told after each input.
        made_in: The least exact type that the model computes in.

    Returns:
        The worst over the inputs for each output.
    """
    worst: dict[str, Check] = {}
    for feeds, wanted in zip(inputs, expected, strict=True):
        got = run(numpy_feeds(feeds))
        own = [want for name, want in zip(names, wanted, strict=True) if not name.startswith(_PRESENT)]
        codes = _HALF_CODES if any(want.dtype in (torch.float16, torch.bfloat16) for want in own) else _CODES
        for name, want in zip(names, wanted, strict=True):
            check = _compare(name, want, to_tensor(np.array(got[name])), feeds, tolerance, codes, made_in)
            known = worst.get(name)
            if known is None or _badness(check) > _badness(known):
                worst[name] = check
        advance(1)
    return list(worst.values())


def _badness(check: Check) -> tuple[bool, float]:
    return not check.passed, check.max_abs_diff - check.atol


def _compare(
    name: str,
    want: torch.Tensor,
    got: torch.Tensor,
    feeds: Feeds,
    tolerance: Tolerance,
    codes: float,
    made_in: torch.dtype,
) -> Check:
    """Compare one output; infinities and NaN must stand at the same places, the rest is compared as numbers."""
    if tuple(want.shape) != tuple(got.shape):
        return Check(name, float("inf"), 0.0, 0.0, 0.0, False)
    if want.dtype == torch.uint8 and name.startswith(_PRESENT):
        share = float((want != got).double().mean()) if want.numel() else 0.0
        return Check(name, share, 1.0, codes, 0.0, share <= codes)
    rows = defined_rows(want, feeds)
    if rows is not None:
        want, got = want[rows], got[rows]
    expected, found = want.to(torch.float64), got.to(torch.float64)
    numbers = torch.isfinite(expected)
    special = torch.equal(found[~numbers].nan_to_num(nan=0.5), expected[~numbers].nan_to_num(nan=0.5))
    expected, found = expected[numbers], found[numbers]
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    atol, rtol = tolerance.of(want, scale, made_in)
    difference = (found - expected).abs()
    worst = float(difference.max()) if difference.numel() else 0.0
    if not special or not math.isfinite(worst):
        return Check(name, float("inf"), scale, atol, rtol, False)
    return Check(name, worst, scale, atol, rtol, bool((difference <= atol + rtol * expected.abs()).all()))


def refuse_difference(engine: str, checks: Sequence[Check], why: str | None = None) -> None:
    """Raise when a check failed.

    Args:
        engine: What was checked.
        checks: How.
        why: The first choice that went another way, where that is known.

    Raises:
        ParityError: Naming the output and the difference.
    """
    for check in checks:
        if not check.passed:
            raise ParityError(
                f"the {engine} engine differs from its reference",
                node=f"output `{check.output}`",
                needed=f"|difference| <= {check.atol:.3g} + {check.rtol:.3g} * |reference| (scale {check.scale:.3g})",
                found=f"{check.max_abs_diff:.3g}" + (f"; {why}" if why else ""),
                help="no engine is left behind; please report the model and policy",
            )
