"""Attention over all tokens of a prompt, where the stream has one row for those that were merged.

Virtual token unmerging (DyMU, arXiv:2504.17040, section 3.2), its exact form: with the map p from N tokens to U rows,
queries, keys and values of the rows are given to the tokens that read them, turned by the tokens' own positions, and
attend as N tokens do. A row goes on with the mean of what its tokens attended to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tokcc.analysis.rotation import Rotation
from tokcc.ir.builder import Builder, GraphBuilder
from tokcc.ir.space import TokenSpace

__all__ = ["Unmerged", "share_rows"]


def share_rows(b: GraphBuilder, inputs: Sequence[fx.Node]) -> None:
    """Give inputs ``[B, S, ...]`` a number of rows of their own."""
    rows = b.free_size(613)
    if isinstance(rows, torch.SymInt):
        b.size_names[rows.node.expr] = "rows"
    for node in inputs:
        like = node.meta["val"]
        with b.fake_mode:
            node.meta["val"] = torch.empty([like.shape[0], rows, *like.shape[2:]], dtype=like.dtype, device=like.device)


@dataclass(frozen=True)
class Unmerged:
    """The rows of a stream and the tokens that read them.

    Attributes:
        assign: int64 ``[B, N]``: the row of each token.
        share: fp32 ``[B, U, N]``: what each token is of its row's mean; padding is nothing of any.
        rows: U, a size.
    """

    assign: Any
    share: Any
    rows: Any

    @classmethod
    def of(cls, b: Builder, given: Any, rows: Any, real: Any) -> Unmerged:
        """Read the map.

        Args:
            b: The builder.
            given: int64 ``[B, N]`` as callers give it.
            rows: U.
            real: bool ``[B, N]``: tokens that are not padding; the map may say anything of the others.
        """
        tokens = b.size(given, 1)
        from_end = b.add(b.arange(tokens, given), b.sub_sizes(rows, tokens))  # [N]
        found = b.where(b.compare("ge", given, 0), given, b.unsqueeze(from_end, 0))
        # A row that is not there: an index behind the last one makes the engine fail, a negative one would not.
        there = b.compare("ge", found, 0)
        found = b.where(there, found, b.add(b.mul(found, 0), rows))
        assign = b.where(real, found, 0)
        row = b.unsqueeze(b.unsqueeze(b.arange(rows, given), 1), 0)  # [1, U, 1]
        reads = b.logical_and(b.compare("eq", b.unsqueeze(assign, 1), row), b.unsqueeze(real, 1))
        ones = b.cast(reads, torch.float32)
        share = b.div(ones, b.clamp_min(b.sum(ones, 2, keepdim=True), 1.0))
        return cls(assign, share, rows)

    def space(self, b: Builder, tokens: TokenSpace) -> TokenSpace:
        """Return the rows as a space: each stands for the first token that reads it."""
        return TokenSpace(
            name="rows",
            size=self.rows,
            old=tokens.old,
            parent=tokens,
            index=b.argmax(self.share, 2),
            assign=self.assign,
            ascending=False,
            sequence=False,
        )

    def spread(self, b: Builder, x: Any) -> Any:
        """Give rows ``[B, H, U, D]`` to the tokens: ``[B, H, N, D]``."""
        return b.call(torch.ops.tokcc.gather_tokens.default, x, self.assign, 2, 0)

    def asked(self, b: Builder, turns: Sequence[Rotation], value: Any, env: Mapping[fx.Node, Any]) -> list[Any]:
        """Return queries, keys and values of the tokens.

        Args:
            b: The builder.
            turns: How queries and keys of the rows are turned.
            value: Those of the rows, ``[B, Hkv, U, D]``.
            env: Handles of the model's nodes.
        """
        handles = dict(env)
        turned = [t.replay(b.call, self.spread(b, env[t.source]), env[t.positions], handles) for t in turns]
        return [*turned, self.spread(b, value)]

    def merged(self, b: Builder, x: Any) -> Any:
        """Return the mean of what the tokens of each row have: ``[B, H, N, D]`` to ``[B, H, U, D]``."""
        return b.matmul(b.unsqueeze(b.cast(self.share, b.dtype(x)), 1), x)
