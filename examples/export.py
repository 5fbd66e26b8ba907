"""Save a model as a ``torch.export`` archive, the form `tokcc compile model.pt` takes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import nn


def save_exported(
    module: nn.Module,
    args: tuple[torch.Tensor, ...],
    path: Path,
    *,
    dynamic_shapes: dict[str, dict[int, Any]] | None = None,
) -> torch.export.ExportedProgram:
    """Export ``module`` and write the archive to ``path``.

    Args:
        module: Model in eval mode.
        args: Example inputs; their batch is at least two, because size one is specialised away.
        path: File to write, ``.pt`` or ``.pt2``.
        dynamic_shapes: Dynamic axes per argument name, as ``torch.export`` wants them.

    Returns:
        The exported program.
    """
    with torch.no_grad():
        program = torch.export.export(module.eval(), args, dynamic_shapes=dynamic_shapes, strict=False)
    # torch.export.save insists on a .pt2 suffix for paths; through a buffer the user's own name is kept.
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())
    return program
