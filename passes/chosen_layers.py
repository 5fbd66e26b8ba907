"""The layers that a step of a policy names."""

from __future__ import annotations

from tokcc.config import LoadedPolicy, Step
from tokcc.errors import PlanError

__all__ = ["chosen_layers"]


def chosen_layers(policy: LoadedPolicy, number: int, step: Step, depth: int) -> tuple[int, ...]:
    """Resolve ``at.layers``.

    Args:
        policy: The policy.
        number: Place of the step.
        step: It.
        depth: Layers of the model.

    Raises:
        PlanError: There is no such layer.
    """
    try:
        return step.at.resolve(depth)
    except ValueError as error:
        raise PlanError(
            str(error),
            policy=policy.where(("steps", number, "at", "layers")),
            needed=f"layers between 0 and {depth - 1}: the model has {depth}",
            help="`tokcc inspect MODEL` lists the layers",
        ) from error
