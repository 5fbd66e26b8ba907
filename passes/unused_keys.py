"""Keys of a policy's step that mean nothing to it."""

from __future__ import annotations

from collections.abc import Sequence

from tokcc.config import LoadedPolicy, Step
from tokcc.errors import PolicyError

__all__ = ["refuse_keys"]


def refuse_keys(policy: LoadedPolicy, number: int, step: Step, keys: Sequence[str], why: str) -> None:
    """Refuse keys that belong to other steps.

    Args:
        policy: The policy.
        number: Place of the step.
        step: It.
        keys: What it may not have.
        why: What they do not go with.

    Raises:
        PolicyError: It has one.
    """
    for key in keys:
        if getattr(step, key) is not None:
            raise PolicyError(
                f"`{key}` does not go with {why}", policy=policy.where(("steps", number, key)), help="leave it out"
            )
