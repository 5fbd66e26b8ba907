"""From a program to an ONNX model."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import fx
from torch.export.graph_signature import InputKind, OutputKind

from tokcc.errors import LoweringError
from tokcc.ir.program import Program
from tokcc.lowering.onnx.pass_through import Passages
from tokcc.lowering.onnx.recorder import Recorder
from tokcc.lowering.onnx.sinking import sink
from tokcc.lowering.onnx.target import ANY_RUNTIME, Target

__all__ = ["IR_VERSIONS", "SIZE", "Translator", "ir_dtype", "translate"]

Lowering = Callable[..., Any]

_DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float64: ir.DataType.DOUBLE,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.int64: ir.DataType.INT64,
    torch.int32: ir.DataType.INT32,
    torch.int16: ir.DataType.INT16,
    torch.int8: ir.DataType.INT8,
    torch.uint8: ir.DataType.UINT8,
    torch.bool: ir.DataType.BOOL,
}
SIZE = "tokcc.size"
"""Where a value that holds a size has it as torch knows it, in its ``meta``."""
IR_VERSIONS = {18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11, 24: 12}
"""The lowest IR version of each opset: newer ones are refused by runtimes."""


def ir_dtype(dtype: torch.dtype) -> ir.DataType:
    """Return the ONNX dtype of a torch dtype."""
    try:
        return _DTYPES[dtype]
    except KeyError:
        raise LoweringError(f"dtype {dtype} has no ONNX form", help="cast the model with --dtype") from None


class Translator:
    """Walks a program and calls one lowering per operation.

    Args:
        program: The program.
        table: Lowerings by operation: ``f(t, node, *args, **kwargs)`` with the node's own arguments.
        opset: Version of the standard domain.
        target: What the graph may hold.
    """

    def __init__(
        self, program: Program, table: Mapping[Any, Lowering], opset: int, target: Target = ANY_RUNTIME
    ) -> None:
        self.program = program
        self.table = {**table, **target.forms}
        self.target = target
        self.op = Recorder(opset)
        self.passages = Passages()
        self.env: dict[fx.Node, Any] = {}
        self._lazy: dict[fx.Node, tuple[str, torch.Tensor]] = {}
        self._axes: dict[Any, Any] = {}
        self._once: dict[Any, Any] = {}
        self._output_names: list[str] = []

    # values -----------------------------------------------------------------------------------------------------------

    def value(self, arg: Any, dtype: torch.dtype | None = None) -> Any:
        """Return the ONNX value of an argument; numbers become constants of ``dtype``, tensors are cast to it."""
        if isinstance(arg, fx.Node):
            if arg in self._lazy and arg not in self.env:
                name, tensor = self._lazy[arg]
                self.env[arg] = self.op.initializer(name, TorchTensor(tensor))
            known = self.env[arg]
            if isinstance(known, int | float | bool):
                return self.op.constant(known, ir_dtype(dtype or torch.int64))
            fake = arg.meta["val"]
            if isinstance(fake, torch.SymInt | int):
                scalar = self.op("Squeeze", known, self.op.ints([0]))
                return scalar if dtype in (None, torch.int64) else self.op("Cast", scalar, to=int(ir_dtype(dtype)))
            if dtype is not None and fake.dtype != dtype:
                return self.op("Cast", known, to=int(ir_dtype(dtype)))
            return known
        if isinstance(arg, bool):
            return self.op.constant(arg, ir_dtype(dtype or torch.bool))
        if isinstance(arg, int):
            return self.op.constant(arg, ir_dtype(dtype or torch.int64))
        if isinstance(arg, float):
            return self.op.constant(arg, ir_dtype(dtype or torch.float32))
        raise LoweringError(f"an argument of type {type(arg).__name__} has no ONNX form")

    def tensor(self, arg: Any) -> torch.Tensor | None:
        """Return the real tensor behind a parameter or constant, or None."""
        return self._lazy[arg][1] if isinstance(arg, fx.Node) and arg in self._lazy else None

    def derived(self, node: fx.Node, suffix: str, make: Callable[[torch.Tensor], torch.Tensor]) -> ir.Value:
        """Return an initialiser computed from a parameter (a transposed weight), made when it is written."""
        name, tensor = self._lazy[node]
        key = f"{name}{suffix}"
        if key not in self.op.initializers:
            probe = make(tensor)
            lazy = ir.LazyTensor(
                lambda: TorchTensor(make(tensor).contiguous()),
                dtype=ir_dtype(tensor.dtype),
                shape=ir.Shape(list(probe.shape)),
                name=key,
            )
            self.op.initializer(key, lazy)
        return self.op.initializers[key]

    def size(self, arg: Any) -> Any:
        """Return a size as an int, or as an int64 vector of one element."""
        if isinstance(arg, fx.Node):
            return self.env[arg]
        if isinstance(arg, torch.SymInt):
            raise LoweringError("a symbolic size reached the lowering as a number")
        return int(arg)

    def sizes(self, args: Sequence[Any]) -> Any:
        """Return sizes as one int64 vector: a constant where all are ints."""
        parts = [self.size(a) for a in args]
        if all(isinstance(p, int) for p in parts):
            return self.op.ints(parts)
        joined: list[Any] = []
        run: list[int] = []
        for part in parts:
            if isinstance(part, int):
                run.append(part)
                continue
            if run:
                joined.append(self.op.ints(run))
                run = []
            joined.append(part)
        if run:
            joined.append(self.op.ints(run))
        return joined[0] if len(joined) == 1 else self.op("Concat", *joined, axis=0)

    def size_vector(self, arg: Any) -> Any:
        """Return one size as an int64 vector of one element."""
        size = self.size(arg)
        return self.op.ints([size]) if isinstance(size, int) else size

    def axis(self, node: fx.Node, axis: int) -> Any:
        """Return one size of a tensor as an int64 vector of one element: sizes that are known to be equal are one."""
        size = node.meta["val"].shape[axis]
        if isinstance(size, int):
            return self.op.ints([size])
        key = size.node.expr
        if key not in self._axes:
            self._axes[key] = self.op("Shape", self.value(node), start=axis, end=axis + 1)
            self._axes[key].meta[SIZE] = size
        return self._axes[key]

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return what was made for an equal key, or make it: for nodes with graphs inside, which are not compared."""
        if key not in self._once:
            self._once[key] = make()
        return self._once[key]

    # the walk ---------------------------------------------------------------------------------------------------------

    def run(self) -> ir.Model:
        """Translate the whole program."""
        inputs: list[ir.Value] = []
        state = self.program.state_tensors()
        for node, spec in self.program.input_specs():
            fake = node.meta.get("val")
            if spec.kind is InputKind.USER_INPUT:
                if not isinstance(fake, torch.Tensor):
                    continue
                name = self.op.unique(self.program.input_names.get(node.name, node.name))
                value = ir.Value(name=name, shape=self._shape(fake), type=ir.TensorType(ir_dtype(fake.dtype)))
                self.env[node] = value
                inputs.append(value)
            elif node.name in state:
                self._lazy[node] = (str(spec.target), state[node.name].detach())
        # Taken before any value or weight could be called the same: what a caller reads keeps its name.
        self._output_names = [self.op.unique(name) for name in self.program.output_names]
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                self.env[node] = self._call(node)
        outputs = self._outputs()
        if self.target.branches:
            self.passages.apply(self.op, outputs)
        graph = ir.Graph(
            inputs,
            outputs,
            nodes=self.op.nodes,
            initializers=list(self.op.initializers.values()),
            opset_imports={"": self.op.opset, **dict.fromkeys(self.target.domains, 1)},
            name="tokcc",
        )
        graph.sort()
        sink(self.passages.choices)
        return ir.Model(graph, ir_version=IR_VERSIONS[self.op.opset], producer_name="tokcc")

    def _call(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            return self.env[node.args[0]][node.args[1]]  # type: ignore[index]  # a multi-output node
        lowering = self.table.get(node.target)
        stack = node.meta.get("nn_module_stack") or {}
        path = next((str(entry[0]) for entry in reversed(list(stack.values())) if entry[0]), "")
        inserted = node.meta.get("tokcc")
        self.op.scope = f"tokcc/{inserted}" if inserted else path
        if lowering is None:
            raise LoweringError(
                f"operation {node.target} has no ONNX form in tokcc",
                node=f"{node.name} ({path})",
                help="move it out of the model, or write it with simpler operations; please report it",
            )
        result = lowering(self, node, *node.args, **node.kwargs)
        fake = node.meta.get("val")
        if isinstance(result, ir.Value) and isinstance(fake, torch.Tensor):
            self._annotate(result, fake)
        if isinstance(result, ir.Value) and isinstance(fake, torch.SymInt):
            result.meta.setdefault(SIZE, fake)
        return result

    def _annotate(self, value: ir.Value, fake: torch.Tensor) -> None:
        if value.type is None:
            value.type = ir.TensorType(ir_dtype(fake.dtype))

    def _shape(self, fake: torch.Tensor) -> ir.Shape:
        sizes: Sequence[Any] = fake.shape  # ints and SymInts; the stubs know ints only
        return ir.Shape([size if isinstance(size, int) else self.program.size_name(size) for size in sizes])

    def _outputs(self) -> list[ir.Value]:
        values = self.program.output_values
        names = self._output_names
        result: list[ir.Value] = []
        position = 0
        taken: set[int] = set()
        for spec, value in zip(self.program.signature.output_specs, values, strict=True):
            if spec.kind is not OutputKind.USER_OUTPUT:
                continue
            name = names[position]
            position += 1
            if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), torch.Tensor):
                continue
            self.op.scope = ""
            out = self._output_value(value, taken)
            taken.add(id(out))
            out.name = name
            fake = value.meta["val"]
            out.shape, out.type = self._shape(fake), ir.TensorType(ir_dtype(fake.dtype))
            result.append(out)
        return result

    def _output_value(self, node: fx.Node, taken: set[int]) -> ir.Value:
        """Return what leaves the graph: an input, a constant, or what is returned twice needs a value of its own.

        Others are named themselves: a copy of a large output costs a runtime its size.
        """
        value = self.value(node)
        own = value.producer() is not None and id(value) not in taken
        return value if own and isinstance(value, ir.Value) else self._identity(node)

    def _identity(self, node: fx.Node) -> ir.Value:
        source = self.value(node)
        node_out = ir.Node("", "Identity", [source], num_outputs=1, name=self.op.unique("output/Identity"))
        self.op.nodes.append(node_out)
        return node_out.outputs[0]


def translate(program: Program, opset: int = 18, target: Target = ANY_RUNTIME) -> ir.Model:
    """Translate a program to an ONNX model with standard operations.

    Args:
        program: The program; its ``tokcc::`` nodes become standard operations too.
        opset: 18 to 24.
        target: What the graph may hold.

    Raises:
        LoweringError: When an operation, dtype or opset has no form.
    """
    from tokcc.lowering.onnx.table import lowerings

    if opset not in IR_VERSIONS:
        raise LoweringError(
            f"opset {opset} is not supported", needed=f"{min(IR_VERSIONS)} to {max(IR_VERSIONS)}", found=str(opset)
        )
    return Translator(program, lowerings(), opset, target).run()
