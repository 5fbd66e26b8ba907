"""How long the caches of a decoder get, by how long its texts may be."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokcc.analysis.sizes import known_number
from tokcc.errors import PlanError
from tokcc.ir.program import Program

__all__ = ["MASK", "PAST", "Sizes", "cache_lengths", "token_size", "tokens_name"]

PAST, _PRESENT = "past_key_values.", "present."
_TOKENS = ("input_ids", "inputs_embeds")
MASK = "attention_mask"
_STEPS = 40
"""Single tokens that are counted through, to see whether a cache goes on growing."""
Sizes = Mapping[Any, tuple[int, int, int]]
"""Smallest, usual and largest value by size symbol."""


def tokens_name(inputs: Container[str]) -> str | None:
    """Return the input that has the new tokens of a call; None = the model has none."""
    return next((name for name in _TOKENS if name in inputs), None)


def token_size(inputs: Mapping[str, Sequence[Any]]) -> Any:
    """Return the symbol of how many tokens a call has; None where that is fixed."""
    name = tokens_name(inputs)
    return None if name is None else _symbol(inputs[name][1])


def cache_lengths(program: Program, inputs: Mapping[str, Sequence[Any]], sizes: Sizes) -> dict[Any, Any]:
    """Return the sizes of caches: what a call leaves is what the next one has.

    A text of as many tokens as the mask has is read in one call, or token by token: some methods shorten prompts only,
    and let a cache grow from there. Where what is left does not follow from sizes, it is as long as the text.

    Args:
        program: The decoder.
        inputs: Shapes of all inputs.
        sizes: What is known.

    Raises:
        PlanError: Which cache is long depends on how the text was read.
    """
    mask, token = None if MASK not in inputs else _symbol(inputs[MASK][1]), token_size(inputs)
    name = tokens_name(inputs)
    tokens = None if name is None else inputs[name][1]
    if mask is None or mask not in sizes or (token not in sizes and not isinstance(tokens, int)):
        return {}
    # Asking a symbolic size for its number would fix it for good.
    new: Sequence[int] = (tokens,) * 3 if isinstance(tokens, int) else sizes[token]
    # Before a call that adds as few tokens as may be, except for the shortest text.
    least, usual, most = (
        max(sizes[mask][0] - new[2], 0),
        max(sizes[mask][1] - new[1], 1),
        max(sizes[mask][2] - new[0], 1),
    )
    caches = _Caches.of(program, inputs, {symbol: three[1] for symbol, three in sizes.items()}, token, mask)
    smallest = [caches.behind(least), caches.one_by_one(least)]
    largest = [caches.behind(most), caches.one_by_one(most)]
    common = caches.behind(usual)
    _refuse_mixed(inputs, *largest)
    return {
        symbol: tuple(
            sorted(
                (
                    min(each.get(symbol, least) for each in smallest),
                    common.get(symbol, usual),
                    max(each.get(symbol, most) for each in largest),
                )
            )
        )
        for symbol in caches.symbols
    }


def _refuse_mixed(inputs: Mapping[str, Sequence[Any]], whole: Mapping[Any, int], single: Mapping[Any, int]) -> None:
    """Refuse caches of which one is longest where texts are read whole, and another where they are read by token."""
    longer = [symbol for symbol, size in whole.items() if size > single.get(symbol, size)]
    shorter = [symbol for symbol, size in whole.items() if size < single.get(symbol, size)]
    if not (longer and shorter):
        return
    named = {_symbol(size): f"{name} axis {axis}" for name, shape in inputs.items() for axis, size in enumerate(shape)}
    one, other = longer[0], shorter[0]
    raise PlanError(
        "which of a layer's caches is long depends on how a text was read, and TensorRT wants one longest shape",
        needed="lengths that go together",
        found=f"{named[one]}: {whole[one]} or {single[one]}, {named[other]}: {whole[other]} or {single[other]}",
        help="give the shapes of both caches (`--max-shapes`), or use `--backend onnx`",
    )


@dataclass(frozen=True)
class _Caches:
    """How the caches of a decoder grow.

    Attributes:
        symbols: Of their sizes.
        left: What a call leaves, by symbol; symbols that nothing is known of are missing.
        program: The decoder.
        usual: Other sizes.
        token: The symbol of new tokens; None = that number is fixed.
        mask: The symbol of all tokens.
    """

    symbols: tuple[Any, ...]
    left: Mapping[Any, Any]
    program: Program
    usual: Mapping[Any, int]
    token: Any
    mask: Any

    @classmethod
    def of(
        cls, program: Program, inputs: Mapping[str, Sequence[Any]], usual: Mapping[Any, int], token: Any, mask: Any
    ) -> _Caches:
        """Pair every cache with the output that takes its place in the next call."""
        outputs = dict(zip(program.output_names, program.output_values, strict=True))
        symbols: dict[Any, None] = {}
        left: dict[Any, Any] = {}
        for name, shape in inputs.items():
            if not name.startswith(PAST):
                continue
            made = outputs.get(name.replace(PAST, _PRESENT))
            fake = getattr(made, "meta", {}).get("val")
            for axis, size in enumerate(shape):
                symbol = _symbol(size)
                if symbol is None or symbol in usual:
                    continue
                symbols[symbol] = None
                if fake is not None and fake.ndim == len(shape):
                    left.setdefault(symbol, fake.shape[axis])
        return cls(tuple(symbols), left, program, usual, token, mask)

    def behind(self, tokens: int) -> dict[Any, int]:
        """Return the sizes behind a text that is read in one call."""
        return self._after([tokens] if tokens else [])[-1]

    def one_by_one(self, tokens: int) -> dict[Any, int]:
        """Return the sizes behind a text that is read token by token; from `_STEPS` on they go on as they did."""
        states = self._after([1] * min(tokens, _STEPS))
        last, beyond = states[-1], tokens - _STEPS
        if beyond <= 0:
            return last
        steps = _STEPS - _STEPS // 2
        before = states[_STEPS // 2]
        return {
            symbol: min(size + -(-(size - before[symbol]) * beyond // steps), tokens) for symbol, size in last.items()
        }

    def _after(self, calls: Sequence[int]) -> list[dict[Any, int]]:
        """Return the sizes before the first call and behind each one, by its new tokens."""
        states = [dict.fromkeys(self.left, 0)]
        total = 0
        for new in calls:
            total += new
            values = {**self.usual, **states[-1], self.mask: total} | ({} if self.token is None else {self.token: new})
            values = self.program.settled(values)
            left = {symbol: known_number(size, values) for symbol, size in self.left.items()}
            states.append({symbol: max(size, 0) for symbol, size in left.items() if size is not None})
        return states


def _symbol(size: Any) -> Any:
    return None if isinstance(size, int) else size.node.expr
