"""Measure the scans of a state-space decoder, for methods that filter what long texts add to its states."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from safetensors.torch import save
from torch import Tensor

from tokcc.analysis.scan_numbers import remembered, thresholds
from tokcc.analysis.state_sites import StateSite
from tokcc.backends.calls import empty_past
from tokcc.backends.parity import oracle
from tokcc.ir.program import Program
from tokcc.pipeline.saved_profile import SavedProfile

__all__ = ["LONGER", "ScanProfile", "profile_scans"]

LONGER = (1.5, 2, 2.5, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64, 96)
"""Lengths for which thresholds are measured, as multiples of the training's."""


@dataclass(frozen=True)
class ScanProfile(SavedProfile):
    """Numbers of scans, by layer and channel.

    Attributes:
        lengths: Lengths of texts; the first is the one that the model was trained on.
        decay: What is left of each channel's first state after a text of that length, a row for each layer.
        thresholds: For each layer, for each of the other lengths, a step size for each channel.
        measured: How it was measured.
    """

    lengths: tuple[int, ...]
    decay: tuple[tuple[float, ...], ...]
    thresholds: tuple[tuple[tuple[float, ...], ...], ...]
    measured: dict[str, Any]

    suffix: ClassVar[str | None] = ".safetensors"

    def summary(self) -> str:
        """See :class:`SavedProfile`."""
        half = sum(left > 0.5 for row in self.decay for left in row)
        return f"{len(self.decay)} layers of {len(self.decay[0])} channels, {half} of which keep half of a state"

    def content(self) -> bytes:
        """See :class:`SavedProfile`."""
        tensors = {"lengths": torch.tensor(self.lengths)}
        for layer, (decay, rows) in enumerate(zip(self.decay, self.thresholds, strict=True)):
            tensors[f"layers.{layer}.decay"] = torch.tensor(decay)
            tensors[f"layers.{layer}.thresholds"] = torch.tensor(rows)
        return save(tensors, metadata={name: str(value) for name, value in self.measured.items()})


def profile_scans(
    program: Program, sites: tuple[StateSite, ...], texts: Iterable[Tensor], measured: dict[str, Any]
) -> ScanProfile:
    """Measure the scans of a decoder.

    Args:
        program: The decoder.
        sites: Its scans.
        texts: int64 ``[S]`` each, as long as those of the training: their numbers are averaged.
        measured: How the texts came about.
    """
    nodes = {node.name: node for node in program.graph.nodes}
    rates = [_constant(program, nodes[site.rates]) for site in sites]
    asked = program.with_outputs({f"step.{site.layer}": nodes[site.step] for site in sites})
    run = oracle(asked)
    steps: list[list[Tensor]] = []
    for text in texts:
        known = {"input_ids": text[None], "attention_mask": torch.ones(1, len(text), dtype=torch.int64)}
        with torch.no_grad():
            outputs = run({**empty_past(program, 1), **known})
        steps.append([step[:, 0, :, 0] for step in outputs[-len(sites) :]])
    tokens = len(steps[0][0])
    lengths = sorted({round(tokens * factor) for factor in LONGER} - {tokens})
    decay, rows = [], []
    for layer in range(len(sites)):
        own = [text[layer] for text in steps]
        decay.append(_mean([remembered(step, rates[layer]) for step in own]))
        rows.append(tuple(_mean([thresholds(step, length) for step in own]) for length in lengths))
    return ScanProfile((tokens, *lengths), tuple(decay), tuple(rows), measured)


def _mean(values: list[Tensor]) -> tuple[float, ...]:
    return tuple(torch.stack(values).mean(0).tolist())


def _constant(program: Program, node: Any) -> Tensor:
    """Return rates as ``[D, N]``."""
    tensor = program.tensor_of(node)
    assert tensor is not None, "what depends on no input was folded when the model was captured"
    return tensor.reshape(tensor.shape[-2:])
