"""What to make of an engine that differs from its reference: wrong, or rounded the other way where two were equal."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tokcc.backends.decisions import decisions, replay, watching
from tokcc.backends.feeds import Feeds
from tokcc.backends.parity import Check, Tolerance, check_parity, numpy_feeds
from tokcc.backends.sessions import ending, open_engine
from tokcc.ir.program import Program

__all__ = ["Settled", "settle"]


@dataclass(frozen=True)
class Settled:
    """The reference given the engine's choices.

    Attributes:
        expected: Its outputs for each of the inputs.
        checks: The engine against them.
        note: For the report.
    """

    expected: list[list[torch.Tensor]]
    checks: list[Check]
    note: str


def settle(
    reference: Program,
    lowered: Program,
    engine: Path,
    names: Sequence[str],
    inputs: Sequence[Feeds],
    build: Callable[[Program, Path], object],
    tolerance: Tolerance,
) -> Settled | str:
    """Compare an engine with its reference given the engine's own choices.

    Args:
        reference: The reduced program.
        lowered: What the engine was made from.
        engine: The engine.
        names: Of the outputs, in order.
        inputs: What to run on.
        build: Writes an engine of a program as this one was written.
        tolerance: What counts as equal.

    Returns:
        The comparison; or, where a choice is not one that rounding explains, why.
    """
    known = {decision.output: decision for decision in decisions(reference)}
    watched = [decision for decision in decisions(lowered) if decision.output in known]
    if not watched:
        return "the model makes no choices"
    expected: list[list[torch.Tensor]] = []
    differing = elements = 0
    session = open_engine(engine)
    with tempfile.TemporaryDirectory(dir=engine.parent, prefix=".decisions-") as folder:
        path = Path(folder) / f"watched{ending(engine)}"
        build(watching(lowered, watched), path)
        showing = open_engine(path)
        for feeds in inputs:
            arrays = numpy_feeds(feeds)
            shown = {name: torch.as_tensor(np.array(value)) for name, value in showing.run(arrays).items()}
            # Further outputs may change how a runtime fuses: then these are the choices of another engine.
            same = check_parity(session.run, names, [feeds], [[shown[name] for name in names]], tolerance)
            if not all(check.passed for check in same):
                return "the engine's choices cannot be looked at without changing them"
            given = [known[decision.output] for decision in watched]
            again = replay(reference, given, feeds, shown)
            if again.refused:
                return again.refused
            expected.append(again.outputs)
            differing, elements = differing + again.differing, elements + again.elements
    checks = check_parity(session.run, names, inputs, expected, tolerance)
    note = (
        f"{differing} of {elements:,} choices between numbers that are equal but for rounding fell otherwise in the "
        "engine than in the reference; outputs were compared given the engine's choices"
    )
    return Settled(expected, checks, note)
