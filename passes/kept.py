"""What became of every token, layer by layer, on real inputs: for the report's pictures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tokcc.analysis.walk import eager_inputs
from tokcc.ir.builder import EagerBuilder
from tokcc.ir.program import Program
from tokcc.passes.plan import Plan
from tokcc.passes.propagate import reduce_walk

__all__ = ["kept_stages"]


def kept_stages(
    program: Program, plan: Plan, feeds: dict[str, torch.Tensor]
) -> Iterator[tuple[int, str, npt.NDArray[np.bool_], npt.NDArray[np.int64] | None]]:
    """Yield (layer, step, kept, assign) for each reduction, composed down to the original tokens.

    Args:
        program: The original program.
        plan: The plan; it is walked again, eagerly.
        feeds: Inputs.

    Yields:
        ``kept`` bool ``[B, N0]``: the token stands, alone or for its group; ``assign`` int64 ``[B, N0]``: the current
        position that each original token went to, -1 when it was dropped; None when nothing was merged yet.
    """
    before = len(plan.made)
    with torch.no_grad():
        walk, _ = reduce_walk(program, plan, EagerBuilder(feeds), eager_inputs(program, feeds))
    spaces = plan.made[before:]
    del plan.made[before:]
    assert walk.tokens is not None
    batch, tokens = int(walk.batch.size) if walk.batch is not None else 1, int(walk.tokens.size)
    assign: Any = torch.arange(tokens).expand(batch, tokens)
    kept = torch.ones(batch, tokens, dtype=torch.bool)
    current, merged = walk.tokens, False
    for reduction, space in zip(plan.reductions, spaces, strict=True):
        if space is current:  # removes nothing
            yield reduction.layer, reduction.name, kept.numpy(), assign.numpy() if merged else None
            continue
        current = space
        index = walk.ctx.own_index(space)
        index = index.expand(batch, -1) if index.ndim == 1 else index
        if space.assign is not None:
            own = space.assign(walk.ctx) if callable(space.assign) else space.assign
            merged = True
        else:
            assert space.parent is not None
            own = torch.full((batch, int(space.parent.size)), -1, dtype=torch.int64)
            positions = torch.arange(index.shape[1]).expand(batch, -1)
            if space.valid is not None:
                positions = positions.masked_fill(~space.valid, -1)
            own = own.scatter(1, index, positions)
        assign = torch.where(assign >= 0, own.gather(1, assign.clamp_min(0)), -1)
        root = walk.ctx.index_between(walk.tokens, space)
        root = root.expand(batch, -1) if root.ndim == 1 else root
        kept = torch.zeros(batch, tokens, dtype=torch.bool)
        kept = kept.scatter(
            1, root, space.valid if space.valid is not None else torch.ones_like(root, dtype=torch.bool)
        )
        yield reduction.layer, reduction.name, kept.numpy(), assign.numpy() if merged else None
