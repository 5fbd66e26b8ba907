"""Graphs in bfloat16, run in float32: ONNX Runtime has no kernels of bfloat16 on the CPU.

Everything of a graph but its rounding can be checked so.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir

from tokcc.backends.onnx import save_onnx
from tokcc.backends.ort import Session

__all__ = ["in_float32", "open_in_float32"]

_TYPE_ATTRIBUTES = ("to", "dtype")
"""Of operations that say which type they make."""


def open_in_float32(path: Path) -> Session:
    """Load an ONNX model in ONNX Runtime; what is bfloat16 in it is float32 here, inputs and outputs too."""
    model = ir.load(path)
    if not in_float32(model):
        return Session(path)
    with tempfile.TemporaryDirectory(prefix="tokcc-float32-") as folder:
        widened = Path(folder) / path.name
        save_onnx(model, widened)
        return Session(widened)


def in_float32(model: ir.Model) -> bool:
    """Make float32 of everything bfloat16 in a model, in place; returns whether there was anything."""
    found = False
    for graph in (model.graph, *model.graph.subgraphs()):
        made = (value for node in graph for value in node.outputs)
        for value in (*graph.inputs, *graph.outputs, *graph.initializers.values(), *made):
            if value.dtype == ir.DataType.BFLOAT16:
                value.dtype = ir.DataType.FLOAT
                found = True
            if value.const_value is not None and value.const_value.dtype == ir.DataType.BFLOAT16:
                value.const_value = _widened(value.const_value)
                found = True
        for node in graph:
            for name, attribute in list(node.attributes.items()):
                if name in _TYPE_ATTRIBUTES and attribute.value == ir.DataType.BFLOAT16:
                    node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT)
                    found = True
                elif attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == ir.DataType.BFLOAT16:
                    node.attributes[name] = ir.AttrTensor(name, _widened(attribute.value))
                    found = True
    return found


def _widened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(np.asarray(tensor.numpy()).astype(np.float32), name=tensor.name)
