"""Lists that later layers read, too."""

from __future__ import annotations

from typing import Any, ClassVar

from tokcc.passes.budget import Count
from tokcc.passes.sparse.cut import BlockList, SparseCut
from tokcc.passes.sparse.selectors.best_blocks import BestBlocks

__all__ = ["Persistent"]


class Persistent(BestBlocks):
    """The best blocks of some layers, which read everything; the layers behind each read what it chose.

    Head by head: what a head of the choosing layer found is read by the head of the same number (TidalDecode,
    arXiv:2410.05076, 3.2).

    Attributes:
        chosen_in: The layers that choose, the first one of the step among them.
    """

    kind: ClassVar[str] = "persistent"
    passes_on: ClassVar[bool] = True

    chosen_in: tuple[int, ...]

    def rates(self, layer: int) -> bool:
        """See :class:`SparseSelector`."""
        return layer in self.chosen_in

    def reads_all(self, layer: int) -> bool:
        """See :class:`SparseSelector`."""
        return layer in self.chosen_in

    def check_layers(self, layers: tuple[int, ...]) -> None:
        """See :class:`SparseSelector`."""
        missing = [layer for layer in self.chosen_in if layer not in layers]
        if missing or layers[0] not in self.chosen_in:
            raise ValueError(
                f"`chosen_in` among the layers of the step, {layers[0]} to {layers[-1]}, and the first of them in it"
            )

    def select(self, cut: SparseCut, score: Any, budget: Count) -> BlockList:
        """See :class:`SparseSelector`."""
        if self.rates(cut.layer):
            return super().select(cut, score, budget)
        return cut.lists[max(layer for layer in self.chosen_in if layer < cut.layer)]
