"""The graph for TensorRT: standard operations within the rules of its builder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common as onnx_passes

from tokcc.backends.onnx import build_onnx
from tokcc.backends.tensorrt.plugins import DOMAINS, PluginNodes
from tokcc.backends.tensorrt.profiles import KINDS, Profile
from tokcc.backends.tensorrt.rules import Violation, violations, worst
from tokcc.config import LoadedPolicy
from tokcc.errors import LoweringError
from tokcc.ir.program import Program
from tokcc.lowering.onnx.target import Target

__all__ = ["TENSORRT", "Lowered", "lower", "policy_place", "refuse_violations", "target_for"]

TENSORRT = Target("TensorRT", branches=False, free_loops=False, lengths_by_value=False)
"""One form for all lengths: a branch of another length ends the builder, and its loops cut by constants only."""
_BFLOAT16_OPSET = 22
"""From here on convolutions and roundings have it in the standard."""


@dataclass(frozen=True)
class Lowered:
    """A graph for TensorRT.

    Attributes:
        model: It.
        profiles: The shapes that it is for.
        violations: What the builder does not take of it.
        opset: Version of the standard domain.
    """

    model: ir.Model
    profiles: tuple[Profile, ...]
    violations: tuple[Violation, ...]
    opset: int

    def legal(self, policy: LoadedPolicy) -> Lowered:
        """Return it, or refuse a graph that the builder does not take.

        Raises:
            LoweringError: Of the worst violation.
        """
        refuse_violations(self.violations, policy)
        return self


def lower(
    program: Program,
    profiles: Sequence[Profile],
    policy: LoadedPolicy,
    *,
    opset: int = 18,
    plugins: PluginNodes | None = None,
) -> Lowered:
    """Lower a program for TensorRT and hold the graph against its rules.

    Args:
        program: The (reduced) program.
        profiles: Shapes that the engine is made for.
        policy: For messages.
        opset: Version of the standard domain, at least; bfloat16 wants a later one.
        plugins: Takes operations over; its uses are what the graph needs then.

    Raises:
        LoweringError: An operation has no form, with the policy step that brought it.
    """
    if any(tensor.dtype == torch.bfloat16 for tensor in program.state_tensors().values()):
        opset = max(opset, _BFLOAT16_OPSET)
    try:
        model = build_onnx(program, opset=opset, target=target_for(program, profiles, plugins))
    except LoweringError as error:
        raise _placed(error, policy) from error
    onnx_passes.ShapeInferencePass()(model)  # types of values between the program's own
    return Lowered(model, tuple(profiles), tuple(violations(model, _bindings(program, profiles))), opset)


def target_for(program: Program, profiles: Sequence[Profile], plugins: PluginNodes | None = None) -> Target:
    """Return what a graph for these shapes may hold."""
    target = replace(TENSORRT, sizes=tuple(_bindings(program, profiles).values()))
    return target if plugins is None else replace(target, forms=plugins.forms(), domains=DOMAINS)


def _bindings(program: Program, profiles: Sequence[Profile]) -> dict[str, dict[Any, int]]:
    """Return every size symbol at each shape of each profile, by what the shape is called."""
    return {
        kind if len(profiles) == 1 else f"{kind} ({profile.name})": program.bindings(profile.at(kind))
        for profile in profiles
        for kind in KINDS
    }


def _placed(error: LoweringError, policy: LoadedPolicy) -> LoweringError:
    """Return the error with the place of the policy step, which its node names."""
    label = re.search(r"\((\S+@\d+)\)", error.node or "")
    if error.policy is not None or label is None:
        return error
    where = policy_place(label[1], policy)
    return LoweringError(
        error.what, policy=where, node=error.node, needed=error.needed, found=error.found, help=error.help
    )


def refuse_violations(found: Sequence[Violation], policy: LoadedPolicy) -> None:
    """Refuse a graph that the builder does not take.

    Raises:
        LoweringError: Naming the policy step where one brought the node.
    """
    if not found:
        return
    first = worst(found)
    more = f" (and {len(found) - 1} more: `tokcc inspect --backend tensorrt` lists them)" if len(found) > 1 else ""
    raise LoweringError(
        f"TensorRT does not take the graph: {first.what}{more}",
        policy=policy_place(first.step, policy),
        node=f"{first.node} ({first.op})",
        needed=first.needed,
        found=first.found,
        help=first.help,
    )


def policy_place(label: str | None, policy: LoadedPolicy) -> str | None:
    """Return where the policy has the step of a label such as ``evit@3``; None where no step brought it.

    What a decoder's cache needs has labels of its own (``write@3``): those belong to the only step, or to the policy.
    """
    if label is None:
        return None
    name, steps = label.split("@")[0], policy.policy.steps
    for number, step in enumerate(steps):
        if step.name == name or len(steps) == 1:
            return policy.where(("steps", number))
    return policy.origin
