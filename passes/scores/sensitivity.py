"""How much the rest of the program reacts to small changes of a token."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.passes.cut import Cut
from tokcc.passes.ordering import around
from tokcc.passes.piece import Score

__all__ = ["Sensitivity"]


class Sensitivity(Score):
    """Finite differences of what follows the cut (ZOO-Prune, arXiv:2509.24837).

    ``s_i = mean_k |f(x_i + h u_k) - f(x_i - h u_k)| / 2h`` with random unit directions u that all tokens share and
    that are constants of the program. f is what the rest of the program makes of a token by itself: final norm and
    projector. Where nothing follows, f is the identity, and all tokens are alike: 1.

    Attributes:
        directions: How many directions; the rest of the program runs twice for each.
        step: h as a share of the root mean square of each sample's tokens. In half precision the difference of nearly
            equal numbers needs a larger one.
    """

    kind: ClassVar[str] = "sensitivity"

    directions: int = Field(default=16, ge=1)
    step: float = Field(default=0.01, gt=0.0)

    def emit(self, cut: Cut) -> Any:
        """Return fp32 ``[B, N]``."""
        b, m, size = cut.b, self.directions, cut.candidates
        if cut.valid is not None:
            cut.ctx.fail("padding has no sensitivity", help="use a model without a padding mask")
        width = b.shape(cut.x)[2]
        generator = torch.Generator().manual_seed(cut.seed)
        directions = torch.nn.functional.normalize(torch.randn(m, width, generator=generator), dim=1)
        both = b.constant("tokcc_directions", torch.cat([directions, -directions]))  # [2m, C]
        x = b.cast(cut.inner(cut.x), torch.float32)  # [B, M, C]
        squares = b.mean(b.mean(b.mul(x, x), 2, keepdim=True), 1, keepdim=True)
        h = b.unsqueeze(b.mul(b.sqrt(squares), self.step), 1)  # [B, 1, 1, 1]
        moved = b.add(b.unsqueeze(x, 1), b.mul(b.unsqueeze(b.unsqueeze(both, 1), 0), h))  # [B, 2m, M, C]
        copies = b.mul_sizes(size, 2 * m)
        moved = b.cast(b.reshape(moved, [cut.batch.size, copies, width]), b.dtype(cut.x))
        places = b.arange(size, cut.x)
        places = b.reshape(b.expand(b.unsqueeze(places, 0), [2 * m, -1]), [copies])
        made = cut.ahead(moved, places)  # [B, 2m M, D]
        if made is moved:  # rounding must not tell tokens apart that are alike
            return b.full([cut.batch.size, cut.tokens], 1.0, torch.float32, cut.x)
        made = b.cast(made, torch.float32)
        made = b.reshape(made, [cut.batch.size, 2, m, size, b.size(made, 2)])
        up, down = (b.squeeze(b.slice(made, 1, i, i + 1), 1) for i in range(2))
        change = b.sub(up, down)
        length = b.mean(b.sqrt(b.sum(b.mul(change, change), 3)), 1)  # [B, M]
        return around(cut, b.div(length, b.mul(b.reshape(h, [cut.batch.size, 1]), 2.0)))
