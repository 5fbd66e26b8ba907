"""Is an engine equal to its reference, and if not: wrong, or rounded the other way where two were equal?"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tokcc.backends.decisions import decisions, replay, watching
from tokcc.backends.feeds import Feeds
from tokcc.backends.parity import Check, Tolerance, check_parity, computed_in, numpy_feeds, refuse_difference
from tokcc.backends.sessions import EngineSession, ending, open_engine
from tokcc.ir.program import Program
from tokcc.progress import Advance

__all__ = ["Checked", "Settled", "check_engine", "settle"]


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


@dataclass(frozen=True)
class Checked:
    """An engine that equals its reference.

    Attributes:
        checks: By output.
        expected: The reference's outputs, given the engine's choices.
        note: For the report; None where the engine chose as the reference did.
    """

    checks: list[Check]
    expected: Sequence[Sequence[torch.Tensor]]
    note: str | None = None


def check_engine(
    backend: str,
    reference: Program,
    lowered: Program,
    engine: Path,
    inputs: Sequence[Feeds],
    expected: Sequence[Sequence[torch.Tensor]],
    build: Callable[[Program, Path], object],
    tolerance: Tolerance,
    advance: Advance,
    opened: Callable[[Path], EngineSession] = open_engine,
) -> Checked:
    """Hold an engine against its reference.

    Args:
        backend: What made it.
        reference: The reduced program.
        lowered: What the engine was made from.
        engine: The engine.
        inputs: What to run on.
        expected: The reference's outputs for each.
        build: Writes an engine of a program as this one was written.
        tolerance: What counts as equal.
        advance: Told after each input.
        opened: Loads an engine.

    Raises:
        ParityError: It differs by more than rounding.
    """
    names = list(reference.output_names)
    checks = check_parity(opened(engine).run, names, inputs, expected, tolerance, advance, computed_in(reference))
    found, why = Checked(checks, expected), None
    if not all(check.passed for check in checks):
        settled = settle(reference, lowered, engine, names, inputs, build, tolerance, opened)
        if isinstance(settled, str):
            why = settled
        else:
            found = Checked(settled.checks, settled.expected, settled.note)
    refuse_difference(backend, found.checks, why)
    return found


def settle(
    reference: Program,
    lowered: Program,
    engine: Path,
    names: Sequence[str],
    inputs: Sequence[Feeds],
    build: Callable[[Program, Path], object],
    tolerance: Tolerance,
    opened: Callable[[Path], EngineSession] = open_engine,
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
        opened: Loads an engine.

    Returns:
        The comparison; or, where a choice is not one that rounding explains, why.
    """
    known = {decision.output: decision for decision in decisions(reference)}
    watched = [decision for decision in decisions(lowered) if decision.output in known]
    if not watched:
        return "the model makes no choices"
    expected: list[list[torch.Tensor]] = []
    differing = elements = 0
    session = opened(engine)
    with tempfile.TemporaryDirectory(dir=engine.parent, prefix=".decisions-") as folder:
        path = Path(folder) / f"watched{ending(engine)}"
        build(watching(lowered, watched), path)
        showing = opened(path)
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
    checks = check_parity(session.run, names, inputs, expected, tolerance, made_in=computed_in(reference))
    note = (
        f"{differing} of {elements:,} choices between numbers that are equal but for rounding fell otherwise in the "
        "engine than in the reference; outputs were compared given the engine's choices"
    )
    return Settled(expected, checks, note)
