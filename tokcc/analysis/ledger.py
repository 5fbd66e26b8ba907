"""What a program costs: FLOPs and bytes per block, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from tokcc.analysis.computed import computed
from tokcc.analysis.sites import Sites
from tokcc.analysis.sizes import number
from tokcc.ir.program import Program

__all__ = ["Cost", "Ledger", "ledger", "node_flops"]

aten = torch.ops.aten


@dataclass
class Cost:
    """FLOPs (a multiply-add is two) and bytes of activations read and written."""

    flops: int = 0
    bytes: int = 0


@dataclass
class Ledger:
    """Costs at given input shapes.

    Attributes:
        blocks: One cost per transformer block.
        total: Of the whole program, embedding and heads included.
        inserted: Of the nodes that tokcc inserted.
    """

    blocks: list[Cost]
    total: Cost = field(default_factory=Cost)
    inserted: Cost = field(default_factory=Cost)


def _shape(node: Any, bindings: Mapping[Any, int]) -> tuple[int, ...]:
    return tuple(number(size, bindings) for size in node.meta["val"].shape)


def node_flops(node: fx.Node, bindings: Mapping[Any, int]) -> int:
    """Return the FLOPs of matrix products, attentions and convolutions; elementwise work is counted as bytes only."""
    target, args = node.target, node.args
    out = node.meta.get("val")
    if target in (aten.linear.default,):
        return 2 * math.prod(_shape(args[0], bindings)) * _shape(args[1], bindings)[0]
    if target in (aten.matmul.default, aten.bmm.default, aten.mm.default):
        return 2 * math.prod(_shape(node, bindings)) * _shape(args[0], bindings)[-1]
    if target in (aten.addmm.default, aten.baddbmm.default):
        return 2 * math.prod(_shape(node, bindings)) * _shape(args[1], bindings)[-1]
    if target is aten.scaled_dot_product_attention.default:
        query, key, value = (_shape(a, bindings) for a in args[:3])
        return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    if target is torch.ops.tokcc.cached_attention.default:
        query, key, value = (_shape(a, bindings) for a in args[:3])
        return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    if target is torch.ops.tokcc.block_sparse_attention.default:
        query, key, value = (_shape(args[i], bindings) for i in range(3))
        block: Any = args[6]
        listed: Any = args[3]
        room = listed.meta["val"].shape[-1]
        # At most: lists may be shorter than they have room for, and reach behind the row. A size that no input gives is
        # that of lists of all blocks.
        known = isinstance(room, int) or room.node.expr.free_symbols <= bindings.keys()
        entries = number(room, bindings) if known else -(-key[-2] // block)
        return int(2 * math.prod(query[:-1]) * entries * block * (query[-1] + value[-1]))
    if target is torch.ops.tokcc.block_maxima.default:
        query, key = (_shape(a, bindings) for a in args[:2])
        return 2 * math.prod(query) * key[-2]
    if target is torch.ops.tokcc.attention_probs.default:
        return 2 * math.prod(_shape(node, bindings)) * _shape(args[0], bindings)[-1]
    if target is torch.ops.tokcc.attention_columns.default:
        return 2 * math.prod(_shape(args[0], bindings)) * _shape(args[1], bindings)[2]
    if target is torch.ops.tokcc.merge_tokens.default:
        batch, _, width = _shape(args[0], bindings)
        kept, merged = _shape(args[2], bindings)[1], _shape(args[3], bindings)[1]
        return 2 * batch * kept * merged * width
    if target in (
        aten.conv1d.default,
        aten.conv2d.default,
        aten.conv3d.default,
        aten.convolution.default,
    ) and isinstance(out, torch.Tensor):
        return 2 * math.prod(_shape(node, bindings)) * math.prod(_shape(args[1], bindings)[1:])
    return 0


def _node_bytes(node: fx.Node, bindings: Mapping[Any, int]) -> int:
    total = 0
    for value in (node, *node.all_input_nodes):
        fake = value.meta.get("val")
        if isinstance(fake, torch.Tensor) and value.op == "call_function":
            total += math.prod(_shape(value, bindings)) * fake.element_size()
    return total


def ledger(program: Program, sites: Sites, inputs: Mapping[str, tuple[int, ...]]) -> Ledger:
    """Return the cost of a program, original or reduced.

    Args:
        program: The program.
        sites: Sites of the original program: nodes of a reduced one are counted where they came from.
        inputs: Input shapes.
    """
    bindings = program.bindings(inputs)
    ends = [_end(sites, i) for i in range(len(sites.layers))]
    start = sites.order[sites.entry.node]
    result = Ledger([Cost() for _ in sites.layers])
    taken = computed(program, bindings)
    for node in program.graph.nodes:
        made = isinstance(node.meta.get("val"), torch.Tensor | list | tuple)
        if node not in taken or node.op != "call_function" or not made:
            continue
        flops, moved = node_flops(node, bindings), _node_bytes(node, bindings)
        place = sites.order.get(node.meta.get("origin", node.name), sites.order.get(node.name))
        owners = [result.total]
        if place is not None and place > start:
            block = next((i for i, end in enumerate(ends) if place <= end), None)
            if block is not None:
                owners.append(result.blocks[block])
        if node.meta.get("tokcc"):
            owners.append(result.inserted)
        for owner in owners:
            owner.flops += flops
            owner.bytes += moved
    return result


def _end(sites: Sites, index: int) -> int:
    block = sites.layers[index]
    if block.block_output is not None:
        return sites.order[block.block_output]
    return sites.order[block.mixes]
