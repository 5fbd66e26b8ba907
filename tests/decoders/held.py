"""Caches that are held in a form of their own: the engine against an oracle that holds what the engine's tensors say.

Rounding to a few steps turns a difference in the last bit into a whole step, and every later logit then differs a
little. So nothing is compared at the end of a chain: after every call the engine's tensors are read by the test's own
reader, which says whether they are what the formula makes of the oracle's exact entries (but for numbers that lie
between two steps), and the oracle goes on with the entries that were read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tests.decoders.engine import Engine, build, tokens
from tests.decoders.oracle import Rule, run_alone
from tests.decoders.tiny import model_of

__all__ = ["CALLS", "Entries", "Reader", "assert_equals_held", "assert_near", "assert_on_grid"]

CALLS = (9, 1, 1, 5, *[1] * 64)
"""A prompt, single tokens, a second piece of text, and a generation."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Entries:
    """The entries of one layer and row after a call, as the oracle has them.

    Attributes:
        key: fp64 ``[Hkv, K, D]``: what an earlier call left, and what this one brought.
        value: The same for values.
        fresh: bool ``[Hkv, K]``: brought by this call.
        padding: Slots in front of the row that hold no token, as long as nothing was evicted.
        call: Which call, from 0.
        layer: Which layer.
    """

    key: Array
    value: Array
    fresh: Array
    padding: int
    call: int
    layer: int


class Reader(Protocol):
    """Reads the engine's tensors of one layer and row, asserts that they are right, and returns keys and values."""

    def __call__(self, held: Mapping[str, Array], entries: Entries) -> tuple[Array, Array]: ...


def assert_equals_held(
    family: str,
    policy: Mapping[str, Any] | str,
    reader: Reader,
    folder: Path,
    *,
    rule: Rule | None = None,
    calls: Sequence[int] = CALLS,
    padding: Sequence[int] = (0, 3, 5),
    tolerance: float = 2e-4,
) -> Engine:
    """Every row of a padded batch gives the logits that it gives alone with the entries that its tensors hold."""
    engine = build(family, policy, folder)
    ids, mask = _tokens(sum(calls), padding)
    results = list(engine.each(ids, mask, calls))
    logits = np.concatenate([result["logits"] for result in results], 1)
    for row, count in enumerate(padding):
        starts = np.cumsum([0, calls[0] - count, *calls[1:]])

        def hold(
            call: int, layer: int, key: Tensor, value: Tensor, positions: Tensor, row: int = row, begin: Any = starts
        ) -> tuple[Tensor, Tensor]:
            prefix = f"present.{layer}."
            held = {n.removeprefix(prefix): x[row] for n, x in results[call].items() if n.startswith(prefix)}
            fresh = (positions >= begin[call]).numpy()
            exact = Entries(key.double().numpy(), value.double().numpy(), fresh, padding[row], call, layer)
            made = reader(held, exact)
            return tuple(torch.from_numpy(x).to(key.dtype) for x in made)  # type: ignore[return-value]

        alone = run_alone(
            model_of(family), ids[row, count:], [calls[0] - count, *calls[1:]], rule, holding=hold
        ).logits.numpy()
        np.testing.assert_allclose(logits[row, count:], alone, rtol=0, atol=tolerance * float(np.abs(alone).max()))
    return engine


def assert_near(
    family: str, policy: Mapping[str, Any] | str, folder: Path, *, share: float, rule: Rule | None = None
) -> None:
    """The logits of a free run are those of exact entries, within a share of their scale on average."""
    ids, mask = _tokens(sum(CALLS), (0,))
    logits, _ = build(family, policy, folder).run(ids, mask, CALLS)
    alone = run_alone(model_of(family), ids[0], CALLS, rule).logits.numpy()
    difference = np.abs(logits[0] - alone).mean()
    assert difference <= share * np.abs(alone).mean(), difference / np.abs(alone).mean()


def assert_on_grid(
    numbers: Array, step: Array, low: Array, codes: Array, bits: int, *, noise: float = 1e-5, what: str = ""
) -> None:
    """The grid is that of the numbers, and each code is the nearest to its number.

    Args:
        numbers: Exact, ``[n, g]``: a grid for each of the n groups; NaN = padding.
        step: ``[n]``, fp16.
        low: ``[n]``, fp16.
        codes: ``[n, g]``.
        bits: Of a code.
        noise: What the numbers may be off by, as a share of the largest.
        what: For messages.
    """
    top = 2**bits - 1
    for group in range(len(numbers)):
        real = ~np.isnan(numbers[group])
        x = numbers[group][real]
        if not len(x):
            continue
        least, most = x.min(), x.max()
        off = noise * np.nanmax(np.abs(numbers))
        wanted = max((most - least) / top, 2.0**-20)
        # One rounding to fp16: 2^-11 of the number, or half of the smallest fp16.
        assert abs(float(low[group]) - least) <= 2.0**-11 * abs(least) + off + 2.0**-25, (what, group)
        assert abs(float(step[group]) - wanted) <= 2.0**-11 * wanted + 2 * off / top + 2.0**-25, (what, group)
        place = np.clip((x - float(low[group])) / float(step[group]), 0, top)
        worst = np.abs(codes[group][real] - place).max()
        assert worst <= 0.5 + off / float(step[group]), (what, group, worst)


def _tokens(length: int, padding: Sequence[int]) -> tuple[Tensor, Tensor]:
    return tokens(len(padding), length, padding)
