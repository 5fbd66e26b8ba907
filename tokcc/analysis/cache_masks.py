"""What a decoder's masks mean: tried out on numbers, because the graphs that build them differ by family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from tokcc.analysis.cache_sites import CacheSite
from tokcc.analysis.key_bias import KeyBias, find_key_bias
from tokcc.analysis.key_index import KeyIndex
from tokcc.errors import PlanError
from tokcc.ir.program import Program
from tokcc.ir.reach import made_of

__all__ = ["mask_input", "sliding_windows"]

_FAR = 2**20
"""A past longer than any sliding window."""
_TRIALS = ((2, 5, 7), (2, 3, 40), (3, 1, 9), (2, 6, 0))


def mask_input(program: Program, sites: Sequence[CacheSite]) -> str | None:
    """Return the input that says which tokens are padding: integers or bools ``[B, T]`` that the masks depend on."""
    nodes = {node.name: node for node in program.graph.nodes}
    masks = [nodes[site.mask] for site in sites if site.mask is not None]
    ancestors = made_of(masks)
    for node in program.user_inputs:
        fake = node.meta.get("val")
        if node in ancestors and "mask" in node.name and isinstance(fake, torch.Tensor) and fake.ndim == 2:
            return node.name
    return None


def sliding_windows(program: Program, sites: Sequence[CacheSite]) -> tuple[int, ...]:
    """Return how many slots each layer's queries see at most, their own included; 0 = all.

    Raises:
        PlanError: When a mask is anything else than causal, windowed and padded, or else causal and padded with a bias
            of each key and the keys chosen by it.
    """
    nodes = {node.name: node for node in program.graph.nodes}
    padding = mask_input(program, sites)
    found: dict[str, int] = {}
    for site in sites:
        if site.mask is None:
            raise PlanError(
                f"the attention of layer {site.layer} has no mask",
                node=site.output,
                needed="a causal mask made from the lengths of the call",
                help="export the model with a past of at least 2 and at least 2 new tokens",
            )
        if site.index is not None:
            _check_indexed(program, site, site.index, padding)
        if site.mask not in found:
            bias = find_key_bias(program, site)
            if bias is None:
                found[site.mask] = _window(program, site, nodes[site.mask], padding)
            else:
                _check_biased(program, site, nodes[site.mask], padding, bias)
                found[site.mask] = 0
    return tuple(found[site.mask] for site in sites if site.mask is not None)


def _window(program: Program, site: CacheSite, mask: fx.Node, padding: str | None) -> int:
    row = _allowed(program, mask, padding, torch.ones(1, _FAR + 1, dtype=torch.bool), 1)[0, 0]
    seen = int(row.sum())
    window = 0 if seen == _FAR + 1 else seen
    for batch, new, past in _TRIALS:
        real = torch.ones(batch, past + new, dtype=torch.bool)
        if padding is not None and past > 2:
            real[0, :2] = False
        found = _allowed(program, mask, padding, real, new)
        slot = torch.arange(past + new)
        own = slot[past:, None]
        wanted = (slot <= own) & ((slot > own - window) if window else (slot >= 0)) & real[:, None, :]
        rows = real[:, past:]
        if not torch.equal(found[rows], wanted[rows]):
            raise PlanError(
                f"the mask of layer {site.layer} is not a causal one",
                node=mask.name,
                needed="every token sees the ones before it, all or a window of them, padding excepted",
                help="compile this model without an `evict_kv` step",
            )
    return window


def _check_biased(program: Program, site: CacheSite, mask: fx.Node, padding: str | None, bias: KeyBias) -> None:
    """Refuse a mask that is not a causal one with a bias of each key, of which the largest are seen."""
    generator = torch.Generator().manual_seed(0)
    heads, width = (int(bias.values.meta["val"].shape[axis]) for axis in (1, 3))
    longer = ((2, 5, bias.most + 3),) if bias.most else ()
    for batch, new, past in (*_TRIALS, *longer):
        real = torch.ones(batch, past + new, dtype=torch.bool)
        if padding is not None and past > 2:
            real[0, :2] = False
        values = torch.randn(batch, heads, past + new, width, generator=generator).to(bias.values.meta["val"].dtype)
        ends = [mask, bias.nodes[-1]]
        value, added = _evaluated(program, ends, padding, real, new, {bias.values: values})
        groups = value.shape[1] // heads
        added = added.repeat_interleave(groups, 1)[:, :, None].expand(value.shape)  # [B, H, S, L]
        slot = torch.arange(past + new)
        seen = ((slot <= slot[past:, None]) & real[:, None, :])[:, None].expand(value.shape)
        found = value > torch.finfo(value.dtype).min / 2
        count = seen.sum(-1).clamp(max=bias.most or past + new)
        least = added.masked_fill(~found, torch.inf).amin(-1)
        left = added.masked_fill(found | ~seen, -torch.inf).amax(-1)
        fits = (found <= seen).all(-1) & (found.sum(-1) == count) & (least >= left)
        fits &= (~found | (value == added)).all(-1)
        if not bool(fits.transpose(1, 2)[real[:, past:]].all()):
            raise PlanError(
                f"the mask of layer {site.layer} is made from values, and not a bias of each key",
                node=mask.name,
                needed="a number for each key, added where a causal mask lets it be seen; of many keys the largest",
                help="compile a model without such masks",
            )


def _check_indexed(program: Program, site: CacheSite, index: KeyIndex, padding: str | None) -> None:
    """Refuse a mask that does not let the keys be seen which an indexer rates best of those that may be."""
    generator = torch.Generator().manual_seed(0)
    nodes = {node.name: node for node in program.graph.nodes}
    query, gate, keys, mask = (nodes[str(name)] for name in (index.query, index.gate, index.joined, site.whole_mask))
    heads = int(query.meta["val"].shape[2])
    for batch, new, past in (*_TRIALS, (2, 5, index.most + 3)):
        real = torch.ones(batch, past + new, dtype=torch.bool)
        if padding is not None and past > 2:
            real[0, :2] = False
        shapes = {query: (new, heads, index.width), gate: (new, 1, heads), keys: (1, past + new, index.width)}
        given = {n: torch.randn(batch, *s, generator=generator).to(n.meta["val"].dtype) for n, s in shapes.items()}
        (found,) = _evaluated(program, [mask], padding, real, new, given)
        products = given[query].float() @ given[keys].float().transpose(2, 3)  # [B, S, heads, L]
        rated = (given[gate].float() @ torch.relu(products * index.scale))[:, :, 0]
        slot = torch.arange(past + new)
        seen = (slot <= slot[past:, None]) & real[:, None, :]
        best = rated.masked_fill(~seen, -torch.inf).topk(min(index.most, past + new)).indices
        wanted = seen & torch.zeros_like(seen).scatter(2, best, True)
        rows = real[:, past:]
        if not torch.equal(found.expand(batch, 1, new, past + new)[:, 0][rows], wanted[rows]):
            raise PlanError(
                f"the mask of layer {site.layer} is made by an indexer, and not the keys that it rates best",
                node=mask.name,
                needed="the largest sums over heads of a gate times the positive part of a product",
                help="compile a model without such masks",
            )


def _allowed(program: Program, mask: fx.Node, padding: str | None, real: torch.Tensor, new: int) -> torch.Tensor:
    """Evaluate a mask for ``real`` ``[B, P + S]``: bool ``[B, S, P + S]``."""
    batch, total = real.shape
    (value,) = _evaluated(program, [mask], padding, real, new, {})
    allowed = value if value.dtype == torch.bool else value > torch.finfo(value.dtype).min / 2
    # The mask of one head stands for all.
    rows: torch.Tensor = allowed[..., :total].expand(batch, allowed.shape[1], new, total)
    if rows.shape[1] > 1 and not bool((rows == rows[:, :1]).all()):
        raise PlanError("the mask differs between heads", node=mask.name, help="compile without an `evict_kv` step")
    return rows[:, 0]


def _evaluated(
    program: Program,
    ends: Sequence[fx.Node],
    padding: str | None,
    real: torch.Tensor,
    new: int,
    given: Mapping[fx.Node, torch.Tensor],
) -> list[torch.Tensor]:
    """Evaluate nodes for ``real`` ``[B, P + S]`` and given values of others."""
    total = real.shape[1]
    state = program.state_tensors()
    env: dict[fx.Node, Any] = dict(given)
    needed = made_of(ends, lambda node: node in given)
    for node in program.graph.nodes:
        if node not in needed:
            continue
        if node.op == "placeholder":
            known = state.get(node.name)
            env[node] = known if known is not None else _input(node, padding, real, new, total - new)
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env[n])
        with torch.no_grad():
            env[node] = node.target(*args, **kwargs)
    return [env[node] for node in ends]


def _input(node: fx.Node, padding: str | None, real: torch.Tensor, new: int, past: int) -> torch.Tensor:
    fake = node.meta["val"]
    batch = real.shape[0]
    if node.name == padding:
        return real.to(fake.dtype)
    if fake.ndim == 4:
        return torch.zeros((), dtype=fake.dtype).expand(batch, fake.shape[1], past, fake.shape[3])
    place = (real.cumsum(1) - 1).clamp(min=0)[:, past:]
    if fake.is_floating_point():  # embeddings
        return torch.zeros(batch, new, *fake.shape[2:], dtype=fake.dtype)
    if fake.ndim == 3:  # positions by frame, row and column
        return place.expand(fake.shape[0], -1, -1).to(fake.dtype)
    return place.to(fake.dtype) if fake.ndim == 2 else torch.zeros([batch, new], dtype=fake.dtype)
