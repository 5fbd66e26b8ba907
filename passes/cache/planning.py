"""From a policy and a decoder's caches to a concrete plan; refusals and warnings happen here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import fx

from tokcc.analysis.cache_masks import mask_input, sliding_windows
from tokcc.analysis.cache_sites import CacheSite
from tokcc.analysis.key_bias import find_key_biases
from tokcc.analysis.rotation import Rotation, find_rotation
from tokcc.config import LoadedPolicy, PieceSpec, Step
from tokcc.errors import PlanError, PolicyError
from tokcc.ir.program import Program
from tokcc.passes.budget import Count, planned_counts
from tokcc.passes.cache.beside import refuse_beside
from tokcc.passes.cache.biasing import plan_biases, refuse_biases
from tokcc.passes.cache.combining import copied_caches, refuse_combinations
from tokcc.passes.cache.fixed_slots import fixed_slots
from tokcc.passes.cache.head import last_token_outputs
from tokcc.passes.cache.head_choice import HeadChoice
from tokcc.passes.cache.piece import CacheReducer, CacheScore, CacheSelector
from tokcc.passes.cache.plan import CachePlan, PlannedBias, PlannedEviction, PlannedStorage
from tokcc.passes.cache.storage import CacheForm, CacheStorage
from tokcc.passes.cache.storages.merged import Merged
from tokcc.passes.cache.storing import add_storages, key_rotations, refuse_changes
from tokcc.passes.chosen_layers import chosen_layers
from tokcc.passes.inputs import refuse_taken_names
from tokcc.passes.piece import resolve_piece
from tokcc.passes.prompt.planning import make_prompt_plan
from tokcc.passes.prompt.unmerge_planning import plan_unmerge
from tokcc.passes.sparse.plan import PlannedSparse
from tokcc.passes.sparse.planning import joined, model_selections, plan_sparse
from tokcc.passes.trained import with_weights

__all__ = ["make_cache_plan"]

aten = torch.ops.aten


def make_cache_plan(policy: LoadedPolicy, program: Program, sites: tuple[CacheSite, ...]) -> CachePlan:
    """Resolve a policy against a decoder.

    Raises:
        PlanError: A step cannot be applied.
        PolicyError: A piece or parameter is unknown.
    """
    windows = sliding_windows(program, sites)
    key_biases = find_key_biases(program, sites)
    own = model_selections(sites, key_biases)
    forms = _forms(program, sites)
    evictions: list[PlannedEviction] = []
    storages: dict[int, PlannedStorage] = {}
    warnings: list[str] = []
    sparse: dict[int, PlannedSparse] = {}
    biases: list[PlannedBias] = []
    prompt = plan_unmerge(policy, program, sites) or make_prompt_plan(policy, program, sites, windows)
    for number, step in enumerate(policy.policy.steps):
        if step.node in ("prune", "unmerge"):
            continue
        if step.node == "store_kv":
            warnings += add_storages(policy, number, step, program, sites, forms, windows, storages)
            continue
        if step.node == "bias_attention":
            layers = _layers(policy, number, step, windows, warnings)
            heads = _heads(policy, number, step, forms, windows)
            biases += plan_biases(policy, number, step, layers, heads, forms, biases)
            continue
        if step.node == "sparse_attention":
            for planned in plan_sparse(policy, number, step, program, sites, windows, key_biases, warnings):
                sparse[planned.layer] = joined(policy, number, planned, sparse.get(planned.layer))
            continue
        for eviction in _plan_step(policy, number, step, program, sites, forms, windows, warnings):
            _refuse_overlap(policy, number, eviction, evictions)
            evictions.append(eviction)
    evictions.sort(key=lambda eviction: (eviction.layer, eviction.step))
    refuse_changes(evictions, storages)
    warnings += _doubts(program, sites, evictions)
    attention_mask = mask_input(program, sites)
    caches = {position for site in sites for position in (site.present_key, site.present_value)}
    otherwise: CacheStorage = Merged()
    if policy.policy.kv.layout == "slots":
        otherwise = fixed_slots(policy, forms, windows, evictions, storages, attention_mask)
    plan = CachePlan(
        policy,
        sites,
        forms,
        windows,
        tuple(evictions),
        dict(sorted(storages.items())),
        otherwise,
        attention_mask=attention_mask,
        warnings=tuple(dict.fromkeys(warnings)),
        last_token_outputs=tuple(last_token_outputs(policy, program, caches)),
        prompt=prompt,
        biases=tuple(biases),
        sparse=dict(sorted({**own, **sparse}.items())),
        key_biases=key_biases,
        own_sparse=own,
    )
    refuse_taken_names(program, plan.inputs)
    refuse_combinations(plan)
    refuse_biases(plan)
    return replace(plan, warnings=(*plan.warnings, *copied_caches(plan)))


def _forms(program: Program, sites: Sequence[CacheSite]) -> tuple[CacheForm, ...]:
    nodes = {node.name: node for node in program.graph.nodes}
    pairs = [(nodes[site.past_key].meta["val"], nodes[site.past_value].meta["val"]) for site in sites]
    return tuple(CacheForm(int(k.shape[1]), int(k.shape[3]), int(v.shape[3]), k.dtype) for k, v in pairs)


def _refuse_overlap(
    policy: LoadedPolicy, number: int, eviction: PlannedEviction, others: Sequence[PlannedEviction]
) -> None:
    for other in others:
        apart = eviction.heads is not None and other.heads is not None and not {*eviction.heads} & {*other.heads}
        if other.layer == eviction.layer and not apart:
            raise PolicyError(
                f"two steps evict from the cache of layer {eviction.layer}",
                policy=policy.where(("steps", number)),
                found=f"the other is {other.where}",
                help="give the steps different layers, or different `heads`",
            )


def _plan_step(
    policy: LoadedPolicy,
    number: int,
    step: Step,
    program: Program,
    sites: Sequence[CacheSite],
    forms: Sequence[CacheForm],
    windows: Sequence[int],
    warnings: list[str],
) -> Iterator[PlannedEviction]:
    where = policy.where(("steps", number))
    if step.node == "filter_scan":
        raise PlanError(
            "the model's layers cache keys and values, and have no scans to filter",
            policy=policy.where(("steps", number, "node")),
            needed="a state-space language model (Mamba)",
            help="use a method for caches: `tokcc presets` lists them",
        )
    if step.node != "evict_kv":
        raise PlanError(
            f"`{step.node}` steps are not available for decoders in this version of tokcc",
            policy=policy.where(("steps", number, "node")),
            needed="prune, unmerge, evict_kv, store_kv, sparse_attention or bias_attention",
            help="use a method for decoders: `tokcc presets` lists them",
        )
    layers = _layers(policy, number, step, windows, warnings)
    score, select, reduce = _with_weights(policy, number, _pieces(policy, number, step), forms)
    counts = _capacities(policy, number, step, layers, len(windows))
    heads = _heads(policy, number, step, forms, windows)
    for layer, count in zip(layers, counts, strict=True):
        if count.nothing or (heads is not None and layer not in heads):
            continue
        fixed = int(count.amount) if count.kind == "tokens" else None
        kv = step.budget.kv
        try:
            sinks, recent = (select.sinks, select.protected_recent(fixed)) if kv is None else (kv.sinks, kv.recent)
        except ValueError as error:
            raise PlanError(
                str(error),
                policy=policy.where(("steps", number, "select")),
                help="give a number of tokens for `recent`, or `budget: {tokens: ...}`",
            ) from error
        least = sinks + max(recent, score.held())
        if fixed is not None and least > fixed:
            raise PlanError(
                f"layer {layer} keeps {fixed} entries, and more than those are protected",
                policy=policy.where(("steps", number, "budget")),
                needed=f"a capacity of at least {least}: {sinks} sinks and {least - sinks} recent tokens",
                found=str(fixed),
                help="give a larger budget, or fewer protected tokens",
            )
        rotations = None
        if step.positions == "compact":
            rotations = key_rotations(program, sites[layer], policy.where(("steps", number, "positions")))
        turn = _query_rotation(program, sites[layer]) if score.looks_ahead else None
        if score.reads_beside:
            refuse_beside(program, where, step.name)
        chosen = None if heads is None or len(heads[layer]) == forms[layer].kv_heads else heads[layer]
        yield PlannedEviction(
            number, layer, step.name, where, count, sinks, recent, score, select, reduce, rotations, chosen, turn
        )


def _heads(
    policy: LoadedPolicy, number: int, step: Step, forms: Sequence[CacheForm], windows: Sequence[int]
) -> dict[int, tuple[int, ...]] | None:
    """Return the key heads that a step is for, by layer; None = all."""
    if step.heads is None:
        return None
    place = policy.where(("steps", number, "heads"))
    choice: HeadChoice = resolve_piece(step.heads, HeadChoice, "cache.heads", place)
    try:
        return choice.choose({layer: form.kv_heads for layer, form in enumerate(forms) if not windows[layer]})
    except ValueError as error:
        raise PlanError(
            str(error),
            policy=place,
            needed="a choice made for this model",
            help="`tokcc inspect MODEL` lists layers and heads",
        ) from error


def _query_rotation(program: Program, site: CacheSite) -> Rotation | None:
    query = next(node for node in program.graph.nodes if node.name == site.query)
    return find_rotation(program, query)


def _layers(
    policy: LoadedPolicy, number: int, step: Step, windows: Sequence[int], warnings: list[str]
) -> tuple[int, ...]:
    place = policy.where(("steps", number, "at", "layers"))
    layers = chosen_layers(policy, number, step, len(windows))
    sliding = [layer for layer in layers if windows[layer]]
    if sliding and len(sliding) == len(layers):
        raise PlanError(
            "every chosen layer has a sliding window, whose cache is bounded without losing anything",
            policy=place,
            needed="layers that see the whole sequence",
            found=f"windows of {sorted({windows[layer] for layer in sliding})} tokens",
            help="compile with `--policy none`",
        )
    if sliding:
        evicting = step.node == "evict_kv"
        why = (
            "their caches are bounded without eviction" if evicting else "the first token leaves them: nothing is added"
        )
        warnings.append(f"layers {', '.join(map(str, sliding))} have sliding windows; {why}")
    return tuple(layer for layer in layers if not windows[layer])


def _capacities(
    policy: LoadedPolicy, number: int, step: Step, layers: tuple[int, ...], num_layers: int
) -> Sequence[Count]:
    from fractions import Fraction

    if step.budget.kv is not None:
        kv = step.budget.kv
        return [Count("tokens", Fraction(kv.sinks + kv.recent + kv.heavy))] * len(layers)
    counts = planned_counts(policy, number, step, layers, num_layers)
    if any(count.kind == "remove" for count in counts):
        raise PlanError(
            "`remove` is not a cache capacity",
            policy=policy.where(("steps", number, "budget")),
            needed="`tokens`, `keep`, `schedule` or `kv`",
            help="say how many entries stay: `budget: {tokens: 512}`",
        )
    return counts


def _with_weights(
    policy: LoadedPolicy,
    number: int,
    pieces: tuple[CacheScore, CacheSelector, CacheReducer],
    forms: Sequence[CacheForm],
) -> tuple[CacheScore, CacheSelector, CacheReducer]:
    """Read the weights of trained pieces."""
    sizes = {"heads": forms[0].kv_heads, "head_width": forms[0].key_width, "layers": len(forms)}
    score, select, reduce = pieces
    return (
        with_weights(score, sizes, folder=policy.folder, where=policy.where(("steps", number, "score"))),
        with_weights(select, sizes, folder=policy.folder, where=policy.where(("steps", number, "select"))),
        with_weights(reduce, sizes, folder=policy.folder, where=policy.where(("steps", number, "reduce"))),
    )


def _pieces(policy: LoadedPolicy, number: int, step: Step) -> tuple[CacheScore, CacheSelector, CacheReducer]:
    def place(key: str) -> str:
        return policy.where(("steps", number, key))

    if step.score is None:
        raise PolicyError(
            "`node: evict_kv` needs a score",
            policy=policy.where(("steps", number)),
            help="add for instance `score: {kind: attention_sum}`",
        )
    score: CacheScore = resolve_piece(step.score, CacheScore, "cache.scores", place("score"))
    select: CacheSelector = resolve_piece(
        step.select or PieceSpec(kind="best"), CacheSelector, "cache.selectors", place("select")
    )
    reduce: CacheReducer = resolve_piece(
        step.reduce or PieceSpec(kind="drop"), CacheReducer, "cache.reducers", place("reduce")
    )
    return score, select, reduce


def _doubts(program: Program, sites: Sequence[CacheSite], evictions: Sequence[PlannedEviction]) -> Iterator[str]:
    """Say what is allowed and probably not wanted."""
    nodes = {node.name: node for node in program.graph.nodes}
    for eviction in evictions:
        layer = eviction.layer
        if not eviction.sinks and not eviction.score.keeps_sinks:
            yield (
                f"`{eviction.name}` evicts the first tokens, on which decoders rest much of their attention: "
                "expect the perplexity to rise sharply; protect some with `select: {sinks: 4}`"
            )
        if eviction.score.by_key_norm and _normalised(nodes[sites[layer].new_key]):
            yield f"`{eviction.name}` rates keys by their length, and this model normalises its keys"
    if len({e.length for e in evictions}) > 1:
        yield "layers keep different numbers of entries: onnxruntime-genai takes one length for all of them"


def _normalised(key: fx.Node) -> bool:
    """Whether keys are normalised between their projection and the cache."""
    work, seen = [key], set()
    while work:
        node = work.pop()
        if node in seen or node.target in (aten.linear.default, aten.addmm.default, aten.mm.default):
            continue
        if node.target in (aten.rsqrt.default, aten.rms_norm.default, aten.layer_norm.default):
            return True
        seen.add(node)
        work += node.all_input_nodes
    return False
