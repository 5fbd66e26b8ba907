"""Blocks of an axis, attention to listed blocks, and choices by size."""

from __future__ import annotations

from typing import Any

import torch

import tokcc.kernels
from tests.lowering.cases.given import BOOL, X, of
from tests.lowering.harness import Body, Case, Input

aten = torch.ops.aten
ops = torch.ops.tokcc
assert tokcc.kernels is not None


def sparse_cases() -> list[Case]:
    wide = Input(("B", 4, "N", 8))
    narrow = Input(("B", 2, "N", 8))
    longer = Input(("B", 2, 70, 8))
    single = Input(("B", 4, 1, 8))
    added = Input(("B", 2, "N"))
    return [
        Case("split_blocks-middle", of(ops.split_blocks.default, 1, 4), (X,), half=True),
        Case("split_blocks-last", of(ops.split_blocks.default, 1, 4), (Input(("B", "N"), "int"),)),
        Case("split_blocks-bool", of(ops.split_blocks.default, 1, 3), (BOOL,)),
        Case("split_blocks-exact", of(ops.split_blocks.default, 1, 1), (X,)),
        Case("diagonal_sums", _diagonals, (Input(("B", 2, 3, "N")),)),
        Case("diagonal_sums-size", lambda b, x: _diagonals(b, b.slice(x, 2, 0, 4)), (Input(("B", 2, "N", "N")),)),
        Case("choose_by_size", _choice(5, 7), (X, X)),
        Case("choose_by_size-open", _choice(0, 2**62), (X, X)),
        Case("choose_by_size-inner", _choice(5, 2**62, deep=True), (X, X)),
        Case("block_maxima", _maxima(2, 3), (wide, narrow, X, BOOL), half=True),
        Case("block_maxima-past", _maxima(3, 4), (wide, longer, Input(("B", 70, 4)), Input(("B", 70), "bool"))),
        *(
            Case(f"block_sparse_attention-{lists}", _attention(lists, True), (wide, narrow, narrow), half=lists == 2)
            for lists in (1, 2, 4)
        ),
        Case("block_sparse_attention-all-keys", _attention(2, False), (wide, narrow, narrow)),
        Case("block_sparse_attention-past", _attention(2, True), (wide, longer, longer)),
        Case("block_sparse_attention-capped", _attention(2, True, 3.0), (wide, narrow, narrow)),
        Case("block_sparse_attention-valid", _valid, (wide, narrow, narrow, Input(("B", "N"), "bool"))),
        *(
            Case(f"block_sparse_attention-biased-{lists}", _biased(lists), (wide, narrow, narrow, added))
            for lists in (1, 2, 4)
        ),
        *(
            Case(f"block_sparse_attention-biased-{name}", _single(2), (single, keys, keys, BOOL, added))
            for name, keys in (("one-query", narrow), ("buffer", Input(("B", 2, 72, 8))))
        ),
        *(
            Case(f"block_sparse_attention-{name}-{lists}", _single(lists), (single, keys, keys, BOOL))
            for lists in (1, 2, 4)
            for name, keys in (("one-query", narrow), ("buffer", Input(("B", 2, 72, 8))), ("rest", longer))
        ),
    ]


def _diagonals(b: Any, x: Any) -> Any:
    """The last rows of a causal table."""
    rows = b.arange(b.size(x, 3), x)
    own = b.unsqueeze(b.slice(rows, 0, b.sub_sizes(b.size(x, 3), b.size(x, 2)), None), 1)
    return b.call(ops.diagonal_sums.default, b.where(b.compare("le", rows, own), x, 0.0))


def _choice(low: int, high: int, deep: bool = False) -> Body:
    """Something with several nodes on each side, one of which both sides read."""

    def body(b: Any, x: Any, y: Any) -> Any:
        shared = b.exp(x)
        one, other = b.sqrt(b.add(shared, 1.0)), b.mul(b.add(shared, y), 2.0)
        if deep:
            one = b.call(ops.choose_by_size.default, one, b.sub(one, y), [b.size(x, 1)], [0], [8])
        return b.call(ops.choose_by_size.default, other, one, [b.size(x, 1), b.size(x, 0)], [low, 1], [high, 9])

    return body


def _maxima(block_q: int, block_k: int) -> Body:
    """The biases are made of numbers for each key, of which the last ones are the queries' own."""

    def body(b: Any, query: Any, key: Any, biases: Any, valid: Any) -> Any:
        of_keys = b.cast(b.permute(biases, [0, 2, 1]), torch.float32)  # [B, H, L]
        own = b.slice(b.cast(query, torch.float32), 3, 0, 1)
        op = ops.block_maxima.default
        return b.call(op, query, key, b.squeeze(own, 3), of_keys, valid, block_q, block_k)

    return body


def _lists(b: Any, query: Any, key: Any, lists: int, block_q: int, block_k: int) -> tuple[Any, Any]:
    """All blocks in order; of them the first ones in odd rows of queries, and in the last list."""
    rows = b.size(b.call(ops.split_blocks.default, query, 2, block_q), 2)
    blocks = b.call(ops.split_blocks.default, key, 2, block_k)
    many = b.size(blocks, 2)
    place = b.arange(many, key)
    shape = [b.size(query, 0), lists, rows, many]
    index = b.expand(b.reshape(place, [1, 1, 1, many]), shape)
    row = b.reshape(b.arange(rows, key), [1, 1, rows])
    odd = b.call(aten.remainder.Scalar, row, 2)
    last = b.reshape(b.constant("last", torch.tensor([0] * (lists - 1) + [1])), [1, lists, 1])
    fewer = b.call(aten.maximum.default, odd, last)
    every = b.amax(place, 0)
    count = b.add(b.sub(every, b.mul(fewer, every)), 1)
    return index, b.expand(count, shape[:3])


def _attention(lists: int, causal: bool, softcap: float = 0.0) -> Body:
    def body(b: Any, query: Any, key: Any, value: Any) -> Any:
        index, count = _lists(b, query, key, lists, 2, 3)
        op = ops.block_sparse_attention.default
        return b.call(op, query, key, value, index, count, 2, 3, causal, 0.4, None, softcap)

    return body


def _valid(b: Any, query: Any, key: Any, value: Any, valid: Any) -> Any:
    index, count = _lists(b, query, key, 2, 2, 3)
    # The first key of all is seen by everyone, so that no row is empty.
    first = b.compare("eq", b.arange(b.size(key, 2), key), 0)
    seen = b.logical_or(valid, first)
    return b.call(ops.block_sparse_attention.default, query, key, value, index, count, 2, 3, True, 0.4, seen)


def _biased(lists: int) -> Body:
    """A bias of each key."""

    def body(b: Any, query: Any, key: Any, value: Any, bias: Any) -> Any:
        index, count = _lists(b, query, key, lists, 2, 3)
        op = ops.block_sparse_attention.default
        return b.call(op, query, key, value, index, count, 2, 3, True, 0.4, None, 0.0, bias)

    return body


def _single(lists: int) -> Body:
    """One query, which sees as many keys as the mask has places: there may be room for more."""

    def body(b: Any, query: Any, key: Any, value: Any, valid: Any, *bias: Any) -> Any:
        index, count = _lists(b, query, b.unsqueeze(b.unsqueeze(valid, 1), 3), lists, 1, 3)
        first = b.compare("eq", b.arange(b.size(valid, 1), key), 0)
        seen = b.logical_or(valid, first)
        return b.call(
            ops.block_sparse_attention.default, query, key, value, index, count, 1, 3, True, 0.4, seen, 0.0, *bias
        )

    return body
