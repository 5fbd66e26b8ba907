"""tokcc's own operations."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch

import tokcc.kernels
from tests.lowering.cases.given import BOOL, INT, STATIC, X, Y, of
from tests.lowering.harness import Body, Case, Input

assert tokcc.kernels is not None
aten, ops = torch.ops.aten, torch.ops.tokcc


def tokens_cases() -> list[Case]:
    scores = Input(("B", "N"))
    four = Input(("B", 2, "N", 4))

    def columns(b: Any, q: Any, k: Any, mask: Any, votes: Any = None, *, others: bool) -> Any:
        return b.call(ops.attention_columns.default, q, k, mask, votes, 0.4, others)

    def merge(b: Any, x: Any, order: Any, slot: Any, weight: Any = None, first: Any = 0) -> Any:
        keep = b.slice(order, 1, 0, b.sub_sizes(b.size(x, 1), 2))
        source = b.slice(order, 1, b.sub_sizes(b.size(x, 1), 2), b.size(x, 1))
        made = b.call(ops.merge_tokens.default, x, weight, keep, source, slot, first, weight is not None)
        return b.call(operator.getitem, made, 0), b.call(operator.getitem, made, 1)

    def last_merge(b: Any, x: Any, order: Any, slot: Any) -> Any:
        return merge(b, x, order, slot, first=b.sub_sizes(b.size(x, 1), 3))

    def weighted_merge(b: Any, x: Any, order: Any, slot: Any, weight: Any) -> Any:
        return merge(b, x, order, slot, weight)

    def static_merge(b: Any, x: Any, keep: Any, source: Any, slot: Any) -> Any:
        made = b.call(ops.merge_tokens.default, x, None, keep, source, slot, 0, False)
        return b.call(operator.getitem, made, 0), b.call(operator.getitem, made, 1)

    def greedy(b: Any, x: Any, unary: Any, first: Any) -> Any:
        return b.call(ops.greedy_select.default, b.matmul(x, b.transpose(x, 1, 2)), unary, first, 3)

    def greedy_share(b: Any, x: Any, unary: Any, first: Any) -> Any:
        count = b.floordiv_sizes(b.add_sizes(b.size(x, 1), 1), 2)
        return b.call(ops.greedy_select.default, b.matmul(x, b.transpose(x, 1, 2)), unary, first, count)

    def greedy_blocked(b: Any, x: Any, blocked: Any, first: Any) -> Any:
        unary = b.where(blocked, float("-inf"), 0.0)
        return b.call(ops.greedy_select.default, b.matmul(x, b.transpose(x, 1, 2)), unary, first, 1)

    def greedy_of(form: str) -> Body:
        def body(b: Any, x: Any, unary: Any, first: Any) -> Any:
            unary = b.add(b.mul(unary, unary), 0.1)
            similarity = b.matmul(x, b.transpose(x, 1, 2))
            return b.call(ops.greedy_select.default, similarity, unary, first, 3, form)

        return body

    def dpp(b: Any, x: Any, blocked: Any, *, half: bool = False) -> Any:
        count = b.floordiv_sizes(b.add_sizes(b.size(x, 1), 1), 2) if half else 3
        unary = b.where(blocked, -1e30, 0.0)
        return b.call(ops.dpp_select.default, b.matmul(x, b.transpose(x, 1, 2)), unary, count)

    def cover(b: Any, x: Any, blocked: Any, *, half: bool = False) -> Any:
        count = b.floordiv_sizes(b.add_sizes(b.size(x, 1), 1), 2) if half else 3
        table = b.softmax(b.matmul(x, b.transpose(x, 1, 2)), 2)
        return b.call(ops.cover_select.default, b.slice(table, 1, 0, 2), b.where(blocked, -1e30, 0.0), count)

    heads, grown = Input(("B", 4, "M", 8)), Input(("B", 2, "N", 8))
    attend = ops.cached_attention.default

    def cached(b: Any, q: Any, k: Any, v: Any, *, window: int = 0, softcap: float = 0.0, padded: bool = False) -> Any:
        real = b.compare("ge", b.sum(b.slice(b.slice(v, 1, 0, 1), 3, 0, 1), 3), -1.0 if padded else -1e4)
        made = b.call(attend, b.slice(q, 2, 0, 3), k, v, b.squeeze(real, 1), window, 0.3, softcap)
        return tuple(b.call(operator.getitem, made, i) for i in range(2))

    def out_only(b: Any, q: Any, k: Any, v: Any) -> Any:
        return cached(b, q, k, v)[0]

    def weighted(b: Any, q: Any, k: Any, v: Any, bias: Any) -> Any:
        real = b.compare("ge", b.sum(b.slice(b.slice(v, 1, 0, 1), 3, 0, 1), 3), -1e4)
        made = b.call(attend, b.slice(q, 2, 0, 3), k, v, b.squeeze(real, 1), 0, 0.3, 5.0, bias)
        return tuple(b.call(operator.getitem, made, i) for i in range(2))

    index = Input(("B", 3), "index", "N")
    order, slot = Input(("B", "N"), "unique", "N"), Input(("B", 2), "index", 2)
    return [
        Case("cached_attention", cached, (heads, grown, grown), half=True),
        Case("cached_attention-out", out_only, (heads, grown, grown)),
        Case("cached_attention-padded", functools.partial(cached, padded=True), (heads, grown, grown)),
        Case("cached_attention-window", functools.partial(cached, window=2), (heads, grown, grown)),
        Case("cached_attention-softcap", functools.partial(cached, softcap=5.0), (heads, grown, grown)),
        Case("cached_attention-bias", weighted, (heads, grown, grown, Input(("B", 2, "N")))),
        Case(
            "gather_slots",
            of(ops.gather_slots.default),
            (grown, Input(("B", 2, 3), "index", "N")),
            half=True,
        ),
        Case("retain_slots", of(ops.retain_slots.default, 3), (Input(("B", 2, "N")),)),
        Case("retain_slots-ties", of(ops.retain_slots.default, 3), (Input(("B", 2, "N"), "index", 3),)),
        Case(
            "retain_slots-one",
            lambda b, x: b.call(ops.retain_slots.default, x, b.sub_sizes(b.size(x, 2), 1)),
            (Input(("B", 2, "N"), "index", 3),),
        ),
        Case(
            "retain_slots-none",
            lambda b, x: b.call(ops.retain_slots.default, b.slice(x, 2, b.size(x, 2), None), 0),
            (Input(("B", 2, "N")),),
        ),
        Case(
            "retain_slots-all",
            lambda b, x: b.call(ops.retain_slots.default, x, b.size(x, 2)),
            (Input(("B", 2, "N")),),
        ),
        Case("gather_tokens", lambda b, x, i: b.call(ops.gather_tokens.default, x, i, 1, 0), (X, index), half=True),
        Case(
            "gather_tokens-last",
            lambda b, x, i: b.call(ops.gather_tokens.default, x, i, -1, 0),
            (Input(("B", 2, 3, "N")), index),
        ),
        Case("gather_tokens-heads", lambda b, x, i: b.call(ops.gather_tokens.default, x, i, 2, 0), (four, index)),
        Case(
            "gather_tokens-nbc",
            lambda b, x, i: b.call(ops.gather_tokens.default, x, i, 0, 1),
            (Input(("N", "B", 4)), index),
        ),
        Case("gather_tokens-matrix", lambda b, x, i: b.call(ops.gather_tokens.default, x, i, 1, 0), (BOOL, index)),
        Case(
            "gather_tokens-shared",
            lambda b, x, i: b.call(ops.gather_tokens.default, x, i, 1, 0),
            (Input((1, "N", 4)), index),
        ),
        Case(
            "gather_tokens-shared-heads",
            lambda b, x, i: b.call(ops.gather_tokens.default, x, i, 3, 0),
            (Input((1, 2, 5, "N")), index),
        ),
        Case(
            "gather_tokens-shared-behind",
            lambda b, x, i: b.call(ops.gather_tokens.default, x, i, 1, 2),
            (Input((5, "N", 1, 4)), index),
        ),
        Case(
            "gather_tokens-one",
            lambda b, x, i: b.call(ops.gather_tokens.default, x, i, 1, 0),
            (Input((1, "N", 4)), Input((1, 3), "index", "N")),
        ),
        Case(
            "scatter_tokens",
            of(ops.scatter_tokens.default),
            (X, Input(("B", 3), "unique", "N"), Input(("B", 3, 4))),
            half=True,
        ),
        Case(
            "scatter_tokens-matrix",
            of(ops.scatter_tokens.default),
            (INT, Input(("B", 3), "unique", "N"), Input(("B", 3), "int")),
        ),
        Case("merge_tokens", merge, (X, order, slot), half=True),
        Case("merge_tokens-last", last_merge, (X, order, Input(("B", 2), "index", 1))),
        Case("merge_tokens-weight", weighted_merge, (X, order, slot, Input(("B", "N"), "positive")), half=True),
        Case(
            "merge_tokens-static",
            static_merge,
            (Input(("B", 4, 3)), Input(("B", 2), "unique", 2), Input(("B", 2), "index", 2), slot),
        ),
        Case("topk_select", of(ops.topk_select.default, 3, False), (scores,), half=True),
        Case("topk_select-ascending", of(ops.topk_select.default, 3, True), (scores,)),
        Case("topk_select-ties", of(ops.topk_select.default, 3, True), (Input(("B", "N"), "index", 3),)),
        Case(
            "topk_select-size",
            lambda b, x: b.call(ops.topk_select.default, x, b.floordiv_sizes(b.add_sizes(b.size(x, 1), 1), 2), True),
            (scores,),
        ),
        *(
            Case(
                f"attention_columns-{name}",
                functools.partial(columns, others=others),
                (four, four, Input(("B", 1, 1, "N"), "bool"), *((scores,) if name == "votes" else ())),
            )
            for name, others in (("plain", False), ("others", True), ("votes", True))
        ),
        Case(
            "attention_probs",
            lambda b, q, k: b.call(ops.attention_probs.default, q, k, None, 0.4),
            (four, Input(("B", 2, "M", 4))),
        ),
        Case(
            "attention_probs-bool",
            lambda b, q, k, m: b.call(ops.attention_probs.default, q, k, m, 0.4),
            (four, four, Input((1, 1, 1, "N"), "bool")),
        ),
        Case(
            "attention_probs-float",
            lambda b, q, k, m: b.call(ops.attention_probs.default, q, k, m, 0.4),
            (four, four, Input(("B", 1, "N", "N"))),
        ),
        Case("greedy_select", greedy, (X, scores, scores)),
        Case("greedy_select-share", greedy_share, (X, scores, scores)),
        Case("dpp_select", dpp, (X, BOOL)),
        Case("dpp_select-half", functools.partial(dpp, half=True), (X, BOOL)),
        Case("cover_select", cover, (X, BOOL)),
        Case("cover_select-half", functools.partial(cover, half=True), (X, BOOL)),
        Case("greedy_select-one", greedy_blocked, (X, BOOL, scores)),
        Case("greedy_select-all", greedy_of("all"), (X, scores, scores)),
        Case("greedy_select-product", greedy_of("product"), (X, scores, scores)),
        *(Case(f"recurrence-{axis}", of(ops.recurrence.default, axis), (X, Y), half=axis == 1) for axis in (0, 1, -1)),
        Case("recurrence-static", of(ops.recurrence.default, 1), (STATIC, STATIC)),
        Case(
            "recurrence-given", lambda b, x, y: b.call(ops.recurrence.default, x, y, 1, b.sum(y, 1)), (X, Y), half=True
        ),
    ]
