"""The one error hierarchy of tokcc.

Every error says, like a good compiler's: what happened, at which pipeline stage, where in the policy and in the graph,
what was needed, what was found, and what to do about it. Each class carries the exit code of the command line.
"""

from __future__ import annotations

from typing import ClassVar, Self

__all__ = [
    "AxisError",
    "CaptureError",
    "GateError",
    "LoadError",
    "LoweringError",
    "OutputError",
    "ParityError",
    "PlanError",
    "PolicyError",
    "SpeedGateError",
    "TokccError",
    "UsageError",
    "VerifyError",
]


class TokccError(Exception):
    """Base of all errors that a user can meet.

    Args:
        what: One line, lower case, no full stop: what went wrong.
        policy: Where in the policy, for instance ``policy.yaml:4  step 1 `tome```.
        node: Where in the graph: node name, module path, shapes.
        needed: What the stage required.
        found: What it got.
        help: What the user can do.
    """

    stage: ClassVar[str] = "tokcc"
    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        what: str,
        *,
        policy: str | None = None,
        node: str | None = None,
        needed: str | None = None,
        found: str | None = None,
        help: str | None = None,
    ) -> None:
        self.what = what
        self.policy = policy
        self.node = node
        self.needed = needed
        self.found = found
        self.help = help
        super().__init__(self.render())

    def about(self, what: str, *, policy: str, help: str | None = None) -> Self:
        """Return the same error as one of a policy's step: what it means there, and what helps."""
        return type(self)(
            f"{what}: {self.what}",
            policy=policy,
            node=self.node,
            needed=self.needed,
            found=self.found,
            help=help or self.help,
        )

    def details(self) -> dict[str, str]:
        """Return the labelled lines that are set, in the order they are shown."""
        lines = {
            "stage": self.stage,
            "policy": self.policy,
            "node": self.node,
            "needed": self.needed,
            "found": self.found,
            "help": self.help,
        }
        return {key: value for key, value in lines.items() if value}

    def render(self) -> str:
        """Return the error as plain text, one labelled line per fact."""
        head = f"error[{type(self).__name__}]: {self.what}"
        return "\n".join([head, *(f"  {key:<7} {value}" for key, value in self.details().items())])

    def __str__(self) -> str:
        return self.render()


class UsageError(TokccError):
    """A command or call is used wrongly (flags, paths, existing output)."""

    stage = "usage"
    exit_code = 2


class PolicyError(TokccError):
    """The policy cannot be read or does not validate."""

    stage = "policy"
    exit_code = 2


class LoadError(TokccError):
    """The model cannot be loaded."""

    stage = "load"
    exit_code = 3


class CaptureError(TokccError):
    """The model loads but cannot be traced."""

    stage = "capture"
    exit_code = 3


class PlanError(TokccError):
    """The policy is valid but cannot be applied to this model."""

    stage = "plan"
    exit_code = 4


class AxisError(TokccError):
    """A node uses the token axis in a way that a reduced token set does not allow."""

    stage = "propagate"
    exit_code = 4


class VerifyError(TokccError):
    """A pass produced a malformed program: a defect of tokcc, not of the input."""

    stage = "verify"
    exit_code = 4


class LoweringError(TokccError):
    """A backend cannot express or build the program."""

    stage = "lower"
    exit_code = 5


class OutputError(TokccError):
    """The bundle cannot be written (permissions, full disk)."""

    stage = "emit"
    exit_code = 5


class ParityError(TokccError):
    """The engine's outputs differ from the reference."""

    stage = "verify"
    exit_code = 6


class GateError(TokccError):
    """An accuracy gate was missed. The bundle is kept, marked."""

    stage = "calibrate"
    exit_code = 7


class SpeedGateError(GateError):
    """A speed gate was missed. The bundle is kept, marked."""

    exit_code = 8
