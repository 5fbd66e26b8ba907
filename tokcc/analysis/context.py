"""What an axis rule works with: the builder, the spaces, and the operations that move values between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import fx

from tokcc.analysis.remapping import move, product
from tokcc.analysis.sequences import flipped_index
from tokcc.errors import AxisError
from tokcc.ir.builder import Builder, same_size
from tokcc.ir.space import Axis, Factor, TokenSpace, common_descendant, is_ancestor
from tokcc.ir.value import Value

__all__ = ["Context", "Group", "describe_shape"]

aten = torch.ops.aten
Group = list[tuple[int, int]]
"""Axes that must agree: pairs of (operand, axis)."""


def describe_shape(shape: Sequence[Any]) -> str:
    """Return ``[B, 65, 64]`` for messages."""
    return "[" + ", ".join(str(size) for size in shape) + "]"


@dataclass
class Context:
    """The state of one walk over a program, as rules see it.

    Attributes:
        builder: Emits operations.
        node: The old node in work.
        clean: True when no operand is in a reduced space: the node is copied and only its axes are derived.
        original: The mapped arguments of the old node, for copying.
        recompute: Evaluates an old side-tensor node again in a reduced space; set by the walk.
        old_size: Returns a size of the unreduced graph; set by the walk, which knows what symbols stand for.
    """

    builder: Builder
    node: fx.Node | None = None
    clean: bool = True
    original: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
    recompute: Callable[[Any, TokenSpace], Any] | None = None
    old_size: Callable[[Any], Any] = lambda size: size
    _index: dict[tuple[TokenSpace, TokenSpace], Any] = field(default_factory=dict)
    _remapped: dict[Any, Any] = field(default_factory=dict)

    # messages ---------------------------------------------------------------------------------------------------------

    def fail(self, what: str, *, needed: str | None = None, help: str | None = None) -> NoReturn:
        """Raise an :class:`AxisError` that names the node in work."""
        raise AxisError(
            what,
            node=self.describe(),
            needed=needed,
            help=help
            or "add `restore: unmerge` (merge) or `restore: scatter` (prune) to the step, or choose other layers "
            "(`tokcc inspect MODEL` lists them)",
        )

    def describe(self) -> str:
        """Return the node's name, module path and shapes."""
        node = self.node
        if node is None:
            return "-"
        stack = node.meta.get("nn_module_stack") or {}
        path = next((str(entry[0]) for entry in reversed(list(stack.values())) if entry[0]), "")
        shapes = [describe_shape(n.meta["val"].shape) for n in node.all_input_nodes if _is_tensor(n)]
        out = describe_shape(node.meta["val"].shape) if _is_tensor(node) else "?"
        name = getattr(node.target, "__name__", str(node.target))
        return f"{node.name} ({path or name}): {', '.join(shapes) or '-'} -> {out}  [{name}]"

    # emission ---------------------------------------------------------------------------------------------------------

    def emit(self, *args: Any, **kwargs: Any) -> Any:
        """Emit the node in work with new arguments, or copy it where nothing it reads is reduced."""
        assert self.node is not None
        if self.clean:
            args, kwargs = self.original
            return self.builder.call(self.node.target, *args, like=self.node, **kwargs)
        return self.builder.call(self.node.target, *args, **kwargs)

    def old_shape(self) -> tuple[Any, ...]:
        """Return the shape of the node in work in the unreduced graph."""
        assert self.node is not None
        return self.old_sizes(self.node.meta["val"])

    def old_sizes(self, tensor: Any) -> tuple[Any, ...]:
        """Return the sizes of a fake tensor of the unreduced graph."""
        return tuple(self.old_size(size) for size in tensor.shape)

    # sizes ------------------------------------------------------------------------------------------------------------

    def factor_size(self, factor: Factor) -> Any:
        """Return a factor's current size as an argument."""
        if factor.space is not None:
            return factor.space.size
        if isinstance(factor.old, int):
            return factor.old
        self.fail(
            f"the size {factor.old} of an axis without tokens is not known in the reduced graph",
            help="make that dimension static",
        )

    def axis_size(self, axis: Axis) -> Any:
        """Return the product of a fused axis's current sizes."""
        size: Any = 1
        for factor in axis:
            size = self.builder.mul_sizes(size, self.factor_size(factor))
        return size

    def value_size(self, value: Value, axis: int) -> Any:
        """Return the current size of one axis of a value as an argument."""
        return self.builder.size(value.handle, axis)

    # moving between spaces --------------------------------------------------------------------------------------------

    def index_between(self, source: TokenSpace, target: TokenSpace) -> Any:
        """Return positions in ``source`` of each token of ``target``: int64 ``[B, K]`` or ``[K]``."""
        key = (source, target)
        if key in self._index:
            return self._index[key]
        assert target.parent is not None
        index = self.own_index(target)
        if target.parent is not source:
            index = self._compose(self.index_between(source, target.parent), index)
        self._index[key] = index
        return index

    def own_index(self, space: TokenSpace) -> Any:
        """Return a space's index into its parent, making it where the space is derived."""
        b = self.builder
        if space.index is None and space.tail_of is not None:
            whole, first = space.tail_of
            inner = self.own_index(whole)
            axis = len(b.shape(inner)) - 1
            space.index = b.sub(b.slice(inner, axis, first), first)
        if space.index is None and space.rows is not None:
            space.index = self._row_index(space, space.rows)
        if space.index is None and space.flip_of is not None:
            space.index = flipped_index(self, space.flip_of)
        if space.around is not None:
            self.fail("a table over tokens with padding around them meets fewer tokens")
        return space.index

    def _row_index(self, space: TokenSpace, rows: Sequence[int]) -> Any:
        """Return a fixed row list as positions; rows from the end of a symbolic length are computed."""
        b = self.builder
        assert space.parent is not None
        index = b.constant("tokcc_rows", torch.tensor(rows, dtype=torch.int64))
        if min(rows) >= 0:
            return index
        from_end = b.constant("tokcc_from_end", torch.tensor([int(row < 0) for row in rows], dtype=torch.int64))
        return b.add(index, b.mul(from_end, space.parent.size))

    def _compose(self, outer: Any, inner: Any) -> Any:
        b = self.builder
        outer_rank, inner_rank = len(b.shape(outer)), len(b.shape(inner))
        if outer_rank == 2 and inner_rank == 2:
            return b.gather(outer, 1, inner)
        if inner_rank == 1:
            return b.call(aten.index_select.default, outer, outer_rank - 1, inner)
        return b.call(aten.index.Tensor, outer, [inner])

    def tail(self, space: TokenSpace, first: int) -> TokenSpace:
        """Return the sub-space of all tokens but the ``first`` ones, which must be protected."""
        if first == 0:
            return space
        if first not in space.tails:
            parent = None if space.parent is None else self.tail(space.parent, first)
            b = self.builder
            cut = None if space.weight is None else b.slice(space.weight, 1, first)
            mask = None if space.valid is None else b.slice(space.valid, 1, first)
            space.tails[first] = TokenSpace(
                name=f"{space.name}[{first}:]",
                size=b.sub_sizes(space.size, first),
                old=space.old - first,
                parent=parent,
                weight=cut,
                valid=mask,
                bias=space.bias,
                ascending=space.ascending,
                prefix=max(0, space.prefix - first),
                suffix=space.suffix,
                step=space.step,
                restore=space.restore,
                tail_of=(space, first),
            )
        return space.tails[first]

    def remap(
        self, value: Value, axis: int, position: int, target: TokenSpace, batch: tuple[int, Axis] | None
    ) -> Value:
        """Bring one factor of one axis of a value down to a space below its own.

        Args:
            value: The value; an untagged factor is taken to be in the root space.
            axis: Which axis.
            position: Which factor of it.
            target: The space to go to.
            batch: For a value without a batch axis: the axis (of size one in the value) where the batch stands, and
                that axis's factors.
        """
        factor = value.axes[axis][position]
        source = factor.space or target.root
        if source is target:
            axes = _with_factor(value.axes, axis, position, Factor(target, target.root.old, factor.normalised))
            return value.having(axes=axes)
        if not is_ancestor(source, target):
            self.fail(f"tokens of {source!r} meet tokens of {target!r}, which was not made from them")
        if factor.normalised:
            self.fail("attention probabilities over all tokens would lose their sum if tokens were dropped from them")
        # Layers that share a mask share its gather. The handle is kept beside the result, so its id stays taken.
        spaces = tuple(tuple(f.space for f in a) for a in value.axes)
        key = (id(value.handle), spaces, axis, position, target, None if batch is None else batch[0])
        if key not in self._remapped:
            self._remapped[key] = (value.handle, move(self, value, axis, position, source, target, batch))
        return self._remapped[key][1]  # type: ignore[no-any-return]  # a Value, stored above

    # agreement of operands --------------------------------------------------------------------------------------------

    def align(self, values: Sequence[Value], groups: Sequence[Group]) -> tuple[list[Value], list[Axis]]:
        """Bring operands whose axes must agree into common spaces.

        Args:
            values: The operands.
            groups: For each joint axis, the (operand, axis) pairs that must agree; size-one axes broadcast.

        Returns:
            The operands after remaps, and the joint axis of each group.
        """
        joints = [self._joint(values, group) for group in groups]
        batch_group = next(
            (i for i, joint in enumerate(joints) if any(f.space is not None and f.space.is_batch for f in joint)), None
        )
        aligned: list[Value] = []
        for operand, value in enumerate(values):
            own = [
                (axis, joint)
                for group, joint in zip(groups, joints, strict=True)
                for op, axis in group
                if op == operand
            ]
            batch: tuple[int, Axis] | None = None
            if batch_group is not None:
                where = next((axis for op, axis in groups[batch_group] if op == operand), None)
                batch = None if where is None else (where, joints[batch_group])
            # All axes are claimed before any is moved: a remap must know where the value has its batch axis.
            for axis, joint in own:
                value = self._claim(value, axis, joint)
            for axis, joint in own:
                value = self._bring(value, axis, joint, batch)
            aligned.append(value)
        return aligned, joints

    def _claim(self, value: Value, axis: int, joint: Axis) -> Value:
        """Tag an untagged axis beside a tagged one: it was aligned with it in the unreduced graph."""
        own = value.axes[axis]
        if not own or not any(f.space for f in joint) or any(f.space for f in own):
            return value
        root = tuple(Factor(f.space.root if f.space is not None else None, f.old) for f in joint)
        return value.having(axes=(*value.axes[:axis], root, *value.axes[axis + 1 :]))

    def _bring(self, value: Value, axis: int, joint: Axis, batch: tuple[int, Axis] | None) -> Value:
        """Bring one axis down to the joint axis of all operands."""
        if not value.axes[axis]:
            return value
        for position, factor in enumerate(joint):
            if factor.space is not None and value.axes[axis][position].space is not factor.space:
                value = self.remap(value, axis, position, factor.space, batch)
        return value

    def _joint(self, values: Sequence[Value], group: Group) -> Axis:
        wide = [values[op].axes[axis] for op, axis in group if values[op].axes[axis]]
        if not wide:
            return ()
        tagged = [axis for axis in wide if any(f.space is not None for f in axis)]
        if not tagged:
            return wide[0]
        joint = list(tagged[0])
        for other in tagged[1:]:
            if len(other) != len(joint):
                self.fail("two operands fuse the token axis in different ways")
            for i, (mine, theirs) in enumerate(zip(joint, other, strict=True)):
                joint[i] = Factor(self._lower(mine, theirs), mine.old)
        for axis in wide:
            if axis not in tagged:
                size = product(f.old for f in axis)
                root = product(f.space.root.old if f.space is not None else f.old for f in joint)
                if not same_size(size, root):
                    self.fail(f"an operand of size {size} meets a token axis of size {root}")
        return tuple(Factor(f.space, f.old) for f in joint)

    def _lower(self, first: Factor, second: Factor) -> TokenSpace | None:
        if first.space is None or second.space is None:
            return first.space or second.space
        lower = common_descendant(first.space, second.space)
        if lower is None:
            self.fail(f"tokens of {first.space!r} meet tokens of {second.space!r}: neither was made from the other")
        return lower

    def broadcast(self, values: Sequence[Value]) -> tuple[list[Value], tuple[Axis, ...], tuple[Any, ...]]:
        """Align operands of a broadcasting operation.

        Returns:
            The operands after remaps, the axes of the result and its old shape.
        """
        rank = max(value.rank for value in values)
        if not self.clean:
            values = [self.pad_rank(value, rank) if value.side and value.rank else value for value in values]
        groups: list[Group] = []
        old: list[Any] = []
        for p in range(-rank, 0):
            group = [(i, v.rank + p) for i, v in enumerate(values) if v.rank + p >= 0]
            groups.append(group)
            sizes = [values[i].old[axis] for i, axis in group]
            old.append(next((s for s in sizes if not (isinstance(s, int) and s == 1)), 1))
        aligned, joints = self.align(values, groups)
        return aligned, tuple(joints), tuple(old)

    def pad_rank(self, value: Value, rank: int) -> Value:
        """Add leading axes of size one."""
        while value.rank < rank:
            handle = self.builder.unsqueeze(value.handle, 0)
            value = value.having(handle=handle, axes=((), *value.axes), old=(1, *value.old))
        return value

    def as_rows(self, value: Value, axis: int, change: Callable[[Any], Any]) -> Any:
        """Apply a change of ``[B, N, C]`` to a value in any layout, and return the new handle in that layout.

        Args:
            value: The value.
            axis: Its token axis.
            change: Takes and returns ``[B, tokens, C]``; the number of tokens may change.
        """
        b = self.builder
        where = value.batch_axis()
        if where is None:
            self.fail("a value without a batch axis meets merged tokens")
        front = [where, axis, *(i for i in range(value.rank) if i not in (where, axis))]
        x = b.permute(value.handle, front)
        rest = [b.size(x, i) for i in range(2, value.rank)]
        flat = b.reshape(x, [b.size(x, 0), b.size(x, 1), -1]) if value.rank != 3 else x
        changed = change(flat)
        if value.rank != 3:
            changed = b.reshape(changed, [b.size(changed, 0), b.size(changed, 1), *rest])
        return b.permute(changed, [front.index(i) for i in range(value.rank)])

    def per_token(self, rows: Any, axes: Sequence[Axis], axis: int) -> Any:
        """Shape a number per token ``[B, K]`` so that it broadcasts against a value.

        Args:
            rows: The numbers.
            axes: Axes of the value.
            axis: Its token axis.
        """
        b = self.builder
        where = next((i for i, a in enumerate(axes) if any(f.space is not None and f.space.is_batch for f in a)), None)
        if where is None or where == axis or len(axes[axis]) > 1:
            self.fail("tokens count differently here, and the layout does not tell which sample they belong to")
        factors = axes[where]
        if len(factors) > 1:
            place = next(i for i, f in enumerate(factors) if f.space is not None and f.space.is_batch)
            for i in range(len(factors)):
                if i != place:
                    rows = b.unsqueeze(rows, i)
            rows = b.expand(rows, [*(self.factor_size(f) for f in factors), -1])
            rows = b.reshape(rows, [self.axis_size(factors), self.axis_size(axes[axis])])
        if where > axis:
            rows = b.transpose(rows, 0, 1)
        for i in range(len(axes)):
            if i not in (where, axis):
                rows = b.unsqueeze(rows, i)
        return rows


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _with_factor(axes: tuple[Axis, ...], axis: int, position: int, factor: Factor) -> tuple[Axis, ...]:
    own = axes[axis]
    changed = (*own[:position], factor, *own[position + 1 :])
    return (*axes[:axis], changed, *axes[axis + 1 :])
