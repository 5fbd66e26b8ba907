"""Which tokens of a padded batch are real."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tokcc.analysis.sites import Sites
from tokcc.analysis.walk import Walk
from tokcc.ir.builder import same_size
from tokcc.ir.value import Value

__all__ = ["depends_on_input", "mask_operand", "padding_of"]

aten = torch.ops.aten

MASKED_BELOW = -1e3
"""An additive mask entry below this forbids a key; a position bias is never that small."""

_WHERES = {aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther}
_BESIDE_SOFTMAX = {aten.softmax.int, aten._softmax.default, aten._to_copy.default, aten.clone.default}


def depends_on_input(node: fx.Node, user_inputs: set[fx.Node]) -> bool:
    """Return True when a node is computed from a tensor that the caller feeds (sizes do not count)."""
    seen: set[fx.Node] = set()
    front = [node]
    while front:
        current = front.pop()
        if current in user_inputs:
            return True
        if current in seen or not isinstance(current.meta.get("val"), torch.Tensor):
            continue
        seen.add(current)
        front.extend(n for n in current.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor))
    return False


def mask_operand(walk: Walk, sites: Sites, layer: int) -> fx.Node | None:
    """Return the node of the mask that a layer's attention adds or applies, or None."""
    site = sites.layers[layer].attention
    if site is None:
        return None
    nodes: dict[str, fx.Node] = walk.nodes
    if site.mask is not None:
        return nodes[site.mask]
    if site.probs is None:
        return None
    node = nodes[site.probs]
    for _ in range(8):
        if node.target in _WHERES:
            following = node.args[0]
        elif node.target is aten.add.Tensor:
            following = next((a for a in node.args[:2] if isinstance(a, fx.Node) and not _has_product(a)), None)
        elif node.target in _BESIDE_SOFTMAX and isinstance(node.args[0], fx.Node):
            node = node.args[0]
            continue
        else:
            return None
        return following if isinstance(following, fx.Node) else None
    return None


def _has_product(node: fx.Node, steps: int = 6) -> bool:
    if node.target in (aten.matmul.default, aten.bmm.default, aten.baddbmm.default):
        return True
    if steps == 0 or node.op != "call_function":
        return False
    return any(_has_product(n, steps - 1) for n in node.all_input_nodes)


def _refuse_masks(walk: Walk) -> None:
    """Refuse a model without attention that is told by an input of its own which tokens are real."""
    tensors = [n for n in walk.program.user_inputs if isinstance(n.meta.get("val"), torch.Tensor)]
    if len(tensors) > 1:
        names = ", ".join(f"`{walk.program.public_name(n)}`" for n in tensors[1:])
        walk.ctx.fail(
            f"a state-space model with further inputs ({names}): its scans do not tell which tokens are padding",
            help="export it without a padding mask, for inputs of one length",
        )


def padding_of(walk: Walk, sites: Sites, layer: int) -> Any:
    """Return the real tokens of the root space, bool ``[B, N]``, or None when the model takes no padding mask.

    The mask of the layer's own attention says it: a token is real when some query may attend to it.
    """
    layer = min(layer, len(sites.layers) - 1)
    if sites.layers[layer].mixer is not None:
        _refuse_masks(walk)
    node = mask_operand(walk, sites, layer)
    if node is None or not depends_on_input(node, set(walk.program.user_inputs)):
        return None
    attention = sites.layers[layer].attention
    assert attention is not None
    mask, rank = walk.env.get(node), walk.nodes[attention.query].meta["val"].ndim
    if mask is None:
        walk.ctx.fail(
            f"the padding mask of layer {layer} is not there yet at this cut",
            help="choose a cut behind the first layer's attention",
        )
    if not isinstance(mask, Value):
        return None
    b = walk.builder
    assert walk.batch is not None
    handle = mask.handle
    if b.dtype(handle) != torch.bool:
        handle = b.compare("gt", handle, MASKED_BELOW)
    # [B, H or 1, N or 1, N] -> [B, N]: real when any head and any query may look. The leading axes may be missing.
    full = mask.rank == rank
    for axis in range(mask.rank - 2, 0 if full else -1, -1):
        one = isinstance(mask.old[axis], int) and mask.old[axis] == 1
        handle = b.squeeze(handle, axis) if one else b.call(aten.any.dim, handle, axis)
    if not full:
        handle = b.unsqueeze(handle, 0)
    if full and same_size(mask.old[0], walk.batch.old):
        return handle
    if not full or same_size(mask.old[0], 1):
        return b.expand(handle, [walk.batch.size, -1])
    walk.ctx.fail("the padding mask is fused over batch and heads; its layout is not understood")
