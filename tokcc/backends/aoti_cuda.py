"""What a machine with a GPU needs to make a package for it: no package for CUDA can be made without one."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

import tokcc.backends.build_cuda as script
from tokcc.backends.aoti import AotiOptions, callable_by_name, eager_runner
from tokcc.backends.feeds import Feeds
from tokcc.backends.parity import Check, Tolerance, check_parity, computed_in
from tokcc.ir.program import Program
from tokcc.lowering.aten import decompose

__all__ = ["write_cuda"]


def write_cuda(
    program: Program,
    folder: Path,
    feeds: Sequence[Feeds],
    expected: Sequence[Sequence[torch.Tensor]],
    options: AotiOptions,
    tolerance: Tolerance,
) -> list[Check]:
    """Write the program and a script that compiles it.

    The program is checked in aten operations; where triton is installed, what is written has the ones with a Triton
    kernel in their place, which cannot run here.

    Args:
        program: The (reduced) program.
        folder: Where to; made here.
        feeds: What to check with.
        expected: The oracle's outputs for each.
        options: How packages are made.
        tolerance: What counts as equal.
    """
    folder.mkdir(parents=True)
    checked = callable_by_name(program, decompose(program), feeds[0])
    written = callable_by_name(program, decompose(program, device="cuda"), feeds[0])
    extra = {script.SETTINGS: script.settings_text(dict(options.inductor))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own use of its deprecated pytree classes
        torch.export.save(written, folder / "model.pt2", extra_files=extra)
    source = Path(script.__file__)
    (folder / "build_cuda.py").write_bytes(source.read_bytes())
    run, names = eager_runner(program, checked), list(program.output_names)
    return check_parity(run, names, feeds, expected, tolerance, made_in=computed_in(program))
