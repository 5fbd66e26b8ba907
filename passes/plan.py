"""From policy and sites to a concrete plan. Every refusal that can happen before the graph is touched happens here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokcc.analysis.sites import Sites
from tokcc.config import LoadedPolicy, PieceSpec, Step, find_conflict, load_policy
from tokcc.errors import AxisError, PlanError, PolicyError, TokccError
from tokcc.ir.builder import EagerBuilder
from tokcc.ir.space import TokenSpace
from tokcc.passes.budget import Count, planned_counts
from tokcc.passes.bypassing import refuse_cuts_inside
from tokcc.passes.chosen_layers import chosen_layers
from tokcc.passes.inputs import EngineInput, declared_inputs
from tokcc.passes.methods import library
from tokcc.passes.piece import Piece, Reducer, Score, Selector, parts_of, resolve_piece, scores_of
from tokcc.passes.reduction import PlannedReduction
from tokcc.passes.sparse.grids.attend import PlannedGrid
from tokcc.passes.sparse.grids.planning import plan_grid
from tokcc.passes.trained import with_weights

__all__ = ["Plan", "make_plan"]

_DEFAULT_REDUCE = {"prune": "drop", "merge": "weighted_mean"}
_DEFAULT_SELECT = {"prune": "topk", "merge": "bipartite"}


@dataclass(frozen=True)
class Plan:
    """What will be done.

    Attributes:
        policy: The policy it came from.
        sites: The model's sites.
        reductions: In execution order.
        warnings: What the report must say.
        made: Filled by the walk: the space behind each reduction, the one before it again where it removes nothing.
        sparse: The attentions that read less, by layer.
    """

    policy: LoadedPolicy
    sites: Sites
    reductions: tuple[PlannedReduction, ...]
    warnings: tuple[str, ...] = ()
    made: list[TokenSpace] = field(default_factory=list)
    sparse: tuple[PlannedGrid, ...] = ()

    @property
    def planned(self) -> tuple[PlannedReduction | PlannedGrid, ...]:
        """Everything that is done."""
        return (*self.reductions, *self.sparse)

    @property
    def layers(self) -> list[int]:
        """Where something is done, in order; a layer once for each step."""
        return [planned.layer for planned in self.planned]

    @property
    def inputs(self) -> tuple[EngineInput, ...]:
        """Inputs that the reductions read besides the model's own."""
        return declared_inputs(piece for r in self.reductions for piece in (r.score, r.select, r.reduce))

    @property
    def outputs(self) -> dict[str, Any]:
        """Output contracts by name."""
        return dict(self.policy.policy.outputs)

    def to_dict(self) -> dict[str, Any]:
        """Return the applied policy in the long form, with the layers that were chosen: replayable.

        Layers where nothing goes are among them: schedules, ramps and trained weights count the chosen layers.
        """
        data = self.policy.policy.to_dict()
        for number in {planned.step for planned in self.planned}:
            step = self.policy.policy.steps[number]
            if step.at.site not in ("encoder_output", "projector_output"):
                data["steps"][number]["at"]["layers"] = list(step.at.resolve(len(self.sites.layers)))
        return data


def make_plan(policy: LoadedPolicy, sites: Sites, *, advise: bool = True) -> Plan:
    """Resolve a policy against a model.

    Args:
        policy: The validated policy.
        sites: What the model offers.
        advise: Say in a refusal which presets the model takes, where it takes few.

    Raises:
        PlanError: A step cannot be applied: a layer that is not there, a class token that the model does not have.
        PolicyError: A piece or parameter is unknown, or steps contradict each other at this depth.
    """
    reductions: list[PlannedReduction] = []
    conflict = find_conflict(policy.policy.steps, len(sites.layers))
    if conflict is not None:
        raise PolicyError(
            "two steps ask for different budgets at one layer and site of this model",
            policy=policy.where(("steps", conflict[1])),
            found=f"the other is {policy.where(('steps', conflict[0]))}",
            help="give the steps different layers or sites",
        )
    sparse = _plan_sparse(policy, sites)
    made: list[TokenSpace] = []
    for number, step in enumerate(policy.policy.steps):
        if step.node == "sparse_attention":
            continue
        reductions += _plan_step(policy, number, step, sites, made, advise=advise)
    # What is at the end of a layer comes before what is in front of the next one.
    reductions.sort(key=lambda r: (sites.order[r.cut], r.reduce.bypasses, r.step))
    refuse_cuts_inside(sites, reductions)
    return Plan(policy, sites, tuple(reductions), tuple(_shortfalls(reductions, sites)), made, sparse)


def _plan_sparse(policy: LoadedPolicy, sites: Sites) -> tuple[PlannedGrid, ...]:
    """Plan the attentions that read less.

    Raises:
        PlanError: Two steps want one layer, or other steps remove tokens of the grid.
    """
    steps = policy.policy.steps
    numbers = [number for number, step in enumerate(steps) if step.node == "sparse_attention"]
    others = [number for number in range(len(steps)) if number not in numbers]
    found: dict[int, PlannedGrid] = {}
    for number in numbers:
        _refuse_decoder(policy, number, steps[number])
        if others:
            raise PlanError(
                "sparse attention and steps that remove tokens cannot go together in one encoder",
                policy=policy.where(("steps", number)),
                needed="all tokens of the grid, in every layer",
                found=f"the other step is {policy.where(('steps', others[0]))}",
                help="use one of the two",
            )
        layers = _layers(policy, number, steps[number], sites)
        for planned in plan_grid(policy, number, steps[number], sites, layers):
            if planned.layer in found:
                raise PlanError(
                    f"two steps replace the attention of layer {planned.layer}",
                    policy=planned.where,
                    found=f"the first is {found[planned.layer].where}",
                    help="give the steps different layers",
                )
            found[planned.layer] = planned
    return tuple(found[layer] for layer in sorted(found))


def _refuse_decoder(policy: LoadedPolicy, number: int, step: Step) -> None:
    if step.at.part == "decoder" or step.node == "unmerge":
        raise PlanError(
            "the step is for a decoder's prompt, and the model has no key-value cache",
            policy=policy.where(("steps", number, "at")),
            needed="a decoder that takes its past keys and values as inputs and returns them, grown",
            help="compile a causal language model (`--task text-generation`), or leave `part: decoder` out",
        )


def _plan_step(
    policy: LoadedPolicy, number: int, step: Step, sites: Sites, made: list[TokenSpace], *, advise: bool
) -> list[PlannedReduction]:
    where = policy.where(("steps", number))
    doing = {"evict_kv": "evict from", "store_kv": "store", "bias_attention": "attend to"}.get(step.node)
    if doing is not None:
        raise PlanError(
            f"the model has no key-value cache to {doing}",
            policy=policy.where(("steps", number, "node")),
            needed="a decoder that takes its past keys and values as inputs and returns them, grown",
            help="compile a causal language model (`--task text-generation`), or use a `prune` or `merge` step",
        )
    _refuse_decoder(policy, number, step)
    if step.node == "filter_scan":
        raise PlanError(
            "the model carries no states from call to call whose scans could be filtered",
            policy=policy.where(("steps", number, "node")),
            needed="a state-space language model (Mamba)",
            help="compile one (`--task text-generation`), or use a `prune` or `merge` step",
        )
    if step.node not in ("prune", "merge"):
        raise PlanError(
            f"`{step.node}` steps are not available in this version of tokcc",
            policy=policy.where(("steps", number, "node")),
            needed="prune or merge",
        )
    for unused, value in (("segment", step.protect.segment), ("ids", step.protect.ids)):
        if value:
            raise PlanError(
                f"`protect.{unused}` is not available for encoders in this version",
                policy=policy.where(("steps", number, "protect", unused)),
                help="use `protect: {first: N}`",
            )
    layers = _layers(policy, number, step, sites)
    counts = planned_counts(policy, number, step, layers, len(sites.layers))
    score, select, reduce = _pieces(policy, number, step)
    first = sites.prefix if step.protect.first == "auto" else int(step.protect.first)
    last = step.protect.last or (sites.suffix if step.protect.first == "auto" else 0)
    middle = sites.middle if step.protect.first == "auto" else None
    _check_mixing(policy, number, step, tuple(parts_of(score, select, reduce)), layers, sites, advise)
    if sites.middle is not None and not select.around_middle:
        raise PlanError(
            f"the class token of this model stands in the middle, and `{select.kind}` cannot keep it there",
            policy=policy.where(("steps", number, "select")),
            needed="a selector that keeps as many tokens in front of it as behind it",
            help="use `select: {kind: topk}`",
        )
    _check_needs(policy, number, tuple(scores_of(score, select)), sites, first)
    if not reduce.always and not any(select.removes(count) for count in counts):
        return []
    sizes = _sizes(sites, sites.cut(layers[0], step.at.site), layers[0], counts[0]) | {"stages": len(layers)}
    if score is not None:
        score = with_weights(score, sizes, folder=policy.folder, where=policy.where(("steps", number, "score")))
    select = with_weights(select, sizes, folder=policy.folder, where=policy.where(("steps", number, "select")))
    reduce = with_weights(reduce, sizes, folder=policy.folder, where=policy.where(("steps", number, "reduce")))
    result: list[PlannedReduction] = []
    for stage, (layer, count) in enumerate(zip(layers, counts, strict=True)):
        if not reduce.always and not select.removes(count):
            continue
        cut = _cut(policy, number, step, sites, layer, bypasses=reduce.bypasses)
        result.append(
            PlannedReduction(
                step=number,
                name=step.name,
                where=where,
                node=step.node,
                layer=layer,
                site=step.at.site,
                cut=cut,
                count=count,
                first=first,
                last=last,
                score=score,
                select=select,
                reduce=reduce,
                restore=step.restore,
                seed=step.seed,
                sites=sites,
                made=made,
                stage=stage,
                stages=len(layers),
                middle=middle,
            )
        )
    return result


def _layers(policy: LoadedPolicy, number: int, step: Step, sites: Sites) -> tuple[int, ...]:
    if step.at.site in ("encoder_output", "projector_output"):
        return (len(sites.layers) - 1,)
    layers = chosen_layers(policy, number, step, len(sites.layers))
    if not layers:
        raise PlanError(
            "no layer is chosen",
            policy=policy.where(("steps", number, "at", "layers")),
            help="`tokcc inspect MODEL` lists the layers",
        )
    return layers


def _pieces(policy: LoadedPolicy, number: int, step: Step) -> tuple[Score | None, Selector, Reducer]:
    def place(key: str) -> str:
        return policy.where(("steps", number, key))

    select_spec = step.select or PieceSpec(kind=_DEFAULT_SELECT[step.node])
    reduce_spec = step.reduce or PieceSpec(kind=_DEFAULT_REDUCE[step.node])
    select: Selector = resolve_piece(select_spec, Selector, "selectors", place("select"))
    reduce: Reducer = resolve_piece(reduce_spec, Reducer, "reducers", place("reduce"))
    score: Score | None = None
    if step.score is not None:
        score = resolve_piece(step.score, Score, "scores", place("score"))
    elif select.wants_score:
        raise PolicyError(
            f"`select: {{kind: {select.kind}}}` needs a score",
            policy=policy.where(("steps", number)),
            help="add for instance `score: {kind: attention_rows, rows: cls}`",
        )
    return score, select, reduce


def _sizes(sites: Sites, cut: str | None, layer: int, count: Count) -> dict[str, int]:
    """Return the numbers that trained pieces may count on, as far as they are known."""
    attention = sites.layers[layer].attention if sites.layers else None
    query = None if attention is None else sites.axes.get(attention.query)
    known: dict[str, Any] = {
        "C": sites.axes[cut].old[-1] if cut in sites.axes else None,
        "heads": query.old[1] if query is not None and query.rank == 4 else None,
        "head_width": query.old[-1] if query is not None else None,
        "layers": len(sites.layers),
        "K": int(count.amount) if count.kind == "tokens" else None,
    }
    return {name: size for name, size in known.items() if isinstance(size, int)}


def _check_mixing(
    policy: LoadedPolicy,
    number: int,
    step: Step,
    parts: Sequence[Piece],
    layers: Sequence[int],
    sites: Sites,
    advise: bool,
) -> None:
    """Refuse pieces that read what the chosen layers have not got: attention, or a state-space mixer."""
    if not sites.layers:
        return
    without = [layer for layer in layers if sites.layers[layer].attention is None]
    reader = next((p for p in parts if _reads_attention(p)), None)
    scanned = [layer for layer in without if sites.layers[layer].mixer is not None]
    if (without and reader is not None) or (scanned and step.at.site == "after_attention"):
        everywhere = all(layer.attention is None for layer in sites.layers)
        what = "the model has no attention" if everywhere else f"layer {without[0]} has no attention"
        by = "" if reader is None else f", and `{reader.kind}` reads it"
        raise PlanError(
            what + (by or ", and the step cuts after it"),
            policy=policy.where(("steps", number, "at" if reader is None else "score")),
            needed="layers whose tokens attend to all of them; here a state-space scan mixes them, or they sample",
            help=("" if reader is not None else "cut at `site: block_output`; ")
            + (_fitting_presets(sites) if everywhere and advise else "`tokcc inspect MODEL` says what fits"),
        )
    mixed = [layer for layer in layers if sites.layers[layer].mixer is None]
    reader = next((p for p in parts if "mixer" in p.needs), None)
    if mixed and reader is not None:
        raise PlanError(
            f"`{reader.kind}` reads a state-space mixer, and layer {mixed[0]} has none",
            policy=policy.where(("steps", number, "score")),
            needed="a state-space model: `state = decay * state + update` over its tokens (Mamba, Vision Mamba)",
            help="this layer attends: use a score such as `attention_received`, or `norm` of the features",
        )


def _reads_attention(piece: Piece) -> bool:
    return "attention" in piece.needs or getattr(piece, "of", None) in ("keys", "values", "queries")


def _fitting_presets(sites: Sites) -> str:
    """Say which presets can be planned on a model."""
    names = [name for name in library() if _fits(name, sites)]
    listed = ", ".join(f"`{name}`" for name in names)
    return f"presets that fit this model: {listed}" if names else "`tokcc inspect MODEL` says what fits"


def _fits(name: str, sites: Sites) -> bool:
    try:
        return bool(make_plan(load_policy(name, presets=library()), sites, advise=False).layers)
    except TokccError:
        return False


def _check_needs(policy: LoadedPolicy, number: int, scores: Sequence[Score], sites: Sites, first: int) -> None:
    reads_cls = any(getattr(s, "rows", None) == "cls" or getattr(s, "to", None) == "cls" for s in scores)
    if reads_cls and sites.prefix < 1 and first < 1:
        raise PlanError(
            "the score reads the class token, and this model has none",
            policy=policy.where(("steps", number, "score")),
            needed="a class token in front of the other tokens",
            found="no token that is concatenated to the patches or selected by a head",
            help="use `score: {kind: attention_received}`, or say `protect: {first: 1}` if token 0 is one",
        )


def _check_bypass(policy: LoadedPolicy, number: int, step: Step, sites: Sites, layer: int, *, bypasses: bool) -> None:
    if bypasses != (step.at.site == "block_input"):
        raise PlanError(
            "tokens pass a layer by that stands behind the cut"
            if bypasses
            else "in front of a layer tokens can only pass it by",
            policy=policy.where(("steps", number, "at")),
            needed="`site: block_input` with `reduce: {kind: bypass}`",
            help="set `site: block_input`"
            if bypasses
            else "for other reductions use `site: block_output` of the layer before",
        )
    block = sites.layers[layer] if bypasses else None
    if block is not None and block.block_output is None:
        raise PlanError(
            f"layer {layer} has no cut `block_output`, where tokens that pass it by would come back",
            policy=policy.where(("steps", number, "at")),
            node=block.label,
            found=block.no_cut or "none",
            help="choose other layers (`tokcc inspect MODEL`)",
        )


def _cut(policy: LoadedPolicy, number: int, step: Step, sites: Sites, layer: int, *, bypasses: bool) -> str:
    _check_bypass(policy, number, step, sites, layer, bypasses=bypasses)
    if not sites.layers:
        return sites.encoder_output  # see tokcc.analysis.projected
    block = sites.layers[layer]
    name = sites.cut(layer, step.at.site)
    lost = block.windowed
    if lost is not None and (step.restore == "none" or not sites.has_tokens(sites.entry.node)):
        raise AxisError(
            f"cannot {step.node} tokens at layer {layer}: {lost.what}",
            policy=policy.where(("steps", number, "at", "layers")),
            node=lost.node,
            help="add `restore: unmerge` (merge) or `restore: scatter` (prune) to the step, or choose layers without "
            "windows (`tokcc inspect MODEL`)",
        )
    if name is None or not sites.has_tokens(name):
        raise PlanError(
            f"layer {layer} has no cut `{step.at.site}`",
            policy=policy.where(("steps", number, "at")),
            node=block.label,
            needed="a point of the residual stream that everything passes and several computations read",
            found=block.no_cut or "none",
            help="use `site: block_output`" if block.block_output else "`tokcc inspect MODEL` lists the cuts",
        )
    return name


def _shortfalls(reductions: Sequence[PlannedReduction], sites: Sites) -> Iterator[str]:
    """Say where a budget asks for more than a layer can give; the arithmetic itself clamps, as the papers do."""
    size: Any = sites.tokens
    tokens = size if isinstance(size, int) else size.node.hint
    if tokens is None:
        return
    initial = int(tokens)
    short: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for reduction in reductions:
        if reduction.select.of_batch:
            break  # how many tokens a sample has from here on is not known
        if reduction.reduce.marks or reduction.reduce.bypasses:
            continue
        count = reduction.count
        protected = reduction.first + reduction.last + (reduction.middle is not None)
        candidates = max(tokens - protected, 0)
        most = candidates // 2 if reduction.select.pairwise else max(candidates - 1, 0)
        if count.kind == "remove" and count.amount > most:
            asked = f"asked to remove {count.amount} tokens"
            short.setdefault((reduction.where, asked), []).append((reduction.layer, most))
        elif count.kind == "tokens" and count.amount > candidates:
            asked = f"asked to keep {count.amount} tokens"
            short.setdefault((reduction.where, asked), []).append((reduction.layer, candidates))
        kept = int(count.kept(EagerBuilder(), candidates, max(initial - protected, 0)))
        tokens = protected + max(kept, candidates - most)
    for (where, asked), places in short.items():
        layers = ", ".join(str(layer) for layer, _ in places)
        found = ", ".join(str(number) for _, number in places)
        verb = "only {} can go" if "remove" in asked else "only {} are there"
        yield f"{where}: {asked} at layer {layers}, but {verb.format(found)}: fewer are removed"
