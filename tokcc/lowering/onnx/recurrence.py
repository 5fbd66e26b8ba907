"""``tokcc::recurrence`` as a Scan: its body reads nothing from outside, as most runtimes want it."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

import tokcc.kernels
from tokcc.lowering.onnx.recorder import SubgraphRecorder
from tokcc.lowering.onnx.translate import Translator, ir_dtype

__all__ = ["LOWERINGS"]

assert tokcc.kernels is not None


def recurrence(t: Translator, node: fx.Node, decay: Any, update: Any, axis: int, initial: Any = None) -> Any:
    """The state is what runs from token to token; it leaves the loop once for each of them."""
    op, fake = t.op, node.meta["val"]
    place, kind = axis % fake.ndim, ir_dtype(fake.dtype)
    if initial is None:
        first = op("Slice", t.value(update), op.ints([0]), op.ints([1]), op.ints([place]))
        before = op("Mul", op("Squeeze", first, op.ints([place])), op.constant(0.0, kind))
    else:
        before = t.value(initial)
    scope = f"{op.scope}/scan"
    state, kept, added = (
        ir.Value(name=op.unique(f"{scope}/{name}"), type=ir.TensorType(kind)) for name in ("state", "decay", "update")
    )
    body = SubgraphRecorder(op, scope)
    after = body("Add", body("Mul", kept, state), added)
    graph = body.graph([state, kept, added], [after, body("Identity", after)], [kind, kind])
    made = op(
        "Scan",
        before,
        t.value(decay),
        t.value(update),
        outputs=2,
        body=graph,
        num_scan_inputs=2,
        scan_input_axes=[place, place],
        scan_output_axes=[place],
    )
    return made[1]


LOWERINGS: dict[Any, Any] = {
    torch.ops.tokcc.recurrence.default: recurrence,
}
