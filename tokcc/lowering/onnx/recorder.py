"""Builds an ONNX graph: nodes are shared when they are equal, constants are kept once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

__all__ = ["Recorder", "SubgraphRecorder"]


class Recorder:
    """Appends nodes to a graph.

    Equal nodes (operation, operands, attributes) are made once: what a score computes beside an attention and what the
    attention computes itself become one node.

    Args:
        opset: Version of the standard domain.
    """

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.scope = ""
        self._known: dict[Any, Any] = {}
        self._constants: dict[Any, ir.Value] = {}
        self._operands: list[Any] = []
        self._names: dict[str, int] = {}

    def unique(self, name: str) -> str:
        """Return the name, with a number where it is taken."""
        count = self._names.get(name, 0)
        self._names[name] = count + 1
        return name if count == 0 else f"{name}_{count}"

    def __call__(
        self, op_type: str, *inputs: ir.Value | None, outputs: int = 1, domain: str = "", **attributes: Any
    ) -> Any:
        """Append a node.

        Args:
            op_type: The operation.
            inputs: Operands; None for one that is left out.
            outputs: How many.
            domain: Of the operation; the standard one if empty.
            attributes: Attributes; None is left out.

        Returns:
            The output value, or a tuple of them.
        """
        given = {name: value for name, value in attributes.items() if value is not None}
        trimmed = list(inputs)
        while trimmed and trimmed[-1] is None:
            trimmed.pop()
        if op_type == "Unsqueeze" and trimmed[0] is not None:
            before = trimmed[0].producer()
            if before is not None and before.op_type == "Squeeze" and before.inputs[1:] == tuple(trimmed[1:]):
                return before.inputs[0]
        hashable = not any(isinstance(v, ir.Graph) for v in given.values())
        key = None
        if hashable:
            frozen = tuple(sorted((n, tuple(v) if isinstance(v, list) else v) for n, v in given.items()))
            key = (domain, op_type, tuple(id(v) for v in trimmed), frozen, outputs)
            if key in self._known:
                return self._known[key]
        node = ir.Node(
            domain,
            op_type,
            trimmed,
            ir.convenience.convert_attributes(given),
            num_outputs=outputs,
            name=self.unique(f"{self.scope}/{op_type}" if self.scope else op_type),
        )
        for i, value in enumerate(node.outputs):
            value.name = self.unique(f"{node.name}_out{i}" if outputs > 1 else f"{node.name}_out")
        self.nodes.append(node)
        result = node.outputs[0] if outputs == 1 else tuple(node.outputs)
        if key is not None:
            self._known[key] = result
            self._operands += trimmed  # kept, so that the ids in the key stay theirs
        return result

    def constant(self, value: Any, dtype: Any) -> ir.Value:
        """Return an initialiser for a small constant.

        Args:
            value: Number or (nested) list.
            dtype: numpy dtype, or ``ir.DataType``.
        """
        kind = dtype if isinstance(dtype, ir.DataType) else ir.DataType.from_numpy(np.dtype(dtype))
        array = np.asarray(value, dtype=kind.numpy())
        key = (kind, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.initializer(f"const_{len(self._constants)}", ir.Tensor(array, dtype=kind))
        return self._constants[key]

    def ints(self, values: Sequence[int]) -> ir.Value:
        """Return an int64 vector."""
        return self.constant(list(values), np.int64)

    def initializer(self, name: str, tensor: Any) -> ir.Value:
        """Add an initialiser."""
        unique = self.unique(name)
        tensor.name = unique
        value = ir.Value(name=unique, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.initializers[unique] = value
        return value


class SubgraphRecorder(Recorder):
    """Records the body of a loop or a branch; constants and names are those of the outer graph.

    Args:
        outer: Records the graph around it.
        scope: Prefix of the nodes' names.
    """

    def __init__(self, outer: Recorder, scope: str) -> None:
        super().__init__(outer.opset)
        self.outer = outer
        self.scope = scope

    def constant(self, value: Any, dtype: Any) -> ir.Value:
        """Return an initialiser of the outer graph."""
        return self.outer.constant(value, dtype)

    def unique(self, name: str) -> str:
        """Return a name that the outer graph does not have either."""
        return self.outer.unique(name)

    def graph(self, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], dtypes: Sequence[ir.DataType]) -> ir.Graph:
        """Return what was recorded.

        Args:
            inputs: Values that the graph gets.
            outputs: Values that leave it.
            dtypes: Types of those.
        """
        results = [self("Identity", value) if value.producer() not in self.nodes else value for value in outputs]
        for value, dtype in zip(results, dtypes, strict=True):
            value.type = ir.TensorType(dtype)
        return ir.Graph(list(inputs), results, nodes=self.nodes, opset_imports={"": self.opset}, name=self.scope)
