"""Tokens above a threshold that grows with the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.passes.scan.cut import ScanCut
from tokcc.passes.scan.piece import ScanSelector
from tokcc.passes.trained import TensorSpec, Trained

__all__ = ["Above"]

_EVERY = -1.0  # below every step size: softplus gives no negative ones


class Above(Trained, ScanSelector):
    """Take in what rates above a threshold of the channel and the length of the text (LongMamba, arXiv:2504.16053).

    Only channels whose state remembers are filtered: those of which more than `remembers` of the first state is left
    after a text as long as the model was trained on. Of the measured lengths the one nearest to a text's own counts,
    the shorter of two that are equally near; texts nearest to the first, the length of the training, are scanned whole.

    The file has ``lengths`` (whole numbers, ascending), and for each layer ``layers.N.thresholds``, a row for each of
    the lengths behind the first, and ``layers.N.decay``, what is left of each channel's state.

    Attributes:
        remembers: What a channel has to remember, between 0 and 1.
    """

    kind: ClassVar[str] = "above"
    made: ClassVar[str] = "measured"
    advice: ClassVar[str | None] = "measure the model: `tokcc profile MODEL --tokens N -o FILE.safetensors`"

    remembers: float = Field(default=1e-30, ge=0, lt=1)

    def tensors(self, sizes: Mapping[str, int]) -> Sequence[TensorSpec]:
        """See :class:`Above`."""
        specs = [TensorSpec("lengths", ("lengths",), "int")]
        for layer in range(sizes["layers"]):
            specs.append(TensorSpec(f"layers.{layer}.thresholds", ("longer", "channels")))
            specs.append(TensorSpec(f"layers.{layer}.decay", ("channels",)))
        return specs

    def check(self, tokens: int) -> None:
        """See :class:`Above`."""
        lengths, rows = self.weight("lengths").tolist(), len(self.weight("layers.0.thresholds"))
        if len(lengths) < 2 or lengths != sorted({*lengths}) or lengths[0] < 1 or len(lengths) != rows + 1:
            raise ValueError(f"the lengths {lengths} do not ascend, or are not one more than {rows} rows of thresholds")
        if lengths[0] != tokens:
            raise ValueError(f"the thresholds are for texts of more than {lengths[0]} tokens, the step for {tokens}")

    def acts(self, layer: int) -> bool:
        """See :class:`Above`."""
        return bool(self._remembering(layer).any())

    def shortest(self, tokens: int) -> int:
        """See :class:`Above`."""
        del tokens
        return int(self.weight("lengths")[:2].sum()) // 2 + 1

    def _remembering(self, layer: int) -> torch.Tensor:
        return self.weight(f"layers.{layer}.decay") > self.remembers

    def select(self, cut: ScanCut, score: Any) -> Any:
        """See :class:`Above`."""
        b, lengths = cut.b, self.weight("lengths")
        rows = self.weight(f"layers.{cut.layer}.thresholds")
        table = torch.cat([torch.full_like(rows[:1], _EVERY), rows])
        table = torch.where(self._remembering(cut.layer), table, _EVERY).to(b.dtype(score))
        # Twice the length against the sum of two neighbours: nearer to the longer one.
        between = b.constant("between", lengths[1:] + lengths[:-1])
        longer = b.compare("gt", b.unsqueeze(b.mul(cut.seen, 2), 1), between)  # [B, lengths]
        row = b.sum(b.cast(longer, torch.int64), 1)  # [B]
        threshold = b.call(torch.ops.aten.index_select.default, b.constant("thresholds", table), 0, row)  # [B, D]
        return b.compare("gt", score, b.unsqueeze(b.unsqueeze(threshold, 0), 3))
