"""The one oracle test of the axis rules: ``rule(op)(reduce(x))`` equals ``reduce(op(x))``.

For every operation family and every placement of the token axis, with side operands in every broadcast form, eagerly
and in a graph, against plain Python that knows nothing of tags (see :mod:`tests.analysis.oracle`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.analysis.cases import (
    attention,
    indexing,
    matmul,
    norm,
    pointwise,
    reduction,
    sampling,
    sequence,
    skips,
    views,
)
from tests.analysis.oracle import Case, Kind, Reduce, check, make_program, walk_eager, walk_graph
from tests.analysis.test_rules_refuse import CASES as REFUSED
from tests.analysis.test_rules_refuse import TOKENS as REFUSED_TOKENS
from tokcc.analysis.rules import rules
from tokcc.ir.value import Value

aten = torch.ops.aten
CASES: list[Case] = [
    case
    for family in (views, indexing, matmul, attention, norm, reduction, pointwise, sampling, sequence, skips)
    for case in family.CASES
]
CHECKS = [(case, kinds) for case in CASES for kinds in case.kinds]
# Symbolic shapes trace slowly: one reduction for each case, the first and the last by turns.
DYNAMIC = [(case, case.kinds[-(i % 2)]) for i, case in enumerate(case for case in CASES if case.dynamic)]


def _name(value: Any) -> str:
    return value.name if isinstance(value, Case) else "-".join(value)


@pytest.mark.parametrize(("case", "kinds"), CHECKS, ids=_name)
def test_rule_equals_oracle(case: Case, kinds: tuple[Kind, ...]) -> None:
    # By turns tokens as many as channels, samples as many as heads or tokens: sizes that coincide must not be confused.
    batch, tokens = [(2, 11), (3, 8), (5, 5), (2, 7)][CHECKS.index((case, kinds)) % 4]
    check(case, kinds, batch=batch, tokens=tokens)


@pytest.mark.parametrize(("case", "kinds"), DYNAMIC, ids=_name)
def test_rule_equals_oracle_with_symbolic_sizes(case: Case, kinds: tuple[Kind, ...]) -> None:
    check(case, kinds, batch=3, tokens=11, dynamic=True)


def test_no_rule_is_untested() -> None:
    """Every operation with a rule meets a reduced value in some case above, or is refused in some case."""
    met: set[Any] = set()
    for case in CASES:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, 11, 8, generator=generator)
        inputs = {"x": x if case.layout == "b n c" else x.transpose(0, 1).contiguous()}
        inputs |= {name: side.make(2, 11, generator) for name, side in case.sides.items()}
        names = list(inputs)[1:]

        def positional(*args: Tensor, case: Case = case, names: list[str] = names) -> Any:
            return case.fn(args[0], **dict(zip(names, args[1:], strict=True)))

        program = make_program(positional, list(inputs.values()))
        if {node.target for node in program.graph.nodes if node.op == "call_function"} <= met:
            continue
        walk, _ = walk_eager(program, case.layout, [Reduce("drop")], list(inputs.values()))
        for node in program.graph.nodes:
            read = [walk.env[operand] for operand in node.all_input_nodes if operand in walk.env]
            if any(isinstance(value, Value) and value.reduced for value in read):
                met.add(node.target)
    for refused in REFUSED:
        program = make_program(refused.fn, [torch.randn(2, REFUSED_TOKENS, 8)])
        met |= {node.target for node in program.graph.nodes if node.name.startswith(refused.node)}
    assert not {str(target) for target in rules().keys() - met}


def _hidden(keep: Tensor, tokens: int) -> Tensor:
    """An additive mask [B, 1, 1, N] that hides what is not kept."""
    mask = torch.full((len(keep), tokens), -torch.inf)
    return mask.scatter(1, keep, 0.0)[:, None, None, :]


@pytest.mark.parametrize("written_out", [False, True], ids=["fused", "written out"])
def test_dropping_a_key_is_masking_it(written_out: bool) -> None:
    """The second oracle of attention: all tokens, the dropped ones masked with -inf, then the kept rows."""
    batch, tokens = 3, 9
    x, bias = torch.randn(batch, tokens, 8), torch.randn(1, 2, tokens, tokens)

    def attend(x: Tensor, bias: Tensor) -> Tensor:
        heads = x.reshape(x.shape[0], x.shape[1], 2, 4).transpose(1, 2)
        if written_out:
            probs = aten.softmax.int(heads @ heads.transpose(-1, -2) * 0.5 + bias, -1)
            return (probs @ heads).transpose(1, 2).reshape(x.shape)
        result = aten.scaled_dot_product_attention.default(heads, heads, heads, bias)
        return result.transpose(1, 2).reshape(x.shape)

    program = make_program(attend, [x, bias])
    action = Reduce("drop")
    _, (value,) = walk_eager(program, "b n c", [action], [x, bias])
    keep = action.handles["keep"]
    whole = attend(x, bias + _hidden(keep, tokens))
    torch.testing.assert_close(value.handle, whole.gather(1, keep[..., None].expand(-1, -1, 8)), rtol=1e-4, atol=1e-5)


def test_layers_share_the_gather_of_a_mask() -> None:
    """A mask that several layers read is brought down once for each reduction, not once for each layer."""

    def layers(x: Tensor, mask: Tensor) -> Tensor:
        for _ in range(3):
            heads = x.unsqueeze(1)
            x = x + aten.scaled_dot_product_attention.default(heads, heads, heads, mask).squeeze(1)
        return x

    x, mask = torch.randn(2, 9, 8), torch.rand(2, 1, 1, 9) > -1
    program = make_program(layers, [x, mask])
    builder, _ = walk_graph(program, "b n c", [Reduce("drop")], [x, mask])
    gathers = [n for n in builder.graph.nodes if n.target is torch.ops.tokcc.gather_tokens.default]
    assert len(gathers) == 2  # the stream, and the mask
