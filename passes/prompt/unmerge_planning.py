"""From an `unmerge` step and a decoder to what its attention runs over; refusals happen here."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from tokcc.analysis.cache_masks import mask_input
from tokcc.analysis.cache_sites import CacheSite
from tokcc.analysis.decoder_cuts import decoder_cuts
from tokcc.analysis.rotation import Rotation, find_rotation
from tokcc.config import LoadedPolicy
from tokcc.config.policy import Protect
from tokcc.errors import PlanError, PolicyError
from tokcc.ir.program import Program
from tokcc.passes.prompt.plan import PromptPlan
from tokcc.passes.prompt.unmerge_plan import TOKEN_ASSIGN, UnmergePlan

__all__ = ["plan_unmerge"]


def plan_unmerge(policy: LoadedPolicy, program: Program, sites: Sequence[CacheSite]) -> PromptPlan | None:
    """Return the plan of a policy's `unmerge` step, or None where there is none.

    Raises:
        PlanError: The decoder cannot attend to tokens that share rows.
        PolicyError: Another step is beside this one, or the step says more than which method it is.
    """
    numbers = [i for i, step in enumerate(policy.policy.steps) if step.node == "unmerge"]
    if not numbers:
        return None
    number = numbers[0]
    _refuse_policy(policy, number)
    where = policy.where(("steps", number))
    mask = mask_input(program, sites)
    lengths = [node.meta["val"].shape[1] for node in program.user_inputs if node.name == mask]
    if not lengths or isinstance(lengths[0], int):
        raise PlanError(
            "the decoder does not say which tokens are padding",
            policy=where,
            needed="an input `attention_mask` [batch, all tokens so far] whose length varies",
            found=f"a length of {lengths[0]}" if lengths else "no such input",
            help="export the decoder with a mask of dynamic length",
        )
    nodes = {node.name: node for node in program.graph.nodes}
    turns = {site.layer: _turns(program, nodes, site, where) for site in sites}
    past = {name for site in sites for name in (site.past_key, site.past_value)}
    (positions,) = {rotation.positions.name for pair in turns.values() for rotation in pair}
    tokens = [node for node in program.user_inputs if node.name not in {*past, mask, positions}]
    return PromptPlan(
        (),
        (),
        decoder_cuts(program, sites),
        (TOKEN_ASSIGN,),
        unmerge=UnmergePlan(tuple(node.name for node in tokens), turns),
    )


def _turns(program: Program, nodes: dict[str, fx.Node], site: CacheSite, where: str) -> tuple[Rotation, Rotation]:
    found = [find_rotation(program, nodes[name]) for name in (site.query, site.new_key)]
    query, key = found
    if query is None or key is None:
        raise PlanError(
            f"tokens that share a row cannot have positions of their own in layer {site.layer}",
            policy=where,
            node=site.query if query is None else site.new_key,
            needed="queries and keys that are turned by position (rotary embeddings) just before the attention",
            found="positions that come into the model in another way, or not at all",
            help="use a model with rotary embeddings, or give its tokens back in the encoder (`restore: unmerge`)",
        )
    return query, key


def _refuse_policy(policy: LoadedPolicy, number: int) -> None:
    step = policy.policy.steps[number]
    if len(policy.policy.steps) > 1:
        raise PolicyError(
            f"`{step.name}` gives all layers another prompt than the model has rows for, and another step is beside it",
            policy=policy.where(("steps", number)),
            needed="one step for the decoder",
            found=", ".join(other.name for other in policy.policy.steps),
            help="leave the other steps out; what an encoder merges is no step of the decoder",
        )
    if step.at.layers != "all":
        raise PlanError(
            "tokens share rows in every layer or in none",
            policy=policy.where(("steps", number, "at", "layers")),
            needed="`layers: all`",
            found=str(step.at.layers),
            help="leave `at.layers` out",
        )
    said = {
        "score": step.score,
        "select": step.select,
        "reduce": step.reduce,
        "heads": step.heads,
        "store": step.store,
        "protect": step.protect if step.protect != Protect() else None,
        "positions": step.positions if step.positions != "keep" else None,
        "restore": step.restore if step.restore != "none" else None,
        "budget": step.budget if step.budget.keep != 1.0 else None,
    }
    for key, value in said.items():
        if value is not None:
            raise PolicyError(
                f"`{step.name}` takes no `{key}`: an input says which tokens share a row",
                policy=policy.where(("steps", number, key)),
                help=f"leave `{key}` out",
            )
    if policy.policy.kv.layout == "slots":
        raise PlanError(
            "`kv: {layout: slots}` cannot be combined with tokens that share rows",
            policy=policy.where(("steps", number)),
            needed="the merged layout",
            found="onnxruntime-genai gives as many rows as tokens",
            help="remove `kv`, and use `tokcc run` or a runtime that feeds every output back",
        )
