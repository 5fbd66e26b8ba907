"""Take padding behind the texts of a batch, as onnxruntime-genai puts it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tokcc.ir.builder import Builder, GraphBuilder, same_size
from tokcc.ir.edit import fake_mode_of
from tokcc.ir.program import PassResult, Program
from tokcc.passes.cache.head import rowwise
from tokcc.passes.outputs import OutputPlan
from tokcc.passes.propagate import finish

__all__ = ["RightPadding"]

aten = torch.ops.aten


@dataclass(frozen=True)
class RightPadding:
    """Turn the tokens of a call so that padding behind a text stands in front of it, and outputs back again.

    What reads a cache relies on padding in front, see :func:`tokcc.passes.cache.visible.real_slots`. Rows that are
    padded in front or not at all stay as they are. Outputs are turned before their head where it treats every token by
    itself; an output of the last row alone then holds the last real token of every text.

    Attributes:
        mask: Name of the padding mask input.
    """

    mask: str

    def run(self, program: Program) -> PassResult:
        """Apply the pass."""
        new = _new_tokens(program)
        if isinstance(new, int) and new == 1:
            return PassResult(program, False)
        b = GraphBuilder(fake_mode_of(program))
        env: dict[fx.Node, Any] = {}
        inputs = [node for node in program.graph.nodes if node.op == "placeholder"]
        for node in inputs:
            env[node] = b.placeholder(node)
        mask = next(node for node in inputs if node.name == self.mask)
        tokens = [
            node
            for node in program.user_inputs
            if node is not mask and "." not in program.public_name(node) and _by_token(node, new)
        ]
        with b.inserting("right padding"):
            turn = _Turn.of(b, env[mask], b.size(env[tokens[0]], 1))
            env[mask] = turn.mask
            for node in tokens:
                env[node] = turn.there(b, env[node])
        turned = dict(_read_by_heads(program, new))
        for node in program.graph.nodes:
            if node.op != "call_function":
                continue
            source = turned.get(node)
            if source is not None:
                with b.inserting("right padding"):
                    back = turn.back(b, env[source])
            b.scope = node
            operands: Any = fx.node.map_arg(
                (node.args, node.kwargs),
                lambda n: back if n is source else env[n],  # noqa: B023  # called at once
            )
            env[node] = b.call(node.target, *operands[0], like=node, **operands[1])
        values = [env[value] if isinstance(value, fx.Node) else value for value in program.output_values]
        with b.inserting("right padding"):
            for position, value in _outputs(program, new):
                if not rowwise(value):
                    values[position] = turn.back(b, values[position])
        return PassResult(finish(program, b, OutputPlan(program.output_names, (), values=tuple(values))), True)


@dataclass(frozen=True)
class _Turn:
    """Where tokens go.

    Attributes:
        mask: The padding mask ``[B, T]`` with the call's tokens turned.
        source: int64 ``[B, S]``: which token stands at a place.
        place: int64 ``[B, S]``: where a token stands.
    """

    mask: Any
    source: Any
    place: Any

    @classmethod
    def of(cls, b: Builder, mask: Any, new: Any) -> _Turn:
        """Turn every row by the padding behind its last real token."""
        split = b.sub_sizes(b.size(mask, 1), new)
        fresh = b.slice(mask, 1, split, None)
        place = b.arange(new, mask)  # [S]
        last = b.amax(b.where(b.compare("gt", b.cast(fresh, torch.int64), 0), place, -1), 1, keepdim=True)
        highest = b.amax(place, 0, keepdim=True)
        behind, length = b.sub(highest, last), b.add(highest, 1)  # [B, 1], [1]
        before, after = b.sub(place, behind), b.add(place, behind)
        source = b.where(b.compare("lt", before, 0), b.add(before, length), before)
        back = b.where(b.compare("ge", after, length), b.sub(after, length), after)
        return cls(b.cat([b.slice(mask, 1, 0, split), b.gather(fresh, 1, source)], 1), source, back)

    def there(self, b: Builder, x: Any) -> Any:
        """Turn ``[B, S, ...]``."""
        return _taken(b, x, self.source)

    def back(self, b: Builder, x: Any) -> Any:
        """Turn ``[B, S, ...]`` back."""
        return _taken(b, x, self.place)


def _taken(b: Builder, x: Any, index: Any) -> Any:
    if len(b.shape(x)) == 2:
        return b.gather(x, 1, index)
    return b.call(torch.ops.tokcc.gather_tokens.default, x, index, 1, 0)


def _new_tokens(program: Program) -> Any:
    """Return S: as many queries as attention has."""
    op = torch.ops.tokcc.cached_attention.default
    query: Any = next(node for node in program.graph.nodes if node.target is op).args[0]
    return query.meta["val"].shape[2]


def _by_token(node: fx.Node, new: Any) -> bool:
    fake = node.meta.get("val")
    return isinstance(fake, torch.Tensor) and fake.ndim >= 2 and same_size(fake.shape[1], new)


def _outputs(program: Program, new: Any) -> Iterator[tuple[int, fx.Node]]:
    """Yield what holds a row for each token, and its position."""
    places = {position: i for i, position in enumerate(program.user_output_positions)}
    for position, value in enumerate(program.output_values):
        if position not in places or program.output_names[places[position]].startswith("present."):
            continue
        if isinstance(value, fx.Node) and _by_token(value, new):
            yield position, value


def _read_by_heads(program: Program, new: Any) -> Iterator[tuple[fx.Node, Any]]:
    """Yield the first node of each output's head, and what it reads."""
    for _, value in _outputs(program, new):
        current: Any = value
        first = None
        while rowwise(current):
            first, current = current, current.args[0]
        if first is not None:
            yield first, current
