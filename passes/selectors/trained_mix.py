"""A trained soft assignment of all tokens to a fixed number of new ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch

from tokcc.passes.cut import Assigned, Cut
from tokcc.passes.ordering import LOWEST
from tokcc.passes.piece import Selector
from tokcc.passes.trained import TensorSpec, Trained, activated, linear_specs

__all__ = ["TrainedMix"]

aten = torch.ops.aten


class TrainedMix(Trained, Selector):
    """``G = softmax over tokens of a small network``, one network for each chosen layer; output k is ``G[:, k]^T x``.

    The token slimming module of SiT (arXiv:2111.12624, eq. 3) with two linear layers, a norm and a scale; the merging
    mask of LTM (arXiv:2407.15219) with one. The network's last width is the number of new tokens, so the budget must
    ask for as many.

    Tensors of the i-th chosen layer, from 0: ``stages.<i>.layers.<l>.weight`` ``[out, in]``, the last ``[P, in]``, and
    ``.bias`` where there is one; ``stages.<i>.norm.weight`` ``[C]`` and ``.bias``; ``stages.<i>.scale`` ``[1]``.

    Attributes:
        depth: Linear layers, with GELU between them.
        norm: Layer norm in front of them.
        gate: ``softmax`` over tokens, or ``sigmoid``, whose columns are then divided by their sum.
    """

    kind: ClassVar[str] = "trained_mix"
    wants_score: ClassVar[bool] = False

    depth: Literal[1, 2] = 2
    norm: bool = True
    gate: Literal["softmax", "sigmoid"] = "softmax"

    def tensors(self, sizes: Mapping[str, int]) -> Sequence[TensorSpec]:
        """See :class:`TrainedMix`."""
        found: list[TensorSpec] = []
        for i in range(sizes["stages"]):
            widths: list[int | str] = ["C", *(["hidden"] * (self.depth - 1)), f"P_{i}"]
            for place in range(self.depth):
                found += linear_specs(f"stages.{i}.layers.{place}", widths[place + 1], widths[place])
            if self.norm:
                found.append(TensorSpec(f"stages.{i}.norm.weight", ("C",)))
                found.append(TensorSpec(f"stages.{i}.norm.bias", ("C",), optional=True))
            found.append(TensorSpec(f"stages.{i}.scale", (1,), optional=True))
        return found

    def select(self, cut: Cut, score: Any) -> Assigned:
        """See :class:`TrainedMix`."""
        del score
        b = cut.b
        stage = f"stages.{cut.stage}"
        size = int(self.weight(f"{stage}.layers.{self.depth - 1}.weight").shape[0])
        asked = cut.count.kept(b, cut.candidates, cut.initial_candidates)
        if asked != size:
            cut.ctx.fail(
                f"the weights make {size} tokens here, and the budget asks for "
                + (str(asked) if isinstance(asked, int) else "a number that depends on the input"),
                help=f"give the budget the numbers of the weights, for instance `budget: {{tokens: {size}}}`",
            )
        z = b.cast(cut.inner(cut.x), torch.float32)  # [B, M, C]
        if self.norm:
            z = self.normed(b, z, f"{stage}.norm", "layer", 1e-5)
        for place in range(self.depth):
            z = self.linear(b, activated(b, z, "gelu") if place else z, f"{stage}.layers.{place}")
        if self.has(f"{stage}.scale"):
            z = b.mul(z, self.tensor(b, f"{stage}.scale"))
        matrix = self._gated(cut, b.transpose(z, 1, 2))  # [B, P, M]
        return Assigned(matrix, b.argmax(matrix, 2), b.add_sizes(size, cut.first + cut.last))

    def _gated(self, cut: Cut, logits: Any) -> Any:
        b = cut.b
        if cut.valid is not None:
            logits = b.where(b.unsqueeze(cut.inner(cut.valid), 1), logits, LOWEST)
        if self.gate == "softmax":
            return b.softmax(logits, 2)
        gates = b.call(aten.sigmoid.default, logits)
        return b.div(gates, b.clamp_min(b.sum(gates, 2, keepdim=True), 1e-12))
