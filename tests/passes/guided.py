"""What tests of text-guided methods share: texts, and samples that a method may look at beside the scene."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.passes.oracle import Feeds, Model, Result, Scene, drop, reference
from tests.passes.reference_models import WIDTH

__all__ = ["choosing", "texts", "words_of"]


def texts(counts: Sequence[int], rows: int | None = None, width: int = WIDTH, seed: int = 0) -> dict[str, Tensor]:
    """Random vectors of texts, with noise in the rows that are not true ones."""
    generator = torch.Generator().manual_seed(seed + 11)
    shape = (len(counts), rows or max(counts), width)
    return {"text": torch.randn(shape, generator=generator), "text_count": torch.tensor(list(counts))}


def words_of(sample: Feeds) -> Tensor:
    """Return the true rows of a sample's text."""
    return sample["text"][0, : int(sample["text_count"])]


def choosing(
    model: Model, protected: int, choose: Callable[[Tensor, Scene, Feeds], Sequence[int]]
) -> Callable[[Feeds], Result]:
    """Return an oracle that keeps the candidates ``[M, C]`` of the encoder's output that ``choose`` returns."""

    def run(sample: Feeds) -> Result:
        def method(scene: Scene) -> object:
            chosen = choose(model.norm(scene.x)[protected:], scene, sample)
            return drop(scene, [*range(protected), *sorted(int(i) + protected for i in chosen)])

        return reference(model, sample, method, layers=[len(model.blocks) - 1], at_end=True)  # type: ignore[arg-type]

    return run
