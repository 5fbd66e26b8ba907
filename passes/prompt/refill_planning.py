"""From `reduce: {kind: recompute}` to the inputs with old entries; refusals happen here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from tokcc.analysis.cache_sites import CacheSite
from tokcc.analysis.rotation import Rotation, find_rotation
from tokcc.config import LoadedPolicy
from tokcc.errors import PlanError, PolicyError
from tokcc.ir.program import Program
from tokcc.passes.inputs import EngineInput
from tokcc.passes.prompt.plan import PlannedPrune
from tokcc.passes.prompt.refill_plan import OLD_PLACES, RefillPlan, old_name

__all__ = ["plan_refill"]

aten = torch.ops.aten

PLACES = EngineInput(
    OLD_PLACES,
    ("B", "R"),
    "positions at which the old keys of the call's first R tokens were turned; no columns = none",
    torch.int64,
    low=0,
    high=16,
)


def plan_refill(
    policy: LoadedPolicy, program: Program, sites: Sequence[CacheSite], prunes: Sequence[PlannedPrune]
) -> RefillPlan | None:
    """Return what stands for tokens that are not computed anew, or None where all that go are gone.

    Raises:
        PlanError: The model or its outputs cannot have it.
        PolicyError: Another step is beside this one, or the step does not fit.
    """
    own = [prune for prune in prunes if prune.reduce.refills]
    readers = [prune for prune in prunes if prune.score is not None and prune.score.reads_old]
    if not own:
        for prune in readers:
            raise PolicyError(
                f"`{prune.name}` reads old entries, and nothing takes them",
                policy=prune.where,
                needed="`reduce: {kind: recompute}`",
                help="add it to the step, or use another score",
            )
        return None
    prune = own[0]
    if len(prunes) > 1 or len(policy.policy.steps) > 1:
        raise PolicyError(
            f"`{prune.name}` fills up the caches of whole prompts, and another step changes prompts or caches",
            policy=prune.where,
            needed="one step, at one layer",
            found=f"{len(policy.policy.steps)} steps, {len(prunes)} cuts",
            help="leave the other steps out, and give this one a single layer",
        )
    step = policy.policy.steps[prune.step]
    if not prune.count.nothing:
        raise PolicyError(
            "caches keep every token: no budget says how many are computed anew",
            policy=policy.where(("steps", prune.step, "budget")),
            needed="`budget: {keep: 1.0}`, and the share in `reduce: {kind: recompute, share: ...}`",
            help="leave `budget` out, and give the preset's `share`",
        )
    if step.protect.segment is not None or prune.first or step.protect.last:
        raise PolicyError(
            f"`{prune.name}` takes no token out: nothing can be protected",
            policy=prune.where,
            help="leave `protect` out",
        )
    if prune.behind < 0:
        raise PlanError(
            "old entries are compared in a layer, and no layer is in front of the first",
            policy=prune.where,
            needed="a cut behind a layer",
            help="use `site: block_output`",
        )
    _refuse_outputs(policy, program, sites, prune)
    nodes = {node.name: node for node in program.graph.nodes}
    _refuse_positions(program, prune)
    entries: dict[tuple[int, str], EngineInput] = {}
    turns = {}
    for part in prune.score.reads_old if prune.score is not None else ():
        entries[prune.behind, part] = _entry(nodes, sites[prune.behind], part)
    for site in sites[prune.behind + 1 :]:
        for part in ("key", "value"):
            entries[site.layer, part] = _entry(nodes, site, part)
        rotation = find_rotation(program, nodes[site.new_key])
        if rotation is None:
            raise PlanError(
                f"old keys of layer {site.layer} cannot be moved to other positions",
                policy=prune.where,
                node=site.new_key,
                needed="keys that are turned by position (rotary embeddings) just before the cache",
                found="keys that depend on the positions in another way, or not at all",
                help="use a model with rotary embeddings: entries of this one hold at their old positions only",
            )
        if _scaled(rotation):
            raise PlanError(
                f"the rotary embeddings of layer {site.layer} also scale, and old keys would be scaled twice",
                policy=prune.where,
                node=site.new_key,
                needed="embeddings that turn and nothing else",
                found="cosines and sines times a number (YaRN's attention factor)",
                help="export the model without scaled embeddings, or use a method that keeps positions",
            )
        turns[site.layer] = rotation
    return RefillPlan(PLACES, entries, turns)


def _scaled(rotation: Rotation) -> bool:
    """Whether cosines and sines are multiplied by a number."""
    tables = (aten.cos.default, aten.sin.default)
    for node in rotation.nodes:
        if node.target in (aten.mul.Tensor, aten.mul.Scalar):
            made = any(isinstance(x, fx.Node) and x.target in tables for x in node.args)
            if made and any(isinstance(x, int | float) and x != 1 for x in node.args):
                return True
    return False


def _entry(nodes: dict[str, fx.Node], site: CacheSite, part: str) -> EngineInput:
    fake = nodes[site.past_key if part == "key" else site.past_value].meta["val"]
    return EngineInput(
        old_name(site.layer, part),
        ("B", int(fake.shape[1]), "R", int(fake.shape[3])),
        f"{part}s of layer {site.layer} of the call's first R tokens, as `present` holds them after a call with other"
        " tokens in front; no rows = none",
        fake.dtype,
    )


def _refuse_outputs(policy: LoadedPolicy, program: Program, sites: Sequence[CacheSite], prune: PlannedPrune) -> None:
    """Refuse outputs with a row for every token: most tokens never come to the end."""
    caches = {position for site in sites for position in (site.present_key, site.present_value)}
    wanted = policy.policy.outputs
    for i, position in enumerate(program.user_output_positions):
        name = program.output_names[i]
        contract = wanted.get(name, wanted.get("*", "full"))
        if position not in caches and contract != "last_token":
            raise PlanError(
                f"`{name}` cannot be `{contract}`: most tokens are not computed up to it",
                policy=prune.where,
                needed=f"`outputs: {{{name}: last_token}}`",
                help="the row that generation reads is all there is",
            )


def _refuse_positions(program: Program, prune: PlannedPrune) -> None:
    axes = [node.meta["val"].ndim for node in program.user_inputs if "position" in node.name]
    if axes != [2]:
        raise PlanError(
            "old keys cannot be moved to other positions",
            policy=prune.where,
            needed="`position_ids` [batch, tokens]",
            found=f"{axes[0]} axes" if axes else "no positions",
            help="export the decoder with `position_ids` of two axes",
        )
