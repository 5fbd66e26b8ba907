"""From a loaded model to a clean program."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram

from tokcc.capture.dim_names import with_declared_names
from tokcc.capture.drop_noops import DropNoops
from tokcc.capture.fold_constants import FoldConstants
from tokcc.capture.functional import functional
from tokcc.capture.narrow_masks import NarrowMasks
from tokcc.capture.roll_scans import RollLoops, RollScans
from tokcc.errors import CaptureError
from tokcc.ir.program import Pass, Program
from tokcc.ir.verify import verify

if TYPE_CHECKING:
    from tokcc.capture.load import Loaded

__all__ = ["capture", "clean", "export"]

CLEANING: tuple[Pass, ...] = (RollScans(), DropNoops(), RollLoops(), FoldConstants(), NarrowMasks(), DropNoops())


def export(loaded: Loaded) -> ExportedProgram:
    """Trace a loaded model with ``torch.export`` and decompose to the small op set.

    The small op set keeps ``linear``, ``layer_norm`` and SDPA whole, and the graph is functional.

    Raises:
        CaptureError: When the model cannot be traced; the reason is torch's.
    """
    exported = loaded.exported
    if exported is None:
        assert loaded.module is not None
        loaded.module.eval()
        exported = _trace(loaded)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own use of its deprecated pytree classes
        return functional(exported)


def _trace(loaded: Loaded) -> ExportedProgram:
    assert loaded.module is not None
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # warnings of the traced model's own code are not ours to raise
            return torch.export.export(
                loaded.module,
                loaded.example_args,
                loaded.example_kwargs,
                dynamic_shapes=loaded.dynamic_shapes,
                strict=False,
            )
    except (
        RuntimeError,
        ValueError,
        TypeError,
        AssertionError,
        KeyError,
        AttributeError,
        NotImplementedError,
    ) as error:
        raise CaptureError(
            "the model cannot be traced by torch.export",
            found=_first_lines(error),
            help="check that the model runs on the example inputs, and that its control flow does not depend on values",
        ) from error


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: " + " ".join(lines[:3])[:400]


def clean(program: Program) -> Program:
    """Run the clean-up passes, verified after each."""
    for step in CLEANING:
        program = step.run(program).program
        verify(program, type(step).__name__)
    return program


def capture(loaded: Loaded) -> Program:
    """Trace and clean.

    Args:
        loaded: The model with example inputs.

    Returns:
        A program whose graph is functional, free of asserts, copies and dead masks.

    Raises:
        CaptureError: When tracing fails.
    """
    program = Program.from_exported(export(loaded))
    return clean(with_declared_names(program, loaded.dynamic_shapes))


def program_of(value: Any) -> Program:
    """Return a clean program of an ``ExportedProgram`` that is already decomposed."""
    return clean(Program.from_exported(value))
