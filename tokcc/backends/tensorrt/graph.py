"""The graph for TensorRT: standard operations within the rules of its builder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common as onnx_passes

from tokcc.backends.onnx import build_onnx
from tokcc.backends.tensorrt.plugins import DOMAINS, PluginNodes
from tokcc.backends.tensorrt.profiles import KINDS, Profile
from tokcc.backends.tensorrt.rules import Violation, violations, worst
from tokcc.config import LoadedPolicy
from tokcc.errors import LoweringError
from tokcc.ir.program import Program
from tokcc.lowering.onnx.target import Target

__all__ = ["TENSORRT", "build_tensorrt", "lower", "policy_place", "refuse_violations", "target_for"]

TENSORRT = Target("TensorRT", branches=False, free_loops=False, lengths_by_value=False)
"""One form for all lengths: a branch of another length ends the builder, and its loops cut by constants only."""


def build_tensorrt(
    program: Program,
    profiles: Sequence[Profile],
    policy: LoadedPolicy,
    *,
    opset: int = 18,
    metadata: Mapping[str, Any] | None = None,
    plugins: PluginNodes | None = None,
) -> ir.Model:
    """Lower a program for TensorRT and refuse what its builder does not take. Arguments and errors as for `lower`."""
    model, found = lower(program, profiles, policy, opset=opset, metadata=metadata, plugins=plugins)
    refuse_violations(found, policy)
    return model


def lower(
    program: Program,
    profiles: Sequence[Profile],
    policy: LoadedPolicy,
    *,
    opset: int = 18,
    metadata: Mapping[str, Any] | None = None,
    plugins: PluginNodes | None = None,
) -> tuple[ir.Model, list[Violation]]:
    """Lower a program for TensorRT and hold the graph against its rules.

    Args:
        program: The (reduced) program.
        profiles: Shapes that the engine is made for.
        policy: For messages.
        opset: Version of the standard domain.
        metadata: Written to ``metadata_props``.
        plugins: Takes operations over; its uses are what the graph needs then.

    Returns:
        The graph, and what TensorRT does not take of it.

    Raises:
        LoweringError: An operation has no form, with the policy step that brought it.
    """
    try:
        model = build_onnx(program, opset=opset, metadata=metadata, target=target_for(program, profiles, plugins))
    except LoweringError as error:
        raise _placed(error, policy) from error
    onnx_passes.ShapeInferencePass()(model)  # types of values between the program's own
    return model, violations(model, _bindings(program, profiles))


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
