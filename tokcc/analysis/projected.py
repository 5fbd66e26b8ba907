"""Sites of an encoder whose projector regroups tokens: what it gives has tokens of its own, and no attention."""

from __future__ import annotations

import torch
from torch import fx

from tokcc.analysis.sites import Sites
from tokcc.analysis.walk import Entry, Walk
from tokcc.errors import PlanError
from tokcc.ir.builder import GraphBuilder
from tokcc.ir.edit import fake_mode_of
from tokcc.ir.program import Program
from tokcc.ir.value import Value

__all__ = ["projected_sites"]


def projected_sites(program: Program) -> Sites:
    """Return sites with one cut, at the first output ``[batch, tokens, channels]``, where a token space begins.

    A projector that folds neighbouring tokens into one (pixel shuffle, pooling, a merger of patches) ends the token
    space of the tower. What leaves it is a new one: scores that read the tower's attention know nothing of it.

    Raises:
        PlanError: There is no such output.
    """
    node = next(
        (
            value
            for value in program.output_values
            if isinstance(value, fx.Node)
            and isinstance(value.meta.get("val"), torch.Tensor)
            and value.meta["val"].ndim == 3
            and value.meta["val"].is_floating_point()
        ),
        None,
    )
    if node is None:
        raise PlanError(
            "the model has no `projector_output`",
            needed="an output [batch, tokens, channels]",
            found=", ".join(program.output_names),
        )
    walk = Walk(program, GraphBuilder(fake_mode_of(program)), Entry(node.name))
    walk.run()
    assert walk.entry is not None
    assert walk.tokens is not None
    assert walk.batch is not None
    return Sites(
        entry=walk.entry,
        layers=(),
        encoder_output=node.name,
        tokens=walk.tokens.old,
        batch=walk.batch.old,
        prefix=0,
        suffix=0,
        axes={own.name: value for own, value in walk.env.items() if isinstance(value, Value)},
        lost=walk.lost,
        order={own.name: i for i, own in enumerate(program.graph.nodes)},
    )
