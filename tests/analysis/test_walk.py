"""The walk checks what each rule promises, at its node."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.analysis.oracle import Reduce, make_program, walk_eager, walk_graph
from tokcc.analysis import walk
from tokcc.analysis.context import Context
from tokcc.analysis.rules import rule_for
from tokcc.errors import VerifyError
from tokcc.ir.value import Value

aten = torch.ops.aten


def _lost_axis(ctx: Context, x: Value) -> Value:
    return x.having(handle=ctx.emit(x.handle), axes=x.axes[1:])


def _forgotten_tokens(ctx: Context, x: Value) -> Value:
    """A rule that emits the operation over all tokens and still says that they are fewer."""
    whole = (
        torch.zeros(x.old) if isinstance(x.handle, Tensor) else ctx.builder.full(x.old, 0.0, torch.float32, x.handle)
    )
    return x.having(handle=ctx.emit(whole))


def _other_channels(ctx: Context, x: Value) -> Value:
    return x.having(handle=ctx.builder.slice(ctx.emit(x.handle), 2, 1))


@pytest.mark.parametrize("run", [walk_eager, walk_graph])
@pytest.mark.parametrize(
    ("broken", "what"),
    [
        (_lost_axis, "lost an axis"),
        (_forgotten_tokens, "axis 1 another size"),
        (_other_channels, "axis 2 another size"),
    ],
)
def test_a_broken_rule_is_stopped(monkeypatch: pytest.MonkeyPatch, run: Any, broken: Any, what: str) -> None:
    monkeypatch.setattr(walk, "rule_for", lambda target: broken if target is aten.relu.default else rule_for(target))
    x = torch.randn(2, 7, 8)
    program = make_program(lambda x: aten.relu.default(x * 2) + 1, [x])
    with pytest.raises(VerifyError, match=what) as caught:
        run(program, "b n c", [Reduce("drop")], [x])
    assert caught.value.node is not None
    assert caught.value.node.startswith("relu")
