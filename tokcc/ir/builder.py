"""One small builder with two backends, so that a rule is both compiler and reference.

``GraphBuilder`` appends nodes to a new FX graph and evaluates their fakes; ``EagerBuilder`` just calls. Axis rules and
method pieces are written once against this vocabulary.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true

from tokcc.errors import UsageError
from tokcc.ir.fakes import counts_blocks, fake_result
from tokcc.ir.symbols import SizeWatch, free_size, size_oblivious

__all__ = ["Builder", "EagerBuilder", "GraphBuilder", "same_size"]

aten = torch.ops.aten
_END = torch.iinfo(torch.int64).max


def same_size(first: Any, second: Any) -> bool:
    """Return True when two sizes (ints or ``SymInt``) are known to be equal, without adding a guard."""
    if isinstance(first, int) and isinstance(second, int):
        return first == second
    return bool(statically_known_true(first == second))


class Builder(ABC):
    """Emits operations. A *handle* is whatever ``call`` returns; a *size* is an int or a handle."""

    @abstractmethod
    def call(self, target: Any, *args: Any, like: fx.Node | None = None, **kwargs: Any) -> Any:
        """Emit one operation and return its handle."""

    @abstractmethod
    def shape(self, handle: Any) -> tuple[Any, ...]:
        """Return the sizes of a tensor handle: ints where static, else ints or ``SymInt`` for comparison only."""

    @abstractmethod
    def size(self, handle: Any, axis: int) -> Any:
        """Return the size of one axis, usable as an argument."""

    @abstractmethod
    def dtype(self, handle: Any) -> torch.dtype:
        """Return the dtype of a tensor handle."""

    @abstractmethod
    def device(self, handle: Any) -> torch.device:
        """Return the device of a tensor handle."""

    @abstractmethod
    def constant(self, name: str, tensor: torch.Tensor) -> Any:
        """Return a handle of a constant tensor."""

    @abstractmethod
    def input(
        self, name: str, shape: Sequence[Any], dtype: torch.dtype, device: torch.device, *, least: int = 0
    ) -> Any:
        """Return a handle of an input that the program does not have by itself.

        Args:
            name: What the caller calls it.
            shape: Sizes, or names of sizes of their own: one name is one size.
            dtype: Its type.
            device: Where it is read.
            least: The smallest size of its own that it may have.
        """

    @contextmanager
    def inserting(self, label: str) -> Iterator[None]:
        """Mark what is emitted inside as inserted by tokcc; ``label`` names the step."""
        del label
        yield

    def mark_prefix(self, reduced: Any, source: Any, rows: int) -> None:
        """Record that the first ``rows`` tokens of a reduced stream are those of the stream before, untouched."""
        del reduced, source, rows

    # sizes ------------------------------------------------------------------------------------------------------------

    def _size_op(self, op: Callable[[Any, Any], Any], first: Any, second: Any) -> Any:
        if isinstance(first, int) and isinstance(second, int):
            return op(first, second)
        return self.call(op, first, second)

    def add_sizes(self, first: Any, second: Any) -> Any:
        """Return ``first + second``."""
        if isinstance(second, int) and second == 0:
            return first
        return self._size_op(operator.add, first, second)

    def sub_sizes(self, first: Any, second: Any) -> Any:
        """Return ``first - second``."""
        if isinstance(second, int) and second == 0:
            return first
        return self._size_op(operator.sub, first, second)

    def mul_sizes(self, first: Any, second: Any) -> Any:
        """Return ``first * second``."""
        if isinstance(second, int) and second == 1:
            return first
        if isinstance(first, int) and first == 1:
            return second
        return self._size_op(operator.mul, first, second)

    def floordiv_sizes(self, first: Any, second: int) -> Any:
        """Return ``first // second``."""
        if second == 1:
            return first
        return self._size_op(operator.floordiv, first, second)

    def min_sizes(self, first: Any, second: Any) -> Any:
        """Return the smaller size."""
        if isinstance(first, int) and isinstance(second, int):
            return min(first, second)
        return self.call(torch.sym_min, first, second)

    def own_size(self, size: Any) -> Any:
        """Return a size that shape checks know nothing of: of a difference of inputs, examples may be negative."""
        return size

    def max_sizes(self, first: Any, second: Any) -> Any:
        """Return the larger size."""
        if isinstance(first, int) and isinstance(second, int):
            return max(first, second)
        return self.call(torch.sym_max, first, second)

    # tensors: thin names over aten ------------------------------------------------------------------------------------

    def add(self, first: Any, second: Any) -> Any:
        """Elementwise sum."""
        return self.call(aten.add.Tensor, first, second)

    def sub(self, first: Any, second: Any) -> Any:
        """Elementwise difference."""
        return self.call(aten.sub.Tensor, first, second)

    def mul(self, first: Any, second: Any) -> Any:
        """Elementwise product."""
        return self.call(aten.mul.Tensor, first, second)

    def div(self, first: Any, second: Any) -> Any:
        """Elementwise quotient."""
        return self.call(aten.div.Tensor, first, second)

    def matmul(self, first: Any, second: Any) -> Any:
        """Batched matrix product."""
        return self.call(aten.matmul.default, first, second)

    def transpose(self, x: Any, first: int, second: int) -> Any:
        """Swap two axes."""
        return self.call(aten.transpose.int, x, first, second)

    def permute(self, x: Any, order: Sequence[int]) -> Any:
        """Reorder all axes."""
        return x if list(order) == list(range(len(order))) else self.call(aten.permute.default, x, list(order))

    def reshape(self, x: Any, shape: Sequence[Any]) -> Any:
        """Reshape to sizes (ints or size handles)."""
        return self.call(aten.reshape.default, x, list(shape))

    def expand(self, x: Any, shape: Sequence[Any]) -> Any:
        """Broadcast to sizes; -1 keeps an axis."""
        return self.call(aten.expand.default, x, list(shape))

    def unsqueeze(self, x: Any, axis: int) -> Any:
        """Insert an axis of size one."""
        return self.call(aten.unsqueeze.default, x, axis)

    def squeeze(self, x: Any, axis: int) -> Any:
        """Remove an axis of size one."""
        return self.call(aten.squeeze.dim, x, axis)

    def slice(self, x: Any, axis: int, start: Any = 0, stop: Any = None, step: int = 1) -> Any:
        """Slice one axis."""
        if isinstance(start, int) and start == 0 and stop is None and step == 1:
            return x
        end = torch.iinfo(torch.int64).max if stop is None else stop
        return self.call(aten.slice.Tensor, x, axis, start, end, step)

    def split(self, x: Any, axis: int, sizes: Sequence[Any]) -> list[Any]:
        """Cut an axis into parts of given sizes."""
        return self.parts(self.call(aten.split_with_sizes.default, x, list(sizes), axis), len(sizes))

    def parts(self, results: Any, count: int) -> list[Any]:
        """Take apart what an operation with several results returned."""
        return [self.call(operator.getitem, results, i) for i in range(count)]

    def cat(self, xs: Sequence[Any], axis: int) -> Any:
        """Concatenate along an axis."""
        return xs[0] if len(xs) == 1 else self.call(aten.cat.default, list(xs), axis)

    def cast(self, x: Any, dtype: torch.dtype) -> Any:
        """Convert the dtype; no node when it has it already."""
        return x if self.dtype(x) == dtype else self.call(aten._to_copy.default, x, dtype=dtype)

    def mean(self, x: Any, axis: int, keepdim: bool = False) -> Any:
        """Mean over one axis."""
        return self.call(aten.mean.dim, x, [axis], keepdim)

    def sum(self, x: Any, axis: int, keepdim: bool = False) -> Any:
        """Sum over one axis."""
        return self.call(aten.sum.dim_IntList, x, [axis], keepdim)

    def amax(self, x: Any, axis: int, keepdim: bool = False) -> Any:
        """Maximum over one axis."""
        return self.call(aten.amax.default, x, [axis], keepdim)

    def amin(self, x: Any, axis: int, keepdim: bool = False) -> Any:
        """Minimum over one axis."""
        return self.call(aten.amin.default, x, [axis], keepdim)

    def argmax(self, x: Any, axis: int, keepdim: bool = False) -> Any:
        """Index of the first maximum over one axis."""
        return self.call(aten.argmax.default, x, axis, keepdim)

    def softmax(self, x: Any, axis: int) -> Any:
        """Softmax over one axis."""
        return self.call(aten.softmax.int, x, axis)

    def sqrt(self, x: Any) -> Any:
        """Elementwise square root."""
        return self.call(aten.sqrt.default, x)

    def log(self, x: Any) -> Any:
        """Elementwise natural logarithm."""
        return self.call(aten.log.default, x)

    def exp(self, x: Any) -> Any:
        """Elementwise exponential."""
        return self.call(aten.exp.default, x)

    def clamp_min(self, x: Any, low: float) -> Any:
        """Elementwise lower bound."""
        return self.call(aten.clamp_min.default, x, low)

    def where(self, condition: Any, first: Any, second: Any) -> Any:
        """Elementwise choice; a Python number may stand on either side."""
        if isinstance(first, int | float) and isinstance(second, int | float):
            return self.call(aten.where.Scalar, condition, first, second)
        if isinstance(first, int | float):
            return self.call(aten.where.ScalarSelf, condition, first, second)
        if isinstance(second, int | float):
            return self.call(aten.where.ScalarOther, condition, first, second)
        return self.call(aten.where.self, condition, first, second)

    def compare(self, op: str, first: Any, second: Any) -> Any:
        """Elementwise comparison: ``eq``, ``ne``, ``lt``, ``le``, ``gt``, ``ge``; the right side may be a number."""
        packet = getattr(aten, op)
        scalar = isinstance(second, int | float)
        return self.call(packet.Scalar if scalar else packet.Tensor, first, second)

    def logical_and(self, first: Any, second: Any) -> Any:
        """Elementwise conjunction of bools."""
        return self.call(aten.logical_and.default, first, second)

    def logical_or(self, first: Any, second: Any) -> Any:
        """Elementwise disjunction of bools."""
        return self.call(aten.logical_or.default, first, second)

    def logical_not(self, x: Any) -> Any:
        """Elementwise negation of bools."""
        return self.call(aten.logical_not.default, x)

    def gather(self, x: Any, axis: int, index: Any) -> Any:
        """``torch.gather``; meant for small ``[B, K]`` index tensors."""
        return self.call(aten.gather.default, x, axis, index)

    def look_up(self, table: Any, index: Any) -> Any:
        """Take entries of a 1-D table; the result has the shape of ``index``."""
        return self.call(aten.index.Tensor, table, [index])

    def scatter(self, x: Any, axis: int, index: Any, source: Any) -> Any:
        """Out-of-place ``scatter`` without reduction; indices must be unique."""
        return self.call(aten.scatter.src, x, axis, index, source)

    def arange(self, stop: Any, like: Any, *, start: Any = 0, step: int = 1) -> Any:
        """int64 ``start, start + step, ...`` below ``stop``, on the device of ``like``."""
        return self.call(aten.arange.start_step, start, stop, step, dtype=torch.int64, device=self.device(like))

    def full(self, shape: Sequence[Any], value: float | bool, dtype: torch.dtype, like: Any) -> Any:
        """Constant tensor on the device of ``like``."""
        return self.call(aten.full.default, list(shape), value, dtype=dtype, device=self.device(like))


class EagerBuilder(Builder):
    """Calls the operations on real tensors.

    Args:
        inputs: Values of inputs that reductions add, by name.
    """

    def __init__(self, inputs: Mapping[str, torch.Tensor] | None = None) -> None:
        self.inputs = dict(inputs or {})

    def call(self, target: Any, *args: Any, like: fx.Node | None = None, **kwargs: Any) -> Any:
        """Call the operation; ``like`` means nothing here."""
        del like
        return target(*args, **kwargs)

    def shape(self, handle: Any) -> tuple[Any, ...]:
        """Return the sizes as ints."""
        return tuple(handle.shape)

    def size(self, handle: Any, axis: int) -> Any:
        """Return one size as an int."""
        return int(handle.shape[axis])

    def dtype(self, handle: Any) -> torch.dtype:
        """Return the dtype."""
        return handle.dtype  # type: ignore[no-any-return]  # a tensor's dtype

    def device(self, handle: Any) -> torch.device:
        """Return the device."""
        return handle.device  # type: ignore[no-any-return]  # a tensor's device

    def constant(self, name: str, tensor: torch.Tensor) -> Any:
        """Return the tensor itself."""
        del name
        return tensor

    def input(
        self, name: str, shape: Sequence[Any], dtype: torch.dtype, device: torch.device, *, least: int = 0
    ) -> Any:
        """Return the value that was given."""
        del least
        if name not in self.inputs:
            raise UsageError(f"the input `{name}` is missing", found=", ".join(self.inputs) or "no further inputs")
        value = self.inputs[name].to(device)
        sizes = {size: value.shape[axis] for axis, size in enumerate(shape) if isinstance(size, str)}
        wanted = [sizes.get(size, size) for size in shape] if value.ndim == len(shape) else list(shape)
        if list(value.shape) != wanted or value.dtype != dtype:
            raise UsageError(f"the input `{name}` does not fit", needed=f"{dtype} {wanted}",
                             found=f"{value.dtype} {list(value.shape)}")  # fmt: skip
        return value


class GraphBuilder(Builder):
    """Appends nodes to a new graph and evaluates their fakes in the program's own fake mode.

    Args:
        fake_mode: The mode (and shape environment) of the program that is rebuilt.
    """

    def __init__(self, fake_mode: FakeTensorMode) -> None:
        self.graph = fx.Graph()
        self.fake_mode = fake_mode
        self.scope: fx.Node | None = None
        self.inputs = SizeWatch(fake_mode.shape_env)
        self.constants: dict[str, torch.Tensor] = {}
        self.constant_nodes: list[fx.Node] = []
        self.definitions: dict[sympy.Symbol, sympy.Expr] = {}
        self._symbols: dict[sympy.Expr, torch.SymInt] = {}
        self._label: str | None = None
        self._made = 0
        self.new_inputs: dict[str, fx.Node] = {}
        self.size_names: dict[sympy.Symbol, str] = {}
        self._named: dict[str, Any] = {}
        self._sizes: dict[tuple[fx.Node, int], fx.Node] = {}
        self._cse: dict[Any, fx.Node] = {}

    def call(self, target: Any, *args: Any, like: fx.Node | None = None, **kwargs: Any) -> Any:
        """Append a node.

        Args:
            target: The operation.
            args: Handles, numbers and lists of them.
            like: An old node that this one copies with operands of unchanged shape: its name and fake are reused.
            kwargs: Keyword arguments.
        """
        key = None
        if like is None:
            key = _key(target, args, kwargs)
            if key is not None and key in self._cse:
                return self._cse[key]
        own = self.scope if self._label is None else None
        if like is not None:
            name = like.name
        elif own is not None and own.target is target:
            name = own.name
        else:
            name = self._name(target)
        node = self.graph.create_node("call_function", target, args, kwargs, name=name)
        source = like or self.scope
        if source is not None:
            node.meta = {k: v for k, v in source.meta.items() if k in ("nn_module_stack", "stack_trace", "torch_fn")}
        if self.scope is not None:
            node.meta["origin"] = self.scope.meta.get("origin", self.scope.name)
            if "tokcc" in self.scope.meta:
                node.meta["tokcc"] = self.scope.meta["tokcc"]
        if self._label is not None:
            node.meta["tokcc"] = self._label
        if like is not None:
            node.meta["val"] = like.meta.get("val")
        else:
            self.evaluate(node)
        if key is not None:
            self._cse[key] = node
        return node

    def evaluate(self, node: fx.Node) -> None:
        """Compute the fake of a call from the fakes of its operands."""
        found: Any = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        args, kwargs = found
        with self.fake_mode, torch.no_grad(), size_oblivious():
            value: Any = fake_result(node.target, args)
            if value is None:
                value = node.target(*args, **kwargs)  # type: ignore[operator]  # a call_function's target is callable
            node.meta["val"] = self._renamed(value, self._example(node.target))
            if node.target is aten.slice.Tensor:
                self._define_slice(node.meta["val"], *args)
        self.inputs.after(node)

    def _define_slice(
        self, result: torch.Tensor, source: torch.Tensor, axis: int, start: Any = 0, end: Any = _END, step: int = 1
    ) -> None:
        """Keep how long a slice is where torch says nothing: it cannot prove that its ends count from the front."""
        size: Any = result.shape[axis]
        if isinstance(size, int) or not free_unbacked_symbols(size) or not (_in_front(start) and _in_front(end)):
            return
        whole: Any = source.shape[axis]
        smaller: Any = torch.sym_min
        larger: Any = torch.sym_max
        to = whole if isinstance(end, int) and end == _END else smaller(end, whole)
        length = (larger(to - start, 0) + step - 1) // step
        self.definitions.setdefault(size.node.expr, length.node.expr)

    def _example(self, target: Any) -> int | None:
        """Return an example of the sizes that an operation makes; None = what the example's sizes give."""
        return 67 + 10 * len(self._symbols) if counts_blocks(target) else None

    def _renamed(self, value: Any, example: int | None) -> Any:
        """Replace every size that is more than a difference by a symbol of its own."""
        if isinstance(value, torch.SymInt):
            return self._symbol_for(value, example)
        if isinstance(value, list | tuple):
            return type(value)(self._renamed(item, example) for item in value)
        if not isinstance(value, torch.Tensor) or not any(_compound(size) for size in value.shape):
            return value
        sizes = [self._symbol_for(size, example) for size in value.shape]
        with self.fake_mode:
            return torch.empty(sizes, dtype=value.dtype, device=value.device)

    def _symbol_for(self, size: Any, example: int | None) -> Any:
        """Give a compound size its own symbol.

        A schedule over many layers nests minima and divisions; carried along as one expression, every shape check would
        take longer than the one before. The definition is kept for whoever needs the number.
        """
        shape_env = self.fake_mode.shape_env
        if not _compound(size) or shape_env is None or size.node.hint is None:
            return size
        expression = size.node.expr
        if expression not in self._symbols:
            made = self.free_size(int(size.node.hint) if example is None else example)
            if not isinstance(made, torch.SymInt):
                return size
            self._symbols[expression] = made
            self.definitions[made.node.expr] = expression
        return self._symbols[expression]

    def mark_prefix(self, reduced: fx.Node, source: fx.Node, rows: int) -> None:
        """Record it for demand slicing, which may then read the rows from the stream before."""
        reduced.meta["tokcc_prefix"] = (source.name, rows)

    def _name(self, target: Any) -> str:
        packet = getattr(target, "_schema", None)
        base = packet.name.split("::")[1] if packet is not None else getattr(target, "__name__", "call")
        return f"tokcc_{base}" if self._label is not None else str(base)

    @contextmanager
    def inserting(self, label: str) -> Iterator[None]:
        """Name the step on every node emitted inside."""
        previous, self._label = self._label, label
        try:
            yield
        finally:
            self._label = previous

    def placeholder(self, old: fx.Node) -> fx.Node:
        """Copy a placeholder."""
        node = self.graph.create_node("placeholder", old.target, old.args, name=old.name)
        node.meta = dict(old.meta)
        if isinstance(old.meta.get("val"), torch.Tensor):
            self.inputs.watch(old.name, old.meta["val"].shape)
        return node

    def input(
        self, name: str, shape: Sequence[Any], dtype: torch.dtype, device: torch.device, *, least: int = 0
    ) -> Any:
        """Add an input behind the program's own, or return the one that was added."""
        if name not in self.new_inputs:
            sizes = [self._named_size(size) if isinstance(size, str) else _plain(size) for size in shape]
            last = next(n for n in reversed(self.graph.nodes) if n.op == "placeholder")
            with self.graph.inserting_after(last):
                node = self.graph.create_node("placeholder", name, name=name)
            node.target = node.name  # another node may have the name
            with self.fake_mode:
                node.meta["val"] = torch.empty(sizes, dtype=dtype, device=device)
            self.inputs.watch(name, sizes, least)
            self.new_inputs[name] = node
        return self.new_inputs[name]

    def _named_size(self, name: str) -> Any:
        """Return the size of one name; no two have equal hints, and none one of which arithmetic makes 0 or 1."""
        if name not in self._named:
            self._named[name] = size = self.free_size(211 + 97 * len(self._named))
            if isinstance(size, torch.SymInt):
                self.size_names[size.node.expr] = name
        return self._named[name]

    def own_size(self, size: Any) -> Any:
        """Return the size with a symbol of its own, whose example is a possible length; see the base class."""
        known = size.meta["val"] if isinstance(size, fx.Node) else size
        if not isinstance(known, torch.SymInt):
            return size
        made = self.free_size(1009 + 97 * len(self.definitions))
        self.definitions[made.node.expr] = known.node.expr
        size.meta["val"] = made
        return size

    def free_size(self, hint: int) -> Any:
        """Return a new symbolic size for an axis of an input."""
        shape_env = self.fake_mode.shape_env
        if shape_env is None:
            return hint
        self._made += 1
        return free_size(shape_env, hint, self._made)

    def shape(self, handle: Any) -> tuple[Any, ...]:
        """Return the sizes of the fake."""
        return tuple(handle.meta["val"].shape)

    def size(self, handle: Any, axis: int) -> Any:
        """Return one size: an int, or a node, made once, that reads it."""
        size = handle.meta["val"].shape[axis]
        if isinstance(size, int):
            return size
        axis %= len(handle.meta["val"].shape)
        if (handle, axis) not in self._sizes:
            self._sizes[handle, axis] = self.call(aten.sym_size.int, handle, axis)
        return self._sizes[handle, axis]

    def dtype(self, handle: Any) -> torch.dtype:
        """Return the dtype of the fake."""
        return handle.meta["val"].dtype  # type: ignore[no-any-return]  # a fake tensor's dtype

    def device(self, handle: Any) -> torch.device:
        """Return the device of the fake."""
        return handle.meta["val"].device  # type: ignore[no-any-return]  # a fake tensor's device

    def constant(self, name: str, tensor: torch.Tensor) -> Any:
        """Lift a constant: recorded here, added to the program's signature when the graph is finished."""
        for node in self.constant_nodes:
            known = self.constants[str(node.target)]
            if known.shape == tensor.shape and known.dtype == tensor.dtype and torch.equal(known, tensor):
                return node
        unique, count = name, 0
        while unique in self.constants:
            count += 1
            unique = f"{name}_{count}"
        last = next((n for n in reversed(self.graph.nodes) if n.op == "placeholder"), None)
        first = next(iter(self.graph.nodes))
        with self.graph.inserting_after(last) if last is not None else self.graph.inserting_before(first):
            node = self.graph.create_node("placeholder", unique, name=unique)
        node.meta["val"] = self.fake_mode.from_tensor(tensor, static_shapes=True)
        self.constants[unique] = tensor
        self.constant_nodes.append(node)
        return node


def _plain(size: Any) -> Any:
    """Return the number or symbol behind a size handle."""
    return size.meta["val"] if isinstance(size, fx.Node) else size


def _in_front(place: Any) -> bool:
    """Whether a place of a slice counts from the front, as its example does."""
    if not isinstance(place, torch.SymInt):
        return isinstance(place, int) and place >= 0
    return place.node.hint is not None and bool(place.node.hint >= 0)


def _compound(size: Any) -> bool:
    """Return True for a symbolic size that is more than a symbol plus or times a number."""
    if isinstance(size, int):
        return False
    expression = size.node.expr
    if any(
        type(part).__name__ in ("FloorDiv", "CleanDiv", "Min", "Max", "Mod")
        for part in sympy.preorder_traversal(expression)
    ):
        return True
    return isinstance(expression, sympy.Add) and len(expression.free_symbols) > 1


def _key(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return a hashable key of a pure call, so that equal calls share one node; None where it cannot be hashed."""

    def freeze(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return (type(value).__name__, *(freeze(item) for item in value))
        # 1, 1.0 and True are equal but not the same argument.
        return (type(value).__name__, value)

    key = (target, freeze(args), tuple(sorted((name, freeze(value)) for name, value in kwargs.items())))
    try:
        hash(key)
    except TypeError:
        return None
    return key
