"""From `prune` steps and a decoder to reductions of the prompt; refusals happen here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import fx

from tokcc.analysis.cache_masks import mask_input
from tokcc.analysis.cache_sites import CacheSite
from tokcc.analysis.decoder_cuts import DecoderCuts, decoder_cuts
from tokcc.analysis.rotation import find_rotation
from tokcc.config import LoadedPolicy, PieceSpec, Step
from tokcc.errors import PlanError, PolicyError
from tokcc.ir.builder import EagerBuilder
from tokcc.ir.program import Program
from tokcc.passes.budget import planned_counts
from tokcc.passes.inputs import EngineInput, declared_inputs
from tokcc.passes.piece import resolve_piece
from tokcc.passes.prompt.piece import PromptReducer, PromptScore, PromptSelector
from tokcc.passes.prompt.plan import PlannedPrune, PromptPlan
from tokcc.passes.prompt.refill_planning import plan_refill
from tokcc.passes.prompt.segments import TEXT, Segment, declared_segments

__all__ = ["make_prompt_plan"]


def make_prompt_plan(
    policy: LoadedPolicy, program: Program, sites: Sequence[CacheSite], windows: Sequence[int]
) -> PromptPlan | None:
    """Resolve the `prune` steps of a policy against a decoder; None when nothing goes.

    Args:
        policy: The policy.
        program: The decoder.
        sites: Its caches.
        windows: Sliding window of each layer, 0 = none.

    Raises:
        PlanError: A step cannot be applied.
        PolicyError: A piece or parameter is unknown, or steps contradict each other.
    """
    steps = [(number, step) for number, step in enumerate(policy.policy.steps) if step.node == "prune"]
    if not steps:
        return None
    cuts = decoder_cuts(program, sites)
    order = {node.name: i for i, node in enumerate(program.graph.nodes)}
    found: list[PlannedPrune] = []
    segments: tuple[Segment, ...] | None = None
    for number, step in steps:
        own = _segments(policy, number, step)
        if segments is not None and segments != own:
            raise PolicyError(
                "two steps drop tokens of different segments",
                policy=policy.where(("steps", number, "protect")),
                help="give both the same `protect: {segment: ...}`",
            )
        segments = own
        found += _plan_step(policy, number, step, cuts, len(sites))
    found.sort(key=lambda prune: (order[prune.cut], prune.step))
    assert segments is not None
    counted = _counted(policy, found, segments)
    if not counted:
        return None
    _refuse(policy, program, sites, windows, counted)
    inputs = _inputs(program, segments)
    pieces = [piece for prune in counted for piece in (prune.score, prune.select, prune.reduce)]
    refill = plan_refill(policy, program, sites, counted)
    old = () if refill is None else refill.inputs
    return PromptPlan(tuple(counted), segments, cuts, (*inputs, *declared_inputs(pieces), *old), refill)


def _inputs(program: Program, segments: Sequence[Segment]) -> tuple[EngineInput, ...]:
    """Return what says which tokens belong to a segment, for a decoder that does not see token ids."""
    if any(program.public_name(node) == "input_ids" for node in program.user_inputs):
        return ()
    return tuple(
        EngineInput(
            segment.mask_input,
            ("B", "S"),
            f"1 = a token of segment `{segment.name}`, 0 = another one",
            dtype=torch.int64,
            low=0,
            high=1,
            token=segment.token,
        )
        for segment in segments
        if segment.start is None
    )


def _segments(policy: LoadedPolicy, number: int, step: Step) -> tuple[Segment, ...]:
    """Return the segments that a step drops tokens of; none = the whole prompt."""
    place = policy.where(("steps", number, "protect"))
    if step.protect.ids:
        raise PlanError(
            "`protect.ids` is not available for prompts in this version",
            policy=place,
            help="name the tokens that may go: `segments: {image: {input_ids: ID}}` with `protect: {segment: text}`",
        )
    try:
        declared = declared_segments(policy.policy.segments)
    except ValueError as error:
        name, found = error.args
        raise PolicyError(
            f"segment `{name}` does not say which tokens belong to it",
            policy=policy.where(("segments", name)),
            needed="`{input_ids: ID}`, with `tokens: N` where their number is known, or `{start: A, stop: B}`",
            found=found,
            help=f"add for instance `segments: {{{name}: {{input_ids: 32000, tokens: 576}}}}`",
        ) from error
    kept = step.protect.segment
    if kept is None:
        return ()
    names = [segment.name for segment in declared]
    if kept != TEXT and kept not in names:
        raise PolicyError(
            f"there is no segment `{kept}`",
            policy=place,
            needed="one of " + ", ".join((TEXT, *names)),
            help="name one of `segments`, or `text` for all that is in none of them",
        )
    chosen = tuple(segment for segment in declared if segment.name != kept)
    if len({segment.start is None for segment in chosen}) > 1:
        raise PolicyError(
            f"`{step.name}` drops tokens of a range and tokens of an id, which may be the same ones",
            policy=place,
            needed="segments of one kind",
            found=", ".join(segment.name for segment in chosen),
            help="give both `input_ids`, or both `start` and `stop`",
        )
    if not chosen:
        raise PolicyError(
            f"`{step.name}` drops tokens that are no text, and the policy does not say which those are",
            policy=policy.where(("steps", number)),
            needed="a segment of the prompt",
            help="add for instance `segments: {image: {input_ids: 32000, tokens: 576}}` beside `steps`",
        )
    return chosen


def _plan_step(policy: LoadedPolicy, number: int, step: Step, cuts: DecoderCuts, num_layers: int) -> list[PlannedPrune]:
    place = policy.where(("steps", number, "at"))
    try:
        layers = step.at.resolve(num_layers)
    except ValueError as error:
        front = step.at.site == "block_input"
        raise PlanError(
            str(error),
            policy=policy.where(("steps", number, "at", "layers")),
            needed=f"layers between 0 and {num_layers - 1 - (not front)}: the model has {num_layers}, and the cut is "
            + ("in front of a layer" if front else "behind a layer"),
            help="`tokcc inspect MODEL` lists the layers",
        ) from error
    sites = {
        "block_input": (cuts.entry.node, *cuts.block_output[:-1]),
        "after_attention": cuts.after_attention,
        "block_output": cuts.block_output,
    }
    if step.at.site not in sites:
        raise PlanError(
            "a decoder's prompt is cut between its layers, or in front of them",
            policy=place,
            needed="`site: " + "`, `site: ".join(sites) + "`",
            help="what an encoder makes is reduced there: `part: encoder`",
        )
    counts = planned_counts(policy, number, step, layers, num_layers)
    score, select, reduce = _pieces(policy, number, step)
    result = []
    for layer, count in zip(layers, counts, strict=True):
        name = sites[step.at.site][layer]
        if layer == num_layers - 1 and step.at.site != "block_input":
            raise PlanError(
                f"no layer is behind layer {layer}: nothing would get shorter",
                policy=place,
                needed=f"layers up to {num_layers - 2}",
                help="choose an earlier layer",
            )
        if name is None:
            raise PlanError(f"layer {layer} has no cut `{step.at.site}`", policy=place, help="use `site: block_output`")
        result.append(
            PlannedPrune(
                step=number,
                layer=layer,
                name=step.name,
                where=policy.where(("steps", number)),
                site=step.at.site,
                cut=name,
                count=count,
                present=None,
                removed=None,
                added=0,
                first=0 if step.protect.first == "auto" else int(step.protect.first),
                last=max(step.protect.last, 1),
                positions=step.positions,
                score=score,
                select=select,
                reduce=reduce,
            )
        )
    return result


def _pieces(policy: LoadedPolicy, number: int, step: Step) -> tuple[PromptScore | None, PromptSelector, PromptReducer]:
    def place(key: str) -> str:
        return policy.where(("steps", number, key))

    select: PromptSelector = resolve_piece(
        step.select or PieceSpec(kind="topk"), PromptSelector, "prompt.selectors", place("select")
    )
    reduce: PromptReducer = resolve_piece(
        step.reduce or PieceSpec(kind="drop"), PromptReducer, "prompt.reducers", place("reduce")
    )
    if step.score is not None:
        score: PromptScore = resolve_piece(step.score, PromptScore, "prompt.scores", place("score"))
        return score, select, reduce
    if select.wants_score:
        raise PolicyError(
            f"`select: {{kind: {select.kind}}}` needs a score",
            policy=policy.where(("steps", number)),
            help="add for instance `score: {kind: last_row}`",
        )
    return None, select, reduce


def _counted(policy: LoadedPolicy, prunes: Sequence[PlannedPrune], segments: Sequence[Segment]) -> list[PlannedPrune]:
    """Say how many candidates there are at each cut, and leave out those where nothing goes."""
    known = [segment.count for segment in segments]
    initial = sum(count for count in known if count is not None) if segments and None not in known else None
    present, result = initial, []
    for prune in prunes:
        count = prune.count
        if prune.reduce.refills:
            result.append(prune)
            continue
        if count.nothing:
            continue
        if not segments:
            if count.kind == "remove":
                raise PlanError(
                    "prompts have different lengths: a number of removed tokens has no meaning for all of a prompt",
                    policy=policy.where(("steps", prune.step, "budget")),
                    needed="`tokens`, `keep` or `schedule`, or a segment of known size",
                    help="say how many stay: `budget: {keep: 0.5}`",
                )
            if prune.reduce.added(100) or prune.select.counts or (prune.score is not None and prune.score.counts_text):
                raise PlanError(
                    f"`{prune.name}` needs to know how many tokens may go",
                    policy=prune.where,
                    needed="a segment of known size",
                    help="add `segments: {image: {input_ids: ..., tokens: N}}` and `protect: {segment: text}`",
                )
            result.append(prune)
            continue
        if present is None or initial is None:
            if count.kind != "remove" or prune.reduce.added(100):
                raise _uncounted(policy, prune, segments)
            removed, added = int(count.amount), 0
        else:
            kept = int(count.kept(EagerBuilder(), present, initial))
            # All of them may go: the text stays.
            removed = min(int(count.amount), present) if count.kind == "remove" else present - kept
            added = prune.reduce.added(removed) if removed else 0
            removed -= added
        counts = prune.select.counts or (prune.score is not None and prune.score.counts_text)
        if counts and present is None:
            raise _uncounted(policy, prune, segments)
        if removed > 0:
            result.append(replace(prune, present=present, removed=removed, added=added))
            present = None if present is None else present - removed
    return result


def _uncounted(policy: LoadedPolicy, prune: PlannedPrune, segments: Sequence[Segment]) -> PlanError:
    name = next(segment.name for segment in segments if segment.count is None)
    return PlanError(
        f"it is not known how many tokens segment `{name}` has",
        policy=policy.where(("steps", prune.step, "budget")),
        needed="their number: how many tokens go is fixed when compiling",
        help=f"write `segments: {{{name}: {{input_ids: ..., tokens: N}}}}`",
    )


def _refuse(
    policy: LoadedPolicy,
    program: Program,
    sites: Sequence[CacheSite],
    windows: Sequence[int],
    prunes: Sequence[PlannedPrune],
) -> None:
    """Refuse what a cut cannot work with."""
    first = prunes[0]
    mask = mask_input(program, sites)
    sizes = [n.meta["val"].shape[1] for n in program.user_inputs if n.name == mask]
    if not sizes or isinstance(sizes[0], int):
        raise PlanError(
            "the decoder does not tell the first call from later ones",
            policy=first.where,
            needed="an input `attention_mask` [batch, all tokens so far] whose length varies",
            found=f"a length of {sizes[0]}" if sizes else "no such input",
            help="export the decoder with a mask of dynamic length",
        )
    for prune in prunes:
        sliding = [layer for layer, window in enumerate(windows) if window and layer > prune.behind]
        if sliding:
            raise PlanError(
                f"layers {', '.join(map(str, sliding))} see a sliding window of the prompt",
                policy=prune.where,
                needed="layers behind the cut that see everything: a window is counted in tokens, and some are gone",
                help="cut behind these layers",
            )
        if prune.positions == "compact":
            _refuse_compact(policy, program, sites, prune)
    if policy.policy.kv.layout == "slots":
        raise PlanError(
            "`kv: {layout: slots}` cannot be combined with a shorter prompt in later layers",
            policy=first.where,
            needed="the merged layout",
            found="onnxruntime-genai counts the same number of tokens in every layer",
            help="remove `kv`, and use `tokcc run` or a runtime that feeds every output back",
        )
    if len({prune.positions for prune in prunes}) > 1:
        raise PolicyError(
            "positions are kept by one step and counted anew by another",
            policy=prunes[-1].where,
            help="give all `prune` steps the same `positions`",
        )


def _refuse_compact(policy: LoadedPolicy, program: Program, sites: Sequence[CacheSite], prune: PlannedPrune) -> None:
    place = policy.where(("steps", prune.step, "positions"))
    if prune.reduce.refills:
        raise PlanError(
            "positions are not counted anew where old entries stand for tokens: none is gone",
            policy=place,
            help="use `positions: keep`",
        )
    nodes: dict[str, fx.Node] = {node.name: node for node in program.graph.nodes}
    axes = [n.meta["val"].ndim for n in program.user_inputs if "position" in n.name]
    if axes != [2]:
        raise PlanError(
            "positions of more than one axis cannot be counted anew",
            policy=place,
            needed="`position_ids` [batch, tokens]",
            found=f"{axes[0]} axes" if axes else "no positions",
            help="use `positions: keep`: images have rows and columns, of which a count knows nothing",
        )
    for site in sites[prune.behind + 1 :]:
        if find_rotation(program, nodes[site.query]) is None:
            raise PlanError(
                f"the positions of layer {site.layer} cannot be counted anew",
                policy=place,
                node=site.query,
                needed="queries that are turned by position (rotary embeddings)",
                help="use `positions: keep`",
            )
