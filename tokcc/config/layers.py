"""Where a step acts: which layers and at which site of a block."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from tokcc.config.checks import Strict, nearest, problem, whole

__all__ = ["At", "Site"]

Site = Literal["block_input", "after_attention", "block_output", "encoder_output", "projector_output", "scan_input"]

_RANGE = re.compile(r"\s*(-?\d+)?\s*:\s*(-?\d+)?\s*(?::\s*([1-9]\d*)?\s*)?")
_WORDS = ("all", "even", "odd")
_NEEDED = (
    '"all", "even", "odd", a range such as "4:", "2:10" or "1::3", '
    "or a list of layers, ranges and fractions between 0 and 1"
)


def _check_item(item: Any) -> int | float | str:
    if isinstance(item, bool):
        raise problem("not a layer", needed=_NEEDED)
    if isinstance(item, int):
        return item
    if isinstance(item, float):
        if not 0 < item < 1:
            raise problem(
                "a fraction chooses the layer at that share of the depth", needed="a fraction above 0 and below 1"
            )
        return item
    if isinstance(item, str):
        if item in _WORDS:
            return item
        if _RANGE.fullmatch(item):
            return item
        close = nearest(item, _WORDS)
        raise problem("not a layer", needed=_NEEDED, hint=f"did you mean `{close}`?" if close else None)
    raise problem("not a layer", needed=_NEEDED)


def _check_layers(value: Any) -> Any:
    if isinstance(value, list | tuple):
        if not value:
            raise problem("no layer is chosen", needed=_NEEDED, hint="leave the step out, or use the policy `none`")
        return tuple(_check_item(item) for item in value)
    item = _check_item(value)
    return item if isinstance(item, str) else (item,)


class At(Strict):
    """The layers of a step and the site inside each.

    Attributes:
        layers: ``all``, ``even``, ``odd``, a range (``4:``, ``2:10``, ``:6``), or a list of layer numbers, ranges and
            fractions of the depth. Layers count from 0; negative ones count from the end.
        site: Where in the block the node goes.
        part: Of a model that is compiled in parts. By default caches are the decoder's and all else is the encoder's.
        stage: For sparse attention: calls with several tokens, with one, or both.
        length: For sparse attention: calls that see at least so many tokens; shorter ones stay dense.
    """

    layers: Annotated[str | tuple[int | float | str, ...], BeforeValidator(_check_layers)] = "all"
    site: Site = "after_attention"
    part: Literal["encoder", "decoder"] | None = None
    stage: Literal["prefill", "decode", "both"] | None = None
    length: Annotated[int | None, whole(least=0)] = None

    def resolve(self, num_layers: int) -> tuple[int, ...]:
        """Return the chosen layer numbers of a model, sorted.

        Args:
            num_layers: How many transformer blocks the model has.

        Raises:
            ValueError: A layer does not exist in the model, is chosen twice, or nothing is chosen.
        """
        items = (self.layers,) if isinstance(self.layers, str) else self.layers
        chosen: list[int] = []
        for item in items:
            # In a shallow model two fractions of the depth may be the same layer, which is no contradiction.
            repeated = chosen if isinstance(item, float) else []
            chosen.extend(layer for layer in _expand(item, num_layers) if layer not in repeated)
        twice = sorted({layer for layer in chosen if chosen.count(layer) > 1})
        if twice:
            raise ValueError(f"layer {twice[0]} is chosen twice (the model has {num_layers} layers)")
        if not chosen:
            raise ValueError(f"no layer is chosen (the model has {num_layers} layers)")
        return tuple(sorted(chosen))


def _expand(item: int | float | str, num_layers: int) -> range | tuple[int]:
    if isinstance(item, float):
        # The tiny offset keeps 0.1 * 30 at layer 3 in spite of binary rounding.
        return (int(item * num_layers + 1e-9),)
    if isinstance(item, int):
        return (_absolute(item, num_layers, num_layers - 1),)
    if item in _WORDS:
        return range(1 if item == "odd" else 0, num_layers, 1 if item == "all" else 2)
    match = _RANGE.fullmatch(item)
    if match is None:
        raise ValueError(f"`{item}` is not a range of layers")
    start = 0 if match[1] is None else _absolute(int(match[1]), num_layers, num_layers)
    stop = num_layers if match[2] is None else _absolute(int(match[2]), num_layers, num_layers)
    return range(start, stop, int(match[3] or 1))


def _absolute(layer: int, num_layers: int, last: int) -> int:
    counted = layer + num_layers if layer < 0 else layer
    if not 0 <= counted <= last:
        raise ValueError(f"layer {layer} does not exist: the model has {num_layers} layers, 0 to {num_layers - 1}")
    return counted
