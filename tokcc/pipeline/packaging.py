"""The aoti backend in a compile: a package, held against the oracle, and one of the model without reduction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from tokcc.backends.aoti import AotiOptions, package
from tokcc.backends.aoti_cuda import write_cuda
from tokcc.backends.feeds import Feeds
from tokcc.backends.parity import Check, Tolerance, refuse_difference
from tokcc.lowering.aten import tokcc_calls
from tokcc.pipeline.reducing import Reduced
from tokcc.pipeline.settling import check_engine
from tokcc.pipeline.stages import Stages

__all__ = ["CUDA_FOLDER", "Packaged", "write_package"]

CUDA_FOLDER = "aoti_cuda"
"""What the bundle has for a machine with a GPU."""


@dataclass(frozen=True)
class Packaged:
    """A package, or what makes one.

    Attributes:
        engine: The package; None = there is none yet.
        checks: Against the oracle.
        details: For the manifest.
        expected: The oracle's outputs, given the package's choices.
        remarks: For the report.
        feeds: What it was checked with; None = what all engines were.
    """

    engine: Path | None
    checks: list[Check]
    details: dict[str, str | int | float | bool]
    expected: Sequence[Sequence[torch.Tensor]]
    remarks: list[str] = field(default_factory=list)
    feeds: Sequence[Feeds] | None = None


def write_package(
    path: Path,
    reduced: Reduced,
    options: AotiOptions,
    metadata: Mapping[str, str],
    feeds: Sequence[Feeds],
    expected: Sequence[Sequence[torch.Tensor]],
    tolerance: Tolerance,
    stages: Stages,
) -> Packaged:
    """Write a package, or for CUDA the folder that makes one, and check it.

    Args:
        path: The package; the folder is beside it.
        reduced: The programs.
        options: How.
        metadata: Written into the package.
        feeds: What to check with.
        expected: The oracle's outputs for each.
        tolerance: What counts as equal.
        stages: Progress.

    Raises:
        LoweringError: The program cannot be compiled.
        ParityError: The package is not equal to the oracle.
    """
    remarks = _remarks(reduced)
    if options.device == "cuda":
        with stages.stage("write what builds for CUDA"):
            folder = path.parent / CUDA_FOLDER
            checks = write_cuda(reduced.sliced, folder, feeds, expected, options, tolerance)
            refuse_difference("aoti", checks)
        note = f"`{CUDA_FOLDER}/build_cuda.py` compiles the aoti package on a machine with a GPU; none is in the bundle"
        return Packaged(None, checks, {"device": "cuda", "built": False}, expected, [note, *remarks])
    build = partial(package, example=feeds[0], options=options, metadata=metadata)
    with stages.stage("compile with AOTInductor"):
        details = build(reduced.sliced, path)
    with stages.stage("parity of the aoti engine", len(feeds)) as advance:
        found = check_engine("aoti", reduced.program, reduced.sliced, path, feeds, expected, build, tolerance, advance)
    remarks += [] if found.note is None else [f"aoti: {found.note}"]
    return Packaged(path, found.checks, details, found.expected, remarks)


def _remarks(reduced: Reduced) -> list[str]:
    """What a user should know who expects of a package what the ONNX engine does."""
    if any(name == "choose_by_size" for name, _ in tokcc_calls(reduced.sliced.graph)):
        return ["aoti: where sizes say how a layer attends, the package attends both ways: the ONNX engine branches"]
    return []
