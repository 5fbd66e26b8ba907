"""From a policy and a decoder's caches to a concrete plan; refusals and warnings happen here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import fx

from tokcc.analysis.cache_masks import mask_input, sliding_windows
from tokcc.analysis.cache_sites import CacheSite
from tokcc.analysis.rotation import Rotation, find_rotation
from tokcc.config import LoadedPolicy, PieceSpec, Step
from tokcc.errors import PlanError, PolicyError
from tokcc.ir.program import Program
from tokcc.passes.budget import Count, resolve_budget
from tokcc.passes.cache.fixed_slots import fixed_slots
from tokcc.passes.cache.head_choice import HeadChoice
from tokcc.passes.cache.piece import CacheReducer, CacheScore, CacheSelector
from tokcc.passes.cache.plan import CachePlan, PlannedEviction, PlannedStorage
from tokcc.passes.cache.storage import CacheForm, CacheStorage
from tokcc.passes.cache.storages.merged import Merged
from tokcc.passes.piece import resolve_piece

__all__ = ["make_cache_plan"]

aten = torch.ops.aten


def make_cache_plan(policy: LoadedPolicy, program: Program, sites: tuple[CacheSite, ...]) -> CachePlan:
    """Resolve a policy against a decoder.

    Raises:
        PlanError: A step cannot be applied.
        PolicyError: A piece or parameter is unknown.
    """
    windows = sliding_windows(program, sites)
    forms = _forms(program, sites)
    evictions: list[PlannedEviction] = []
    storages: dict[int, PlannedStorage] = {}
    warnings: list[str] = []
    for number, step in enumerate(policy.policy.steps):
        if step.node == "store_kv":
            warnings += _add_storages(policy, number, step, forms, windows, storages)
            continue
        for eviction in _plan_step(policy, number, step, program, sites, forms, windows, warnings):
            _refuse_overlap(policy, number, eviction, evictions)
            evictions.append(eviction)
    evictions.sort(key=lambda eviction: (eviction.layer, eviction.step))
    _refuse_changes(evictions, storages)
    warnings += _doubts(program, sites, evictions)
    attention_mask = mask_input(program, sites)
    otherwise: CacheStorage = Merged()
    if policy.policy.kv.layout == "slots":
        otherwise = fixed_slots(policy, forms, windows, evictions, storages, attention_mask)
    return CachePlan(
        policy,
        sites,
        forms,
        windows,
        tuple(evictions),
        dict(sorted(storages.items())),
        otherwise,
        attention_mask=attention_mask,
        warnings=tuple(dict.fromkeys(warnings)),
        last_token_outputs=tuple(_last_token_outputs(policy, program, sites)),
    )


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


def _refuse_changes(evictions: Sequence[PlannedEviction], storages: Mapping[int, PlannedStorage]) -> None:
    """Refuse what a storage cannot hold."""
    for eviction in evictions:
        planned = storages.get(eviction.layer)
        if planned is None:
            continue
        if not planned.storage.evicts:
            raise PlanError(
                f"nothing can be evicted from a cache that `{planned.name}` holds",
                policy=eviction.where,
                found=f"both in layer {eviction.layer}",
                help="use one of the two, or give them different layers",
            )
        if eviction.reduce.changes and not planned.storage.as_they_are:
            raise PlanError(
                f"`{eviction.name}` changes entries, and `{planned.name}` rounds each of them once",
                policy=eviction.where,
                found=f"both in layer {eviction.layer}",
                help="use a method that only drops entries",
            )


def _add_storages(
    policy: LoadedPolicy,
    number: int,
    step: Step,
    forms: Sequence[CacheForm],
    windows: Sequence[int],
    storages: dict[int, PlannedStorage],
) -> Sequence[str]:
    """Add the storages of a step and return warnings."""
    place = policy.where(("steps", number, "store"))
    if step.store is None:
        raise PolicyError(
            "`node: store_kv` needs a storage",
            policy=policy.where(("steps", number)),
            help="add for instance `store: {kind: codes, bits: 8}`",
        )
    storage: CacheStorage = resolve_piece(step.store, CacheStorage, "cache.storages", place)
    if storage.always() is not None:
        raise PolicyError(
            f"`{step.store.kind}` is a layout of all caches, and nothing for single layers",
            policy=place,
            help=f"write `kv: {{layout: {step.store.kind}}}` beside `steps`",
        )
    try:
        layers = step.at.resolve(len(forms))
    except ValueError as error:
        raise _no_such_layer(policy, number, error, len(forms)) from error
    sliding = [layer for layer in layers if windows[layer] and not storage.evicts]
    if sliding and len(sliding) == len(layers):
        raise PlanError(
            f"every chosen layer has a sliding window, and nothing can be taken out of what `{step.name}` holds",
            policy=place,
            needed="layers that see the whole sequence, or a storage such as `codes`",
        )
    for layer in layers:
        if layer in sliding:
            continue
        if layer in storages:
            raise PolicyError(
                f"two steps say how the cache of layer {layer} is held",
                policy=policy.where(("steps", number)),
                found=f"the other is {storages[layer].where}",
                help="give the steps different layers",
            )
        try:
            storage.check(forms[layer])
        except ValueError as error:
            raise PlanError(
                f"`{step.name}` cannot hold the cache of layer {layer}", policy=place, needed=str(error)
            ) from error
        storages[layer] = PlannedStorage(number, layer, step.name, policy.where(("steps", number)), storage)
    warnings = []
    if not storage.as_they_are:
        warnings.append(
            f"`{step.name}` holds caches in tensors of its own: `tokcc run` and callers that feed every output back can"
            " use them; optimum and onnxruntime-genai begin with keys and values as wide as a head"
        )
    if sliding:
        listed = ", ".join(map(str, sliding))
        warnings.append(
            f"layers {listed} have sliding windows, out of which entries fall: `{step.name}` leaves them as they are"
        )
    return warnings


def _no_such_layer(policy: LoadedPolicy, number: int, error: ValueError, layers: int) -> PlanError:
    return PlanError(
        str(error),
        policy=policy.where(("steps", number, "at", "layers")),
        needed=f"layers between 0 and {layers - 1}: the model has {layers}",
        help="`tokcc inspect MODEL` lists the layers",
    )


def _last_token_outputs(policy: LoadedPolicy, program: Program, sites: Sequence[CacheSite]) -> Iterator[int]:
    caches = {position for site in sites for position in (site.present_key, site.present_value)}
    names = {
        program.output_names[i]: position
        for i, position in enumerate(program.user_output_positions)
        if position not in caches
    }
    for name, contract in policy.policy.outputs.items():
        place = policy.where(("outputs", name))
        if name != "*" and name not in names:
            raise PlanError(f"the model has no output `{name}`", policy=place, needed="one of " + ", ".join(names))
        if contract not in ("full", "last_token"):
            raise PlanError(
                f"`{name}` of a decoder cannot be `{contract}`",
                policy=place,
                needed="`full`, or `last_token`: the row that generation reads",
            )
        if contract == "last_token":
            yield from names.values() if name == "*" else [names[name]]


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
    if step.node != "evict_kv":
        raise PlanError(
            f"`{step.node}` steps are not available for decoders in this version of tokcc",
            policy=policy.where(("steps", number, "node")),
            needed="evict_kv or store_kv",
        )
    layers = _layers(policy, number, step, windows, warnings)
    score, select, reduce = _pieces(policy, number, step)
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
            )
        rotations = _rotations(policy, number, program, sites[layer]) if step.positions == "compact" else None
        turn = _query_rotation(program, sites[layer]) if score.looks_ahead else None
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


def _rotations(policy: LoadedPolicy, number: int, program: Program, site: CacheSite) -> tuple[Rotation, Rotation]:
    nodes = {node.name: node for node in program.graph.nodes}
    query, key = (find_rotation(program, nodes[name]) for name in (site.query, site.new_key))
    if query is None or key is None:
        raise PlanError(
            f"the positions of layer {site.layer} cannot be counted anew",
            policy=policy.where(("steps", number, "positions")),
            node=site.query if query is None else site.new_key,
            needed="queries and keys that are turned by position (rotary embeddings) just before the cache",
            found="keys that depend on the positions in another way, or not at all",
            help="use `positions: keep`",
        )
    return query, key


def _layers(
    policy: LoadedPolicy, number: int, step: Step, windows: Sequence[int], warnings: list[str]
) -> tuple[int, ...]:
    place = policy.where(("steps", number, "at", "layers"))
    try:
        layers = step.at.resolve(len(windows))
    except ValueError as error:
        raise _no_such_layer(policy, number, error, len(windows)) from error
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
        warnings.append(
            f"layers {', '.join(map(str, sliding))} have sliding windows; their caches are bounded without eviction"
        )
    return tuple(layer for layer in layers if not windows[layer])


def _capacities(
    policy: LoadedPolicy, number: int, step: Step, layers: tuple[int, ...], num_layers: int
) -> Sequence[Count]:
    from fractions import Fraction

    if step.budget.kv is not None:
        kv = step.budget.kv
        return [Count("tokens", Fraction(kv.sinks + kv.recent + kv.heavy))] * len(layers)
    try:
        counts = resolve_budget(step.budget, layers, num_layers)
    except ValueError as error:
        raise PlanError(str(error), policy=policy.where(("steps", number, "budget"))) from error
    if any(count.kind == "remove" for count in counts):
        raise PlanError(
            "`remove` is not a cache capacity",
            policy=policy.where(("steps", number, "budget")),
            needed="`tokens`, `keep`, `schedule` or `kv`",
        )
    return counts


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
