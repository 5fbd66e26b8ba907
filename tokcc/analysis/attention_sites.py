"""Finding attention: fused SDPA nodes, and matmul-softmax-matmul written out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tokcc.ir.program import Program

__all__ = ["AttentionSite", "attention_sites"]

aten = torch.ops.aten

_PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.baddbmm.default}
_SOFTMAXES = {aten.softmax.int, aten._softmax.default}
_BETWEEN = {
    aten.div.Tensor,
    aten.mul.Tensor,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.where.self,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten._to_copy.default,
    aten.reshape.default,
    aten.clone.default,
    aten.type_as.default,
    aten.clamp.default,
    aten.tanh.default,
    aten.maximum.default,
}
_UNCHANGED = {aten._to_copy.default, aten.reshape.default, aten.clone.default, aten.type_as.default}
_MAX_STEPS = 8


@dataclass(frozen=True)
class AttentionSite:
    """One attention.

    Attributes:
        output: Name of the node whose value is the attended values.
        query: Name of the query operand, ``[..., Nq, D]``.
        key: Name of the key operand, ``[..., Nk, D]``, or ``[..., D, Nk]`` when ``transposed``.
        value: Name of the value operand.
        mask: Name of the mask operand of a fused attention, or None.
        probs: Name of the probabilities of an attention written out, or None when it is fused.
        scale: Factor of the logits of a fused attention.
        causal: The fused attention's causal flag.
        transposed: The key arrives transposed.
        plain_scale: Factor of the logits where nothing else happens to them before the softmax; None where something is
            added to them, or some are masked.
    """

    output: str
    query: str
    key: str
    value: str
    mask: str | None = None
    probs: str | None = None
    scale: float | None = None
    causal: bool = False
    transposed: bool = False
    plain_scale: float | None = None

    @property
    def mixes(self) -> str:
        """Name of the node where tokens have met."""
        return self.output

    @property
    def fused(self) -> bool:
        """True for an SDPA node."""
        return self.probs is None


def attention_sites(program: Program) -> list[AttentionSite]:
    """Return every attention in the graph, in execution order."""
    found: list[AttentionSite] = []
    for node in program.graph.nodes:
        if node.target is aten.scaled_dot_product_attention.default:
            found.append(_fused(node))
        elif node.target in _SOFTMAXES:
            site = _written_out(node)
            if site is not None:
                found.append(site)
    return found


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _fused(node: fx.Node) -> AttentionSite:
    mask = _argument(node, 3, "attn_mask", None)
    scale = node.kwargs.get("scale")
    query: Any = node.args[0]
    width = query.meta["val"].shape[-1]
    factor = float(scale) if isinstance(scale, int | float) else float(width) ** -0.5
    causal = bool(_argument(node, 5, "is_causal", False))
    return AttentionSite(
        output=node.name,
        query=query.name,
        key=str(node.args[1]),
        value=str(node.args[2]),
        mask=mask.name if isinstance(mask, fx.Node) else None,
        scale=factor,
        causal=causal,
        plain_scale=factor if mask is None and not causal else None,
    )


def _written_out(softmax: fx.Node) -> AttentionSite | None:
    product = _logits(softmax)
    if product is None:
        return None
    probs = softmax
    for _ in range(_MAX_STEPS):
        for user in probs.users:
            if user.target in _PRODUCTS and user.args[-2] is probs:
                left = 1 if product.target is aten.baddbmm.default else 0
                query, key = product.args[left], product.args[left + 1]
                if isinstance(query, fx.Node) and isinstance(key, fx.Node):
                    return AttentionSite(
                        output=user.name,
                        query=query.name,
                        key=key.name,
                        value=str(user.args[-1]),
                        probs=probs.name,
                        transposed=True,
                        plain_scale=_plain_scale(softmax, product),
                    )
        onward = [
            u for u in probs.users if u.target in (aten._to_copy.default, aten.dropout.default, aten.reshape.default)
        ]
        if len(onward) != 1:
            return None
        probs = onward[0]
    return None


def _logits(softmax: fx.Node) -> fx.Node | None:
    """Follow the softmax's input back to the product of queries and keys."""
    node: Any = softmax.args[0]
    for _ in range(_MAX_STEPS):
        if not isinstance(node, fx.Node):
            return None
        if node.target in _PRODUCTS:
            return node
        if node.target not in _BETWEEN:
            return None
        following = [
            a
            for a in node.all_input_nodes
            if isinstance(a.meta.get("val"), torch.Tensor) and _reaches_product(a, _MAX_STEPS)
        ]
        if not following:
            return None
        node = following[0]
    return None


def _plain_scale(softmax: fx.Node, product: fx.Node) -> float | None:
    """Return what the logits are multiplied by between their product and the softmax; None where more happens."""
    if product.target is aten.baddbmm.default:
        return None
    factor = 1.0
    node: Any = softmax.args[0]
    while node is not product:
        by: Any = node.args[1] if len(node.args) > 1 else None
        if node.target is aten.mul.Tensor and isinstance(by, int | float):
            factor *= by
        elif node.target is aten.div.Tensor and isinstance(by, int | float):
            factor /= by
        elif node.target not in _UNCHANGED:
            return None
        node = node.args[0]
    return factor


def _reaches_product(node: fx.Node, steps: int) -> bool:
    if node.target in _PRODUCTS:
        return True
    if steps == 0 or node.target not in _BETWEEN:
        return False
    return any(_reaches_product(a, steps - 1) for a in node.all_input_nodes)
