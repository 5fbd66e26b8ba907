"""From a policy's step to the sparse attention of an encoder's layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from tokcc.analysis.attention_sites import AttentionSite
from tokcc.analysis.sites import Sites
from tokcc.config import LoadedPolicy, PieceSpec, Step
from tokcc.errors import PlanError
from tokcc.passes.budget import planned_counts, refuse_budget
from tokcc.passes.piece import resolve_piece
from tokcc.passes.sparse.grids.attend import PlannedGrid
from tokcc.passes.sparse.grids.piece import GridSelector
from tokcc.passes.unused_keys import refuse_keys

__all__ = ["plan_grid"]


def plan_grid(
    policy: LoadedPolicy, number: int, step: Step, sites: Sites, layers: Sequence[int]
) -> Iterator[PlannedGrid]:
    """Resolve one step.

    Args:
        policy: The policy.
        number: Place of the step.
        step: It.
        sites: What the model offers.
        layers: The chosen layers, ascending.

    Raises:
        PlanError: The step cannot be applied.
        PolicyError: A piece or parameter is unknown, or a key has no meaning here.
    """
    where = policy.where(("steps", number))
    place = policy.where(("steps", number, "select"))
    select: GridSelector = resolve_piece(
        step.select or PieceSpec(kind="regions"), GridSelector, "sparse.grids.selectors", place
    )
    _refuse_keys(policy, number, step)  # a selector of decoders says more about what is wrong
    counts = planned_counts(policy, number, step, tuple(layers), len(sites.layers))
    refuse_budget(policy, number, select.kind, counts)
    first = sites.prefix if step.protect.first == "auto" else int(step.protect.first)
    last = step.protect.last or (sites.suffix if step.protect.first == "auto" else 0)
    grid = _grid(sites, first + last, select, where)
    _check_regions(grid, select, place)
    for layer in layers:
        site = _site(sites, layer, policy.where(("steps", number, "at", "layers")))
        yield PlannedGrid(
            step=number,
            name=step.name,
            where=where,
            layer=layer,
            site=site,
            select=select,
            grid=grid,
            first=first,
            last=last,
            scale=_scale(sites, layer, site, select, place),
            sites=sites,
        )


def _refuse_keys(policy: LoadedPolicy, number: int, step: Step) -> None:
    """Refuse what belongs to other steps."""
    why = "sparse attention in an encoder, where the selector says all"
    refuse_keys(policy, number, step, ("score", "reduce", "heads", "store", "blocks"), why)
    for key, given in {
        "stage": step.at.stage,
        "length": step.at.length,
        "site": step.at.site if step.at.site in ("encoder_output", "projector_output") else None,
    }.items():
        if given is not None:
            raise PlanError(
                f"`at.{key}` has no meaning for sparse attention in an encoder",
                policy=policy.where(("steps", number, "at")),
                needed="layers whose attention is replaced in every call",
                help=f"leave `{key}` out",
            )


def _grid(sites: Sites, others: int, select: GridSelector, where: str) -> tuple[int, int]:
    """Return the rows and columns of the patches."""
    needed = "an encoder of images, exported with a fixed size"
    if sites.looked_up:
        raise PlanError(
            "the tokens are looked up by ids, as words are, and are no grid of patches",
            policy=where,
            needed=needed,
            help="use a method that is for texts: `tokcc inspect MODEL` lists what fits",
        )
    if not isinstance(sites.tokens, int):
        raise PlanError(
            "the number of tokens depends on the input, and a grid of patches has a fixed size",
            policy=where,
            needed=needed,
            help="export the model with a fixed number of tokens, and only the batch dynamic",
        )
    if sites.middle is not None:
        raise PlanError(
            "a class token stands between the patches",
            policy=where,
            needed="class and register tokens in front of the patches, or behind them",
            help="use another method: `tokcc inspect MODEL` lists what fits",
        )
    patches, laid_out, square = sites.tokens - others, sites.laid_out, False
    if select.grid_rows is not None:
        rows = select.grid_rows
    elif laid_out is not None and math.prod(laid_out) == patches:
        if len(laid_out) != 2:
            sizes = " x ".join(map(str, laid_out)) if len(laid_out) > 1 else f"one line of {laid_out[0]}"
            raise PlanError(
                f"the tokens are laid out as {sizes}, and are no grid of rows and columns",
                policy=where,
                needed=needed,
                help="set the parameter `grid_rows` if they may be taken for one",
            )
        rows = laid_out[0]
    else:
        rows, square = math.isqrt(max(patches, 0)), True
    if patches < 1 or patches % rows or (square and rows * rows != patches):
        raise PlanError(
            f"{patches} patches are no grid {'of equal sides' if square else f'of {rows} rows'}",
            policy=where,
            needed=needed,
            found=f"{sites.tokens} tokens, {others} of them no patches",
            help="set the parameter `grid_rows`, and `protect: {first: N}` for tokens in front that are no patches",
        )
    return rows, patches // rows


def _check_regions(grid: tuple[int, int], select: GridSelector, place: str) -> None:
    rows, columns = grid
    if rows % select.across or columns % select.across:
        fitting = [str(n) for n in range(1, min(grid) + 1) if rows % n == columns % n == 0]
        raise PlanError(
            f"a grid of {rows} x {columns} patches cannot be cut into {select.across} x {select.across} equal regions",
            policy=place,
            needed="a number of regions that divides rows and columns",
            help=f"set the parameter `regions` (`across` of the selector) to one of {', '.join(fitting)}",
        )
    try:
        select.check(select.across**2)
    except ValueError as error:
        raise PlanError(
            f"the selector `{select.kind}` cannot work with {select.across} x {select.across} regions",
            policy=place,
            needed=str(error),
            help="change its parameters",
        ) from error


def _site(sites: Sites, layer: int, place: str) -> AttentionSite:
    """Return the attention of a layer, where every token attends to every other."""
    block = sites.layers[layer]
    if block.attention is None or block.windowed is not None:
        raise PlanError(
            f"layer {layer} has no attention of all tokens to all others",
            policy=place,
            node=block.label,
            found="a scan or sampling" if block.windowed is None else block.windowed.what,
            help="choose other layers, or another method: `tokcc inspect MODEL` lists what fits",
        )
    if block.attention.plain_scale is None:
        raise PlanError(
            f"the attention of layer {layer} has a mask or a bias, which regions would have to follow",
            policy=place,
            node=block.label,
            needed="logits that are scaled and nothing else, as those of images without padding are",
            found="the mask of a fused attention" if block.attention.mask else "something between product and softmax",
            help="export the model without a mask, or use another method: `tokcc inspect MODEL` lists what fits",
        )
    return block.attention


def _scale(sites: Sites, layer: int, site: AttentionSite, select: GridSelector, place: str) -> float:
    """Return the factor of the logits."""
    assert site.plain_scale is not None
    if select.scale == "model":
        return site.plain_scale
    if site.plain_scale == 1.0:
        raise PlanError(
            f"the queries of layer {layer} arrive scaled, and cannot be scaled by the width as well",
            policy=place,
            needed="an attention that scales its logits itself",
            help="use `scale: model`",
        )
    query = sites.axes[site.query]
    heads = math.prod(factor.old for axis in query.axes[:-2] for factor in axis if factor.space is None)
    return 1 / math.sqrt(heads * query.old[-1])
