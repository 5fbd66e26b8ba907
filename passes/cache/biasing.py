"""From `bias_attention` steps to what is added to logits; refusals and emission."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from tokcc.config import LoadedPolicy, Step
from tokcc.errors import PlanError, PolicyError
from tokcc.ir.builder import Builder
from tokcc.passes.cache.bias import AttentionBias
from tokcc.passes.cache.plan import CachePlan, HeadGroup, PlannedBias
from tokcc.passes.cache.storage import CacheForm
from tokcc.passes.piece import resolve_piece
from tokcc.passes.unused_keys import refuse_keys

__all__ = ["biased", "plan_biases", "refuse_biases"]


def plan_biases(
    policy: LoadedPolicy,
    number: int,
    step: Step,
    layers: Sequence[int],
    heads: Mapping[int, tuple[int, ...]] | None,
    forms: Sequence[CacheForm],
    others: Sequence[PlannedBias],
) -> list[PlannedBias]:
    """Return what a step adds to the logits of its layers; nothing where it changes nothing.

    Args:
        policy: The policy.
        number: Index of the step.
        step: The step.
        layers: Its layers.
        heads: Its key heads by layer; None = all.
        forms: What the caches hold, by layer.
        others: What earlier steps add.

    Raises:
        PolicyError: The piece is unknown, a key means nothing here, or two steps are for one head.
    """
    why = "`node: bias_attention`, which leaves all tokens where they are"
    refuse_keys(policy, number, step, ("score", "select", "reduce", "store"), why)
    assert step.bias is not None
    bias: AttentionBias = resolve_piece(
        step.bias, AttentionBias, "cache.biases", policy.where(("steps", number, "bias"))
    )
    found = []
    for layer in layers if not bias.nothing else ():
        chosen = tuple(range(forms[layer].kv_heads)) if heads is None else heads.get(layer, ())
        for other in others:
            if other.layer == layer and {*other.heads} & {*chosen}:
                raise PolicyError(
                    f"two steps add to the logits of layer {layer}",
                    policy=policy.where(("steps", number)),
                    found=f"the other is {other.where}",
                    help="give the steps different layers, or different `heads`",
                )
        if chosen:
            found.append(PlannedBias(number, layer, step.name, policy.where(("steps", number)), bias, chosen))
    return found


def refuse_biases(plan: CachePlan) -> None:
    """Refuse biases where the token that they are about may be gone, and where an attention knows of none.

    Raises:
        PlanError: There is such a layer.
    """
    for planned in plan.biases:
        for why, help in _doubts(plan, planned):
            raise PlanError(
                f"`{planned.name}` cannot add to the logits of layer {planned.layer}: {why}",
                policy=planned.where,
                help=help,
            )


def _doubts(plan: CachePlan, planned: PlannedBias) -> Iterator[tuple[str, str]]:
    """Yield what speaks against a bias, and what to do about it."""
    layer, other = planned.layer, "give the steps different layers, or leave one out"
    if layer in plan.key_biases:
        yield "the model itself adds to the logits of its keys", "choose other layers"
    if layer in plan.sparse:
        yield f"`{plan.sparse[layer].name}` reads a part of the cache there, as it is", other
    if any(group.written_out for group in plan.groups(layer)):
        yield "another step turns its keys anew, or fills up what did not come to it", other
    if plan.prompt is not None:
        yield "another step makes prompts shorter, and reads attention as it is", other
    if not planned.bias.first:
        return
    for eviction in plan.of_layer(layer):
        if eviction.heads is not None and not {*eviction.heads} & {*planned.heads}:
            continue
        if eviction.reduce.fronted:
            yield f"`{eviction.name}` has an entry in front of the first token", other
        if eviction.sinks < 1:
            yield f"`{eviction.name}` may evict the first token", f"let it stay: `sinks: 1` in `{eviction.name}`"


def biased(b: Builder, bias: Any, group: HeadGroup, real: Any) -> Any:
    """Return what is added to the logits of a group of heads, fp32 ``[B, heads, L]``; None = nothing.

    Args:
        b: The builder.
        bias: What is added already; None = nothing.
        group: The heads.
        real: bool ``[B, L]``: slots that are not padding.
    """
    for planned in group.biases:
        mine = torch.tensor([[float(head in planned.heads)] for head in group.heads])
        own = b.mul(b.unsqueeze(planned.bias.emit(b, real), 1), b.constant("biased_heads", mine))
        bias = own if bias is None else b.add(bias, own)
    return bias
