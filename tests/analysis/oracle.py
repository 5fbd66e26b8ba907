"""The oracle of the axis rules: a small function, traced, walked with a reduction, against plain Python.

The reference knows nothing of tags. It takes the tokens that a reduction left, repeats each merged one as often as it
stands for tokens, and calls *the same function* on one sample after the other: dropped tokens are simply not there, and
a merged token counts as often as it should. Where the operation commutes with a gather, the second reference is the
function on all tokens, gathered afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from tests.analysis.layouts import HEADS, parse, sample, spread
from tokcc.analysis.walk import Entry, Walk
from tokcc.ir.builder import Builder, EagerBuilder, GraphBuilder
from tokcc.ir.program import Program
from tokcc.ir.space import Factor, TokenSpace
from tokcc.ir.value import Value
from tokcc.passes.cut import Cut, Kept, Matched
from tokcc.passes.reducers.drop import Drop
from tokcc.passes.reducers.weighted_mean import WeightedMean

__all__ = ["Case", "Kind", "Reduce", "Side", "check", "make_program", "walk_eager", "walk_graph"]

aten = torch.ops.aten
Kind = Literal["drop", "shared", "padded", "merge"]
PREFIX = 2


@dataclass(frozen=True)
class Side:
    """A side operand: a table, a mask, a weight.

    Attributes:
        layout: Its axes, for instance ``"b 1 n n"``.
        kind: Random floats, weights (the same, scaled down), random bools with a true diagonal, the same as an additive
            mask, 0/1 counts, or sorted indices into a table of eight rows.
        shape: Sizes of axes that are neither batch, tokens, heads nor numbers.
    """

    layout: str
    kind: Literal["float", "weight", "bool", "additive", "count", "index"] = "float"
    shape: tuple[tuple[str, int], ...] = (("c", 8), ("d", 4), ("e", 6))

    def make(self, batch: int, tokens: int, generator: torch.Generator) -> Tensor:
        """Make a random one."""
        sizes = {"b": batch, "n": tokens, "h": HEADS, **dict(self.shape)}
        shape = [
            torch.Size([int(letter) if letter.isdigit() else sizes[letter] for letter in axis]).numel()
            for axis in parse(self.layout)
        ]
        t = torch.randn(shape, generator=generator)
        if self.kind == "float":
            return t
        if self.kind == "weight":
            return t / 3
        if self.kind == "index":
            return torch.randint(0, 8, shape, generator=generator)
        flags = t > -0.3
        if self.layout.endswith("n n"):
            flags |= torch.eye(tokens, dtype=torch.bool)
        else:
            # Protected tokens are always there, so that no row is left without a key.
            flags.movedim(parse(self.layout).index(("n",)), -1)[..., :PREFIX] = True
        if self.kind == "additive":
            return torch.zeros(shape).masked_fill(~flags, -torch.inf)
        return flags if self.kind == "bool" else flags.float()


@dataclass(frozen=True)
class Case:
    """One function under test.

    Attributes:
        name: For messages.
        fn: Takes ``x [B, N, C]`` (or ``[N, B, C]``) and the sides by name, and returns a tensor or a tuple. It must
            read sizes from its arguments, since the reference calls it on fewer tokens.
        out: Axes of each output.
        sides: Side operands.
        commutes: True when the function on all tokens, gathered, must give the same.
        layout: Axes of ``x``.
        kinds: Which reductions make sense; a tuple of tuples, each applied one after the other at the entry.
        tagged: Check the axes that the rules derived against ``out``.
        dynamic: Checked with symbolic batch and tokens as well.
    """

    name: str
    fn: Callable[..., Any]
    out: tuple[str, ...]
    sides: dict[str, Side] = field(default_factory=dict)
    commutes: bool = True
    layout: str = "b n c"
    kinds: tuple[tuple[Kind, ...], ...] = (("drop",), ("merge",))
    tagged: bool = True
    dynamic: bool = False


@dataclass
class Reduce:
    """A reduction with random, per-sample choices, made by the real reducers.

    Attributes:
        kind: What to do.
        handles: Filled by the walk: keep index, then source and slot of a merge, or the valid slots; and the stream.
        restore: The step's restore.
        spaces: Filled by the walk.
    """

    kind: Kind
    restore: str = "none"
    handles: dict[str, Any] = field(default_factory=dict)
    spaces: list[TokenSpace] = field(default_factory=list)

    def apply(self, walk: Walk, node: fx.Node, value: Value) -> Value:
        """Reduce the entry."""
        del node
        b = walk.builder
        axis = next(i for i, a in enumerate(value.axes) if any(f.space and not f.space.is_batch for f in a))
        space = value.axes[axis][0].space
        assert space is not None
        assert walk.batch is not None
        x = value.handle if axis == 1 else b.transpose(value.handle, 0, 1)
        missing: Any = None
        cut = Cut(walk.ctx, x, space, walk.batch, 0, 1, missing, PREFIX, 0, 0, missing)
        child = TokenSpace(f"tokens/{self.kind}", None, space.root.old, space, prefix=PREFIX, restore=self.restore)
        if self.kind == "merge":
            reduced = WeightedMean().reduce(cut, self._match(cut, b), child)
        else:
            reduced = Drop().reduce(cut, self._choose(cut, b), child)
        self.handles["x"] = reduced
        self.spaces.append(child)
        axes = list(value.axes)
        axes[axis] = (Factor(child, space.root.old),)
        handle = reduced if axis == 1 else b.transpose(reduced, 0, 1)
        return value.having(handle=handle, axes=tuple(axes))

    def _order(self, cut: Cut, b: Builder, k: Any, *, in_order: bool) -> Any:
        score = cut.inner(b.mean(cut.x, 2))
        return b.call(torch.ops.tokcc.topk_select.default, score, k, in_order)

    def _choose(self, cut: Cut, b: Builder) -> Kept:
        if self.kind == "shared":
            rest = b.slice(b.arange(cut.tokens, cut.x), 0, PREFIX, None, 2)
            index = b.cat([b.arange(PREFIX, cut.x), rest], 0)
            self.handles["keep"] = index
            return Kept(index, None, True, b.size(index, 0))
        kept = b.floordiv_sizes(b.mul_sizes(cut.candidates, 2), 3)
        index = cut.with_protected(self._order(cut, b, kept, in_order=True))
        self.handles["keep"] = index
        valid = None
        if self.kind == "padded":
            score = b.gather(b.mean(cut.x, 2), 1, index)
            slots = b.expand(b.arange(b.add_sizes(kept, PREFIX), cut.x), [cut.batch.size, -1])
            some = b.compare("gt", score, -0.1)
            valid = b.call(aten.logical_or.default, some, b.compare("lt", slots, PREFIX))
            self.handles["valid"] = valid
        return Kept(index, valid, True, b.add_sizes(kept, PREFIX))

    def _match(self, cut: Cut, b: Builder) -> Matched:
        kept = b.floordiv_sizes(b.mul_sizes(cut.candidates, 2), 3)
        gone = b.sub_sizes(cut.candidates, kept)
        order = b.add(self._order(cut, b, cut.candidates, in_order=False), PREFIX)
        keep = b.cat([cut.per_sample(b.arange(PREFIX, cut.x)), b.slice(order, 1, 0, kept)], 1)
        source = b.slice(order, 1, kept)
        halves = b.call(aten.div.Tensor_mode, b.arange(gone, cut.x), 2, rounding_mode="floor")
        slot = cut.per_sample(b.add(halves, PREFIX))
        self.handles.update(keep=keep, source=source, slot=slot)
        return Matched(keep, source, cut.per_sample(halves), PREFIX, b.add_sizes(kept, PREFIX))


# tracing --------------------------------------------------------------------------------------------------------------


def make_program(
    fn: Callable[..., Any], inputs: Sequence[Tensor], dynamic: Sequence[set[int]] | None = None
) -> Program:
    """Trace to aten without decomposing anything; ``dynamic`` are the symbolic axes of each input."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = []
    for i, t in enumerate(inputs):
        moving = dynamic[i] if dynamic else set()
        sizes = [DimDynamic.DUCK if axis in moving else DimDynamic.STATIC for axis in range(t.ndim)]
        fakes.append(mode.from_tensor(t, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes)))

    def listed(*args: Tensor) -> tuple[Tensor, ...]:
        result = fn(*args)
        return (result,) if isinstance(result, Tensor) else tuple(result)

    with mode:
        graph = make_fx(listed, tracing_mode="real", pre_dispatch=True)(*fakes).graph
    missing: Any = None
    return Program(graph, missing, {}, {}, missing)


def _moving(layout: str) -> set[int]:
    return {i for i, axis in enumerate(parse(layout)) if any(letter in "bn" for letter in axis)}


def _entry(program: Program, layout: str) -> Entry:
    first = next(iter(program.graph.nodes))
    return Entry(first.name, token_axis=1, batch_axis=0) if layout == "b n c" else Entry(first.name, 0, 1)


def _cut(program: Program, entry: Entry) -> str:
    """Where the reductions go: the first ``alias`` (what a skip connection goes around), or the entry."""
    return next((node.name for node in program.graph.nodes if node.target is aten.alias.default), entry.node)


def walk_eager(
    program: Program, layout: str, actions: Sequence[Reduce], inputs: Sequence[Tensor]
) -> tuple[Walk, list[Any]]:
    """Walk on real tensors."""
    names = [node.name for node in program.graph.nodes if node.op == "placeholder"]
    feeds = dict(zip(names, inputs, strict=True))
    entry = _entry(program, layout)
    walk = Walk(program, EagerBuilder(), entry, actions={_cut(program, entry): list(actions)}, inputs=feeds)
    with torch.no_grad():
        return walk, walk.run()


def walk_graph(
    program: Program, layout: str, actions: Sequence[Reduce], inputs: Sequence[Tensor]
) -> tuple[GraphBuilder, list[Tensor]]:
    """Walk into a new graph and run that."""
    fake = next(iter(program.graph.nodes)).meta["val"]
    builder = GraphBuilder(fake.fake_mode)
    entry = _entry(program, layout)
    values = Walk(program, builder, entry, actions={_cut(program, entry): list(actions)}).run()
    builder.graph.output([value.handle for value in values])
    module = fx.GraphModule(nn.Module(), builder.graph)
    feeds = iter(inputs)
    args = [
        builder.constants[str(node.target)] if node in builder.constant_nodes else next(feeds)
        for node in builder.graph.nodes
        if node.op == "placeholder"
    ]
    for node in builder.graph.nodes:
        assert node.op != "call_function" or "val" in node.meta, node
    with torch.no_grad():
        return builder, list(module(*args))


# reference ------------------------------------------------------------------------------------------------------------


@dataclass
class _Left:
    """One sample after the reductions: original positions that are left, and the slot that each belongs to."""

    alive: list[int]
    owner: list[int]
    kept: list[int]  # original position of each slot's representative
    rows: Tensor  # [slots, C]
    valid: list[bool]


def _left(x: Tensor, actions: Sequence[Reduce]) -> list[_Left]:
    """Follow the reductions in plain Python; ``x`` is ``[B, N, C]``."""
    result = []
    for own, whole in enumerate(x):
        groups = [[i] for i in range(len(whole))]
        heads = list(range(len(whole)))
        rows = [row.double() for row in whole]
        valid = [True] * len(whole)
        for action in actions:
            keep = action.handles["keep"]
            kept = (keep if keep.ndim == 1 else keep[own]).tolist()
            after = [list(groups[i]) for i in kept]
            mixed = [rows[i] * len(groups[i]) for i in kept]
            if action.kind == "merge":
                slots = action.handles["slot"][own].tolist()
                for source, slot in zip(action.handles["source"][own].tolist(), slots, strict=True):
                    mixed[slot] = mixed[slot] + rows[source] * len(groups[source])
                    after[slot] += groups[source]
            rows = [row / len(group) for row, group in zip(mixed, after, strict=True)]
            groups, heads = after, [heads[i] for i in kept]
            flags = action.handles.get("valid")
            valid = [True] * len(kept) if flags is None else flags[own].tolist()
        pairs = sorted((i, slot) for slot, group in enumerate(groups) if valid[slot] for i in group)
        result.append(
            _Left([i for i, _ in pairs], [slot for _, slot in pairs], heads, torch.stack(rows).to(x.dtype), valid)
        )
    return result


def _as_tuple(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _expected(case: Case, left: _Left, own: int, inputs: dict[str, Tensor], batch: int, tokens: int) -> list[Tensor]:
    """Call the function on what is left of one sample."""
    owner = torch.tensor(left.owner)
    x = left.rows[owner][None]  # [1, copies, C]
    representative = torch.tensor(left.kept)[owner]
    sides = {
        name: sample(inputs[name], side.layout, batch, tokens, own, representative) for name, side in case.sides.items()
    }
    outputs = _as_tuple(case.fn(x if case.layout == "b n c" else x.transpose(0, 1), **sides))
    slots = sorted(set(left.owner))
    renamed = torch.tensor([slots.index(slot) for slot in left.owner])
    return [
        spread(output, layout, len(left.owner), renamed, len(slots))
        for output, layout in zip(outputs, case.out, strict=True)
    ]


def _tags(value: Value) -> list[list[str]]:
    """Letters of the tagged factors of each axis."""
    return [
        ["b" if f.space.is_batch else "p" if f.normalised else "n" for f in axis if f.space is not None]
        for axis in value.axes
    ]


def _wanted_tags(layout: str) -> list[list[str]]:
    return [[letter for letter in axis if letter in "bnp"] for axis in parse(layout)]


def check(case: Case, kinds: tuple[Kind, ...], *, batch: int, tokens: int, dynamic: bool = False) -> Program:
    """Trace a case, reduce it eagerly and in a graph, and compare both with plain Python.

    With ``dynamic`` the program is traced at other sizes than it is run at.
    """
    generator = torch.Generator().manual_seed(len(case.name) + 17 * tokens)

    def made(b: int, n: int) -> dict[str, Tensor]:
        x = torch.randn(b, n, 8, generator=generator)
        first = {"x": x if case.layout == "b n c" else x.transpose(0, 1).contiguous()}
        return first | {name: side.make(b, n, generator) for name, side in case.sides.items()}

    traced = made(batch + 2, tokens + 3) if dynamic else made(batch, tokens)
    layouts = [case.layout, *(side.layout for side in case.sides.values())]
    names = list(traced)

    def positional(*args: Tensor) -> Any:
        return case.fn(args[0], **dict(zip(names[1:], args[1:], strict=True)))

    program = make_program(
        positional, list(traced.values()), [_moving(layout) for layout in layouts] if dynamic else None
    )
    inputs = made(batch, tokens) if dynamic else traced
    actions = [Reduce(kind) for kind in kinds]
    _, values = walk_eager(program, case.layout, actions, list(inputs.values()))
    _, graph = walk_graph(program, case.layout, [Reduce(kind) for kind in kinds], list(inputs.values()))
    x = inputs["x"] if case.layout == "b n c" else inputs["x"].transpose(0, 1)
    every = _left(x, actions)
    slots = len(every[0].kept)
    with torch.no_grad():
        whole = _as_tuple(positional(*inputs.values())) if case.commutes and "merge" not in kinds else None
    for own, left in enumerate(every):
        real = torch.tensor([i for i, flag in enumerate(left.valid) if flag])
        with torch.no_grad():
            expected = _expected(case, left, own, inputs, batch, tokens)
        for i, layout in enumerate(case.out):
            assert isinstance(values[i], Value)
            if case.tagged:
                assert _tags(values[i]) == _wanted_tags(layout), f"{case.name}[{i}]: {values[i].axes}"
            for found, how in ((values[i].handle, "eager"), (graph[i], "graph")):
                got = sample(found, layout, batch, slots, own, real)
                torch.testing.assert_close(
                    got, expected[i], rtol=1e-4, atol=2e-5, msg=lambda m, i=i, how=how: f"{case.name}[{i}] {how}: {m}"
                )
                if whole is not None:
                    rows = torch.tensor(left.kept)[real]
                    gathered = sample(whole[i], layout, batch, tokens, own, rows)
                    torch.testing.assert_close(got, gathered, rtol=1e-4, atol=2e-5)
    return program
