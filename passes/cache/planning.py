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
from tokcc.passes.cache.piece import CacheReducer, CacheScore, CacheSelector
from tokcc.passes.cache.plan import CachePlan, PlannedEviction
from tokcc.passes.piece import resolve_piece

__all__ = ["make_cache_plan"]

aten = torch.ops.aten


def make_cache_plan(policy: LoadedPolicy, program: Program, sites: tuple[CacheSite, ...]) -> CachePlan:
    """Resolve a policy against a decoder.

    Raises:
        PlanError: A step cannot be applied.
        PolicyError: A piece or parameter is unknown.
    """
    if policy.policy.kv.layout != "merged":
        raise PlanError(
            f"the cache layout `{policy.policy.kv.layout}` is not available in this version of tokcc",
            policy=policy.where(("kv", "layout")),
            needed="merged",
        )
    windows = sliding_windows(program, sites)
    evictions: dict[int, PlannedEviction] = {}
    warnings: list[str] = []
    for number, step in enumerate(policy.policy.steps):
        for layer, eviction in _plan_step(policy, number, step, program, sites, windows, warnings).items():
            if layer in evictions:
                raise PolicyError(
                    f"two steps evict from the cache of layer {layer}",
                    policy=policy.where(("steps", number)),
                    found=f"the other is {evictions[layer].where}",
                    help="give the steps different layers",
                )
            evictions[layer] = eviction
    warnings += _doubts(program, sites, evictions)
    mask = mask_input(program, sites)
    return CachePlan(
        policy,
        sites,
        windows,
        dict(sorted(evictions.items())),
        mask,
        tuple(dict.fromkeys(warnings)),
        tuple(_last_token_outputs(policy, program, sites)),
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
    windows: Sequence[int],
    warnings: list[str],
) -> dict[int, PlannedEviction]:
    where = policy.where(("steps", number))
    if step.node != "evict_kv":
        raise PlanError(
            f"`{step.node}` steps are not available for decoders in this version of tokcc",
            policy=policy.where(("steps", number, "node")),
            needed="evict_kv",
        )
    layers = _layers(policy, number, step, windows, warnings)
    score, select, reduce = _pieces(policy, number, step)
    counts = _capacities(policy, number, step, layers, len(windows))
    result: dict[int, PlannedEviction] = {}
    for layer, count in zip(layers, counts, strict=True):
        if count.nothing:
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
        result[layer] = PlannedEviction(
            number, layer, step.name, where, count, sinks, recent, score, select, reduce, rotations
        )
    return result


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
        raise PlanError(
            str(error),
            policy=place,
            needed=f"layers between 0 and {len(windows) - 1}: the model has {len(windows)}",
            help="`tokcc inspect MODEL` lists the layers",
        ) from error
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


def _doubts(program: Program, sites: Sequence[CacheSite], evictions: Mapping[int, PlannedEviction]) -> Iterator[str]:
    """Say what is allowed and probably not wanted."""
    nodes = {node.name: node for node in program.graph.nodes}
    for layer, eviction in evictions.items():
        if not eviction.sinks and not eviction.score.keeps_sinks:
            yield (
                f"`{eviction.name}` evicts the first tokens, on which decoders rest much of their attention: "
                "expect the perplexity to rise sharply; protect some with `select: {sinks: 4}`"
            )
        if eviction.score.by_key_norm and _normalised(nodes[sites[layer].new_key]):
            yield f"`{eviction.name}` rates keys by their length, and this model normalises its keys"
    if len({e.length for e in evictions.values()}) > 1:
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
