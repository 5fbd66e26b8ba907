"""From a policy's step to the sparse attention of layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction

import torch
from torch import fx

from tokcc.analysis.cache_sites import CacheSite
from tokcc.analysis.key_bias import KeyBias
from tokcc.config import Blocks, LoadedPolicy, PieceSpec, Step
from tokcc.errors import PlanError, PolicyError
from tokcc.ir.program import Program
from tokcc.passes.budget import Count, planned_counts, refuse_budget
from tokcc.passes.cache.beside import TOKENS
from tokcc.passes.cache.storing import key_rotations
from tokcc.passes.chosen_layers import chosen_layers
from tokcc.passes.piece import parts_of, resolve_piece
from tokcc.passes.sparse.piece import SparseScore, SparseSelector
from tokcc.passes.sparse.plan import MODEL, PlannedSparse
from tokcc.passes.sparse.scores.index_products import IndexProducts
from tokcc.passes.sparse.scores.key_bias import KeyBiasScore
from tokcc.passes.sparse.selectors.best_blocks import BestBlocks
from tokcc.passes.trained import with_weights
from tokcc.passes.unused_keys import refuse_keys

__all__ = ["joined", "model_selections", "plan_sparse"]

_CALLS = {"prefill": (2, 2**62), "decode": (0, 1), "both": (0, 2**62)}


def plan_sparse(
    policy: LoadedPolicy,
    number: int,
    step: Step,
    program: Program,
    sites: Sequence[CacheSite],
    windows: Sequence[int],
    biases: Mapping[int, KeyBias],
    warnings: list[str],
) -> Iterator[PlannedSparse]:
    """Resolve one step.

    Args:
        policy: The policy.
        number: Place of the step.
        step: It.
        program: The decoder.
        sites: Its layers.
        windows: Sliding window of each layer, 0 = none.
        biases: What layers add to the logits of keys, by layer.
        warnings: What the report must say; added to.

    Raises:
        PlanError: The step cannot be applied.
        PolicyError: A piece or parameter is unknown.
    """

    def place(key: str) -> str:
        return policy.where(("steps", number, key))

    why = "`node: sparse_attention`, which leaves all tokens where they are"
    refuse_keys(policy, number, step, ("reduce", "heads", "store"), why)
    select: SparseSelector = resolve_piece(
        step.select or PieceSpec(kind="best"), SparseSelector, "sparse.selectors", place("select")
    )
    score: SparseScore | None = None
    if step.score is not None:
        score = resolve_piece(step.score, SparseScore, "sparse.scores", place("score"))
    elif select.wants_score:
        raise PolicyError(
            f"the selector `{select.kind}` chooses by a rating, and nothing rates",
            policy=policy.where(("steps", number)),
            help="add for instance `score: {kind: pooled}`",
        )
    blocks, new = step.blocks or Blocks(), _CALLS[step.at.stage or "both"]
    if new[1] == 1:
        blocks = blocks.model_copy(update={"query": 1})
    pieces = {"select": select} if score is None else {"score": score, "select": select}
    for key, piece in pieces.items():
        with _refused(
            f"the {key} `{piece.kind}` cannot work with these blocks",
            place(key),
            help="change `blocks: {query: ..., key: ...}`, or the parameter",
        ):
            for size in (1, *select.larger) if piece is score else (1,):
                piece.check(blocks.query, blocks.key * size)
            if piece is select:
                select.check_rows(blocks.query)
    if score is not None and score.orders and new[1] > 1:
        raise PlanError(
            f"the score `{score.kind}` puts the tokens of a text in another order, which is for single tokens",
            policy=place("at"),
            needed="`at: {stage: decode}`",
            help="say that, or let the tokens stay in their order",
        )
    layers = _layers(policy, number, step, windows, warnings)
    with _refused(
        f"the selector `{select.kind}` cannot work in these layers",
        place("select"),
        found=f"layers {', '.join(map(str, layers))}",
        help="change `at: {layers: ...}`, or its parameters",
    ):
        select.check_layers(layers)
    _check_biases(step, place("score"), score, select, layers, biases, warnings)
    _check_index(step, policy.where(("steps", number)), score, select, [sites[layer] for layer in layers])
    _check_ids(step, place("select"), score, select, program)
    counts = planned_counts(policy, number, step, layers, len(windows))
    if not select.budgeted:
        refuse_budget(policy, number, select.kind, counts)
    if select.fills and all(count.nothing for count in counts):
        warnings.append(f"`{step.name}` reads everything: its budget is the whole text")
    nodes = {node.name: node for node in program.graph.nodes}
    shapes = {layer: nodes[sites[layer].query].meta["val"].shape for layer in layers}
    for layer, shape in shapes.items():
        for key, piece in pieces.items():
            with _refused(
                f"the {key} `{piece.kind}` was made for another model",
                place(key),
                help="`tokcc inspect MODEL` lists layers and heads",
            ):
                piece.check_heads(layer, int(shape[1]))
    sizes = {layer: _sizes(sites, layer, nodes) for layer in layers}
    first = sizes[min(layers)]
    score = None if score is None else with_weights(score, first, folder=policy.folder, where=place("score"))
    select = with_weights(select, first, folder=policy.folder, where=place("select"))
    for layer, count in zip(layers, counts, strict=True):
        if count.kind == "remove":
            raise PlanError(
                "`remove` is not a budget of sparse attention",
                policy=place("budget"),
                needed="`tokens` or `keep`",
                help="say how much a query reads: `budget: {tokens: 1024}`",
            )
        wants = any(getattr(piece, "unturned", False) for piece in parts_of(score, select))
        rotations = key_rotations(program, sites[layer], place("score")) if wants else None
        yield PlannedSparse(
            step=number,
            layer=layer,
            name=step.name,
            where=policy.where(("steps", number)),
            new=new,
            least=step.at.length or 0,
            block_q=blocks.query,
            block_k=blocks.key,
            budget=_in_blocks(count, blocks.key),
            score=None if score is None else score.fitted(sizes[layer]),
            select=select.fitted(sizes[layer]),
            rotations=rotations,
        )


def _sizes(sites: Sequence[CacheSite], layer: int, nodes: Mapping[str, fx.Node]) -> dict[str, int]:
    """Return the sizes of a layer by what pieces call them."""
    site = sites[layer]
    query, key = (nodes[name].meta["val"].shape for name in (site.query, site.new_key))
    sizes = {"query_heads": int(query[1]), "heads": int(key[1]), "head_width": int(query[3]), "layers": len(sites)}
    return sizes if site.index is None else {**sizes, "index_width": site.index.width}


@contextmanager
def _refused(what: str, place: str, *, help: str, found: str | None = None) -> Iterator[None]:
    """Make a piece's objection a refusal of the step."""
    try:
        yield
    except ValueError as error:
        raise PlanError(what, policy=place, needed=str(error), found=found, help=help) from error


def _check_biases(
    step: Step,
    where: str,
    score: SparseScore | None,
    select: SparseSelector,
    layers: Sequence[int],
    biases: Mapping[int, KeyBias],
    warnings: list[str],
) -> None:
    """Refuse what does not go with what a model adds to the logits of keys, or with nothing added."""
    wants = any(getattr(piece, "wants_bias", False) for piece in parts_of(score, select))
    without = [layer for layer in layers if layer not in biases]
    if wants and without:
        raise PlanError(
            f"`{step.name}` chooses keys by what the model adds to their logits, and layer {without[0]} adds nothing",
            policy=where,
            needed="a model trained with a bias of each key made from the values (Doge)",
            help="use a method that needs no training: `tokcc presets` lists them",
        )
    biased = [layer for layer in layers if layer in biases]
    if (select.compresses or select.attends) and biased:
        raise PlanError(
            f"layer {biased[0]} adds a bias to the logits of keys, and `{step.name}` writes its attention out without",
            policy=where,
            help="use `dma`, which is what the model was trained with",
        )
    if not wants and any(biases[layer].most for layer in biased):
        warnings.append(
            f"`{step.name}` takes the place of the keys that the model chooses itself by its bias in layers"
            f" {', '.join(map(str, biased))}; `dma` chooses as it was trained to"
        )


def _check_index(
    step: Step, where: str, score: SparseScore | None, select: SparseSelector, sites: Sequence[CacheSite]
) -> None:
    """Refuse what reads an indexer where there is none, and what takes its place."""
    wants = any(getattr(piece, "wants_index", False) for piece in parts_of(score, select))
    for site in sites:
        if wants and site.index is None:
            raise PlanError(
                f"`{step.name}` chooses by the model's own indexer, and layer {site.layer} has none",
                policy=where,
                needed="a model with DeepSeek Sparse Attention (DeepSeek-V3.2, GLM-5)",
                help="use a method that needs no training: `tokcc presets` lists them",
            )
        if site.index is not None and not wants:
            raise PlanError(
                f"layer {site.layer} sees the keys that the model's own indexer chooses, and `{step.name}` would take"
                " its place",
                policy=where,
                help="use `hisa`, which asks the indexer",
            )


def _check_ids(step: Step, where: str, score: SparseScore | None, select: SparseSelector, program: Program) -> None:
    """Refuse pieces that read which tokens a call brings where the model is given something else."""
    names = [program.public_name(node) for node in program.user_inputs]
    if TOKENS not in names and any(getattr(piece, "wants_ids", False) for piece in parts_of(score, select)):
        raise PlanError(
            f"`{step.name}` reads which tokens a call brings, and the model is given none",
            policy=where,
            needed=f"a decoder with an input `{TOKENS}`",
            found=", ".join(names),
            help="compile the decoder with its token embedding",
        )


def model_selections(sites: Sequence[CacheSite], biases: Mapping[int, KeyBias]) -> dict[int, PlannedSparse]:
    """Return what layers do whose queries see no more than some keys, as the model itself chooses them."""
    made: dict[int, PlannedSparse] = {}
    for site in sites:
        bias = biases.get(site.layer)
        if site.index is not None:
            index = IndexProducts().fitted({"index_width": site.index.width})
            made[site.layer] = _model_selection(site.layer, "best_by_index", site.index.most, index)
        elif bias is not None and bias.most:
            made[site.layer] = _model_selection(site.layer, "largest_bias", bias.most, KeyBiasScore(remember=False))
    return made


def _model_selection(layer: int, name: str, most: int, score: SparseScore) -> PlannedSparse:
    """Return what a layer does that sees no more than the best keys, every query its own."""

    def planned(new: tuple[int, int], then: PlannedSparse | None) -> PlannedSparse:
        return PlannedSparse(
            step=MODEL,
            layer=layer,
            name=name,
            where="the model itself",
            new=new,
            least=most + 1,
            block_q=1,
            block_k=1,
            budget=Count("tokens", Fraction(most)),
            score=score,
            select=BestBlocks(own=False),
            then=then,
        )

    return planned(_CALLS["decode"], planned(_CALLS["prefill"], None))


def joined(policy: LoadedPolicy, number: int, planned: PlannedSparse, other: PlannedSparse | None) -> PlannedSparse:
    """Return what a layer does with what an earlier step says: both, where they are for different calls."""
    if other is None:
        return planned
    whole = replace(planned, then=other)
    sizes = [(state.name, state) for one in whole.each for state in one.states(1, 1, torch.float32)]
    if not other.beside(planned):
        why = "both for the same calls"
    elif len({name for name, _ in sizes}) < len({state for _, state in sizes}):
        why = "and remember different things under one name"
    elif any(one.select.passes_on for one in whole.each):
        why = "and one of them reads what was chosen in another layer"
    else:
        return whole
    raise PolicyError(
        f"two steps choose what the queries of layer {planned.layer} read, {why}",
        policy=policy.where(("steps", number)),
        found=f"the other is {other.where}",
        help="give the steps different layers, or different stages",
    )


def _in_blocks(count: Count, block: int) -> Count:
    """Return a number of tokens as a number of blocks, rounded up; a share stays one."""
    if count.kind != "tokens":
        return count
    return Count("tokens", Fraction(-(-int(count.amount) // block)))


def _layers(
    policy: LoadedPolicy, number: int, step: Step, windows: Sequence[int], warnings: list[str]
) -> tuple[int, ...]:
    layers = chosen_layers(policy, number, step, len(windows))
    wide = tuple(layer for layer in layers if not windows[layer])
    if not wide:
        raise PlanError(
            "every chosen layer has a sliding window and reads few keys as it is",
            policy=policy.where(("steps", number, "at", "layers")),
            needed="layers that see the whole sequence",
            help="compile with `--policy none`",
        )
    if len(wide) < len(layers):
        left = ", ".join(str(layer) for layer in layers if windows[layer])
        warnings.append(f"layers {left} have sliding windows, and their attention stays as it is")
    return wide
