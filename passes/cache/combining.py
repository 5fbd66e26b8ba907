"""What the steps of a policy for decoders cannot do together."""

from __future__ import annotations

from collections.abc import Iterator

from tokcc.errors import PlanError
from tokcc.passes.cache.plan import WEIGHT, CachePlan, PlannedBias
from tokcc.passes.sparse.plan import MODEL, PlannedSparse

__all__ = ["copied_caches", "refuse_combinations"]


def refuse_combinations(plan: CachePlan) -> None:
    """Refuse steps that are each fine, and not beside each other.

    Raises:
        PlanError: There are such steps.
    """
    _refuse_shorter_prompts(plan)
    _refuse_sparse(plan)
    _refuse_moved_biases(plan)
    _refuse_moved_indexes(plan)


def _refuse_shorter_prompts(plan: CachePlan) -> None:
    """Refuse what reads all tokens of a call in every layer where some are taken out between layers."""
    readers = [(e.name, e.where) for e in plan.evictions if e.score.reads_beside]
    readers += [(s.name, s.where) for s in plan.storages.values() if s.rating is not None or s.storage.placed]
    if plan.prompt is not None and readers:
        name, where = readers[0]
        raise PlanError(
            f"`{name}` reads all tokens of a call in every layer, and another step takes some out between layers",
            policy=where,
            help="leave the `prune` steps out",
        )
    for eviction in plan.evictions if plan.prompt is not None else ():
        turns = eviction.rotations is not None or eviction.score.looks_ahead
        if turns and plan.prompt is not None and plan.prompt.stage(eviction.layer):
            raise PlanError(
                f"`{eviction.name}` turns queries or keys itself, and another step takes tokens out in front of layer"
                f" {eviction.layer}",
                policy=eviction.where,
                needed="layers in front of the cut, or a method that leaves keys as they are",
                help=f"give the step layers up to {eviction.layer - 1}, or `positions: keep`",
            )
    for prune in plan.prompt.prunes if plan.prompt is not None else ():
        # How many tokens of a whole prompt have gone is told by the length of this cache.
        layer = prune.behind + 1
        if prune.positions == "compact" and prune.removed is None and (plan.of_layer(layer) or layer in plan.storages):
            raise PlanError(
                f"`{prune.name}` counts positions by the cache of layer {layer}, and another step changes that",
                policy=prune.where,
                needed=f"a cache of layer {layer} that holds all tokens of its own",
                help=f"give the other step layers from {layer + 1} on, or this one `positions: keep`",
            )


def copied_caches(plan: CachePlan) -> Iterator[str]:
    """Say where single tokens read little of a cache that is copied for each of them."""
    whole = (one for layer, planned in plan.sparse.items() if not plan.of_layer(layer) for one in planned.each)
    names = dict.fromkeys(one.name for one in whole if one.step != MODEL and one.new[0] <= 1)
    if names and plan.longest is None:
        yield (
            f"`{', '.join(names)}` reads little of a cache that the layout `merged` copies for every token: attention"
            " gets at most about 1.75 times as fast; `kv: {layout: slots, tokens: N}` copies nothing"
        )


def _refuse_moved_biases(plan: CachePlan) -> None:
    """Refuse what takes, moves or rounds entries where attention reads the values of all heads of a token together."""
    others = [part for part in plan.parts if not isinstance(part, PlannedSparse | PlannedBias)]
    if plan.key_biases and (others or plan.prompt is not None):
        raise PlanError(
            "the model makes a bias of each key from the values of all heads, and a step changes what is cached",
            policy=others[0].where if others else None,
            needed="a cache that holds every token as the model made it",
            found=f"such a bias in {len(plan.key_biases)} layers",
            help="use `sparse_attention` steps on this model, such as `dma`",
        )


def _refuse_moved_indexes(plan: CachePlan) -> None:
    """Refuse what takes, moves or rounds entries where an indexer compares tokens by others of their own."""
    others = [part for part in plan.parts if not isinstance(part, PlannedSparse)]
    if any(site.index is not None for site in plan.sites) and (others or plan.prompt is not None):
        raise PlanError(
            "the model's own indexer chooses the keys that are seen, and a step changes what is cached",
            policy=others[0].where if others else None,
            needed="a cache that holds every token as the model made it",
            help="use `sparse_attention` steps on this model, such as `hisa`",
        )


def _refuse_sparse(plan: CachePlan) -> None:
    """Refuse sparse attention where a layer's attention is written out, or is several of them."""
    ordered = any(planned.ordering is not None for planned in plan.sparse.values())
    for layer, planned in plan.sparse.items():
        if planned.step == MODEL:
            continue
        groups = plan.groups(layer)
        why = None
        if len(groups) > 1:
            why = "its heads have caches of different lengths"
        elif any(group.written_out or group.rotations for group in groups):
            why = "another step turns its queries and keys itself"
        elif plan.reads_beside:
            why = "another step reads tokens beside those of the call"
        elif any(group.storage.basis(group.form) or group.form.front or group.form.states[-1:] == (WEIGHT,)
                 for group in groups):  # fmt: skip
            why = "entries of its cache stand for several tokens, or are held in another basis"
        elif groups[0].form.pages and not groups[0].storage.paged:
            why = f"`{planned.name}` remembers blocks of entries, and another step holds entries in a form of its own"
        elif groups[0].form.pages and not all(eviction.score.once for eviction in plan.of_layer(layer)):
            why = f"`{planned.name}` remembers blocks of entries, and another step takes some out for every token"
        elif groups[0].form.pages and plan.of_layer(layer) and any(one.reads_calls for one in planned.each):
            why = f"`{planned.name}` remembers what tokens were when they came, and another step takes some out"
        elif planned.ordering is not None and plan.of_layer(layer):
            why = f"`{planned.name}` puts entries in an order of its own, and another step takes some out"
        elif any(one.rotations is not None for one in planned.each) and (plan.of_layer(layer) or groups[0].stage):
            why = f"`{planned.name}` turns keys back by their places, which another step changes"
        elif any(one.select.passes_on for one in planned.each) and (
            plan.evictions or plan.prompt is not None or ordered
        ):
            why = f"`{planned.name}` reads the same entries in several layers, and another step makes them differ"
        if why is not None:
            raise PlanError(
                f"layer {layer} cannot attend sparsely: {why}",
                policy=planned.where,
                needed="a layer whose queries see the slots up to their own, with the weight of one token each",
                help="give the steps different layers, or leave one out",
            )
