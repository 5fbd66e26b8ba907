"""Finding the key-value cache of a decoder: what is concatenated to the past, and the attention that reads it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tokcc.analysis.attention_sites import AttentionSite, attention_sites
from tokcc.analysis.key_index import Joined, KeyIndex, find_key_index
from tokcc.ir.program import Program

__all__ = ["CacheSite", "cache_sites"]

aten = torch.ops.aten

_VIEWS = {
    aten.unsqueeze.default,
    aten.expand.default,
    aten.reshape.default,
    aten.view.default,
    aten.transpose.int,
    aten.permute.default,
    aten.clone.default,
    aten.slice.Tensor,
    aten._to_copy.default,
}
_MAX_STEPS = 12


@dataclass(frozen=True)
class CacheSite:
    """The cache of one layer. Nodes are given by name.

    Attributes:
        layer: 0-based, in execution order.
        past_key: Input ``[B, Hkv, P, D]``.
        past_value: The same for values.
        key: All keys of the call ``[B, Hkv, P + S, D]``.
        value: All values.
        new_key: Keys of the call's tokens ``[B, Hkv, S, D]``.
        new_value: Values of the call's tokens.
        present_key: Position of the keys among the outputs.
        present_value: Position of the values among the outputs.
        output: The attended values ``[B, H, S, Dv]``.
        query: ``[B, H, S, D]``.
        mask: The mask that the attention reads, or None; without what an indexer chooses.
        scale: Factor of the logits.
        softcap: Cap of the logits, 0 = none.
        whole_mask: The mask that the attention reads, with what an indexer chooses.
        index: What chooses the keys that are seen; None = nothing.
    """

    layer: int
    past_key: str
    past_value: str
    key: str
    value: str
    new_key: str
    new_value: str
    present_key: int
    present_value: int
    output: str
    query: str
    mask: str | None
    scale: float
    softcap: float
    whole_mask: str | None = None
    index: KeyIndex | None = None


def cache_sites(program: Program) -> tuple[CacheSite, ...]:
    """Return the caches that leave the program as they grew and that exactly one attention reads; often none."""
    nodes = {node.name: node for node in program.graph.nodes}
    joined = {item.joined: item for item in _joined(program)}
    found: list[CacheSite] = []
    for site in attention_sites(program) if joined else ():
        key, value = (joined.get(_origin(nodes.get(name))) for name in (site.key, site.value))  # type: ignore[arg-type]
        if key is None or value is None:
            continue
        logits = _logits(nodes, site)
        if logits is None:
            continue
        mask, scale, softcap = logits
        index = None if mask is None else find_key_index(nodes[mask], joined)
        if index is not None and any(other.index is not None and other.index.past == index.past for other in found):
            index = None  # chosen in another layer: the mask is what it is
        found.append(
            CacheSite(
                layer=len(found),
                past_key=key.past.name,
                past_value=value.past.name,
                key=key.joined.name,
                value=value.joined.name,
                new_key=key.new.name,
                new_value=value.new.name,
                present_key=key.present,
                present_value=value.present,
                output=site.output,
                query=site.query,
                mask=mask if index is None else index.mask,
                whole_mask=mask,
                index=index,
                scale=scale,
                softcap=softcap,
            )
        )
    return tuple(found)


def _joined(program: Program) -> Iterator[Joined]:
    """Yield the inputs of four axes that are concatenated with something on axis 2 and leave again."""
    outputs = program.output_values
    for past in program.user_inputs:
        fake = past.meta.get("val")
        if not isinstance(fake, torch.Tensor) or fake.ndim != 4:
            continue
        joined = _last_join(past)
        if joined is None:
            continue
        places = [i for i, value in enumerate(outputs) if _through_slices(value) is joined]
        parts: Any = joined.args[0]
        if len(places) == 1 and len(parts) == 2:
            yield Joined(past, parts[1], joined, places[0])


def _last_join(past: fx.Node) -> fx.Node | None:
    """Follow concatenations on the slot axis; an empty first one (a cache that starts empty) is looked through."""
    current, joined = past, None
    for _ in range(_MAX_STEPS):
        following = [user for user in current.users if _joins(user, current)]
        if len(following) != 1:
            break
        current = joined = following[0]
    return joined


def _joins(node: fx.Node, part: fx.Node) -> bool:
    if node.target is not aten.cat.default:
        return False
    axis = node.args[1] if len(node.args) > 1 else 0
    parts: Any = node.args[0]
    return axis in (2, -2) and parts[0] is part


def _through_slices(value: Any) -> Any:
    while isinstance(value, fx.Node) and value.target in (aten.slice.Tensor, aten.clone.default):
        value = value.args[0]
    return value


def _origin(node: fx.Node | None) -> fx.Node | None:
    """Go back from an attention's operand to the concatenation that it repeats."""
    for _ in range(_MAX_STEPS):
        if node is None or node.target is aten.cat.default:
            return node
        if node.target not in _VIEWS:
            return None
        before = node.args[0]
        node = before if isinstance(before, fx.Node) else None
    return None


def _logits(nodes: dict[str, fx.Node], site: AttentionSite) -> tuple[str | None, float, float] | None:
    """Return mask, scale and softcap of an attention, or None for one whose logits are something else."""
    if site.fused:
        return None if site.causal or site.scale is None else (site.mask, site.scale, 0.0)
    assert site.probs is not None
    probs: Any = nodes[site.probs]
    chain: list[fx.Node] = []
    while probs.target not in (aten.matmul.default, aten.bmm.default):
        chain.append(probs)
        probs = probs.args[0]
        if not isinstance(probs, fx.Node) or len(chain) > _MAX_STEPS:
            return None
    factor, cap, mask = 1.0, 0.0, None
    for node in reversed(chain):
        if node.target in (aten.softmax.int, aten._softmax.default, aten._to_copy.default, aten.clone.default):
            continue
        operand = node.args[1] if len(node.args) > 1 else None
        if node.target is aten.tanh.default:
            cap, factor = factor, 1.0
        elif node.target in (aten.mul.Tensor, aten.div.Tensor) and isinstance(operand, int | float):
            factor *= operand if node.target is aten.mul.Tensor else 1.0 / operand
        elif node.target is aten.add.Tensor and isinstance(operand, fx.Node) and mask is None:
            mask = operand.name
        else:
            return None
    # c * tanh(f * x): `cap` holds f and `factor` holds c.
    return (mask, cap * factor, factor) if cap else (mask, factor, 0.0)
