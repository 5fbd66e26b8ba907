"""How much layers change a token, together with the text's attention."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.passes.features import normalised
from tokcc.passes.prompt.cut import PromptCut
from tokcc.passes.prompt.piece import PromptScore
from tokcc.passes.prompt.rows import probs_of_rows, text_rows

__all__ = ["Transition"]

_TINY = 1e-8


class Transition(PromptScore):
    """Token transitions so far, and the text's attention of the next layer, in equal parts (TransPrune, 2507.20630).

    For what an attention or an MLP reads, ``u``, and adds, ``o``: ``|o| / |u|`` times the token's part of all
    ``exp(1 - cos(u, o))``. These add up over layers.

    Attributes:
        first: First layer that counts.
        text: Add the text's attention, both divided by their sums over the candidates.
    """

    kind: ClassVar[str] = "transition"

    first: int = Field(default=0, ge=0)
    text: bool = True

    @property
    def counts_text(self) -> bool:
        """See :class:`PromptScore`."""
        return self.text

    def emit(self, cut: PromptCut) -> Any:
        """See :class:`Transition`."""
        b = cut.b
        total = cut.facts.get("transition")
        for layer in range(max(self.first, cut.before + 1), cut.layer + 1):
            for kind in ("attention", "mlp"):
                made = self._change(cut, layer, kind)
                total = made if total is None else b.add(total, made)
        if total is None:
            cut.fail("no layer counts at the first cut", help="choose a smaller `first`")
        cut.facts["transition"] = total
        if not self.text:
            return total
        rows, weight = text_rows(cut)
        table = b.mean(probs_of_rows(cut, "next", rows), 1)  # [B, R, N]
        attention = b.sum(b.mul(table, b.unsqueeze(weight, 2)), 1)
        return b.add(self._share(cut, total), self._share(cut, attention))

    def _change(self, cut: PromptCut, layer: int, kind: str) -> Any:
        b = cut.b
        branch = cut.branch(layer, kind)
        given, added = b.cast(branch.input, torch.float32), b.cast(branch.output, torch.float32)
        cosine = b.sum(b.mul(normalised(b, given), normalised(b, added)), 2)  # [B, N]
        turned = b.mul(b.exp(b.add(b.mul(cosine, -1.0), 1.0)), b.cast(cut.real, torch.float32))
        part = b.div(turned, b.add(b.sum(turned, 1, keepdim=True), _TINY))
        lengths = [b.sqrt(b.sum(b.mul(x, x), 2)) for x in (added, given)]
        return b.mul(b.div(lengths[0], b.add(lengths[1], _TINY)), part)

    def _share(self, cut: PromptCut, values: Any) -> Any:
        b = cut.b
        own = b.where(cut.candidates, values, 0.0)
        return b.div(own, b.add(b.sum(own, 1, keepdim=True), _TINY))
