"""The ONNX backend: a file that an unmodified runtime loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common as onnx_passes

from tokcc.errors import LoweringError
from tokcc.ir.program import Program
from tokcc.lowering.onnx.target import ANY_RUNTIME, Target
from tokcc.lowering.onnx.translate import translate

__all__ = ["EXTERNAL_BYTES", "build_onnx", "save_onnx"]

EXTERNAL_BYTES = 1_900_000_000
"""Above this, weights go to a file beside the model: a protobuf holds less than 2 GB."""


def build_onnx(
    program: Program, *, opset: int = 18, metadata: Mapping[str, Any] | None = None, target: Target = ANY_RUNTIME
) -> ir.Model:
    """Lower a program to an ONNX model and check it.

    Args:
        program: The (reduced) program.
        opset: Version of the standard domain.
        metadata: Written to ``metadata_props`` as JSON.
        target: What the graph may hold.

    Raises:
        LoweringError: When an operation has no form or the model does not check.
    """
    model = translate(program, opset, target)
    onnx_passes.RemoveUnusedNodesPass()(model)
    _free_state_widths(model)
    for name, value in (metadata or {}).items():
        model.metadata_props[name] = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    domains = {node.domain for node in model.graph.all_nodes()}
    if domains - {"", *target.domains}:
        raise LoweringError("the graph holds operations outside the standard domain", found=", ".join(sorted(domains)))
    return model


def _free_state_widths(model: ir.Model) -> None:
    """Let what a decoder carries beside keys and values come in any width.

    Runtimes take every ``past_key_values.*`` for a key or a value and begin with no slots as wide as a head; from the
    second call on they feed back what the engine gave. They know no cache of codes, whose steps are fp16.
    """
    for value in model.graph.inputs:
        name = value.name or ""
        state = name.startswith("past_key_values.") and not name.endswith((".key", ".value"))
        state = state and value.dtype == ir.DataType.FLOAT
        if state and value.shape is not None and value.shape.rank() == 4 and value.shape[3] == 1:
            if isinstance(value.shape[2], int):
                continue  # all of its slots are there from the first call on
            value.shape = ir.Shape([*value.shape[:3], "width"])


def save_onnx(model: ir.Model, path: Path, *, external: bool | None = None) -> list[Path]:
    """Write a model, with its weights beside it when they are large or when asked.

    Returns:
        The files written.
    """
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    apart = size > EXTERNAL_BYTES if external is None else external
    if apart:
        ir.save(model, path, external_data=f"{path.name}.data")
        return [path, path.with_name(f"{path.name}.data")]
    ir.save(model, path)
    return [path]
