"""Layers that a piece reads beside the cut's own."""

from __future__ import annotations

from tokcc.config import At
from tokcc.passes.cut import Cut

__all__ = ["LayerChoice", "chosen_layer", "later_layer", "read_layer"]

LayerChoice = int | float | None
"""A layer from 0, from the end (negative), at a fraction of the depth, or None for the cut's own."""


def chosen_layer(choice: LayerChoice, layer: int, num_layers: int) -> int:
    """Return the number of the layer that is read.

    Args:
        choice: What the policy says.
        layer: The cut's layer.
        num_layers: Depth of the model.

    Raises:
        ValueError: The model has no such layer, or it runs behind the cut.
    """
    if choice is None:
        return layer
    number = _number(choice, num_layers)
    if number > layer:
        raise ValueError(f"layer {number} runs behind the cut at layer {layer}")
    return number


def later_layer(choice: float, behind: int, num_layers: int) -> int:
    """Return the number of a layer that runs behind a cut.

    Args:
        choice: What the policy says.
        behind: The last layer in front of the cut, -1 for none.
        num_layers: Depth of the model.

    Raises:
        ValueError: The model has no such layer, or it runs in front of the cut.
    """
    number = _number(choice, num_layers)
    if number <= behind:
        raise ValueError(f"layer {number} runs in front of the cut behind layer {behind}")
    return number


def _number(choice: float, num_layers: int) -> int:
    return At(layers=[int(choice) if choice == int(choice) else choice]).resolve(num_layers)[0]


def read_layer(choice: LayerChoice, cut: Cut) -> int:
    """Return the same at a cut; what cannot be read is refused."""
    try:
        return chosen_layer(choice, cut.layer, cut.num_layers)
    except ValueError as error:
        cut.ctx.fail(f"the score reads another layer: {error}", help="choose a layer up to that of the step")
