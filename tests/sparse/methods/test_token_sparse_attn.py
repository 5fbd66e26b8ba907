"""Token Sparse Attention (arXiv:2602.03216): heads attend among their own tokens, and give the others zeros."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.decoders.engine import build, tokens
from tests.decoders.tiny import model_of
from tests.sparse.eager import cut_of, look_alike
from tests.sparse.engine import policy
from tests.sparse.oracle import Look, causal, run_sparse
from tokcc.passes.budget import Count
from tokcc.passes.sparse.compressed import attend_among
from tokcc.passes.sparse.scores.window_mean import WindowMean
from tokcc.passes.sparse.selectors.tokens_by_head import TokensByHead

WINDOW, KERNEL = 6, 3


def kept(logits: Tensor, share: float, least: int) -> list[int]:
    """The tokens of one head, from its logits ``[N, N]``."""
    count = len(logits)
    window = min(WINDOW, count)
    probs = torch.softmax(logits.masked_fill(~causal(count, count), -torch.inf), -1)[count - window :]
    mean = probs.mean(0)[: count - window].tolist()
    reach = KERNEL // 2
    smooth = [sum(mean[max(j - reach, 0) : j + reach + 1]) / KERNEL for j in range(len(mean))]
    most = min(max(math.ceil(share * count), WINDOW + least), count) - window
    best = sorted(range(len(mean)), key=lambda j: -smooth[j])[:most]
    return sorted([*best, *range(count - window, count)])


def rule(share: float, least: int) -> Any:
    """What takes part, bool ``[H, S, L]``: no key for a query that does not."""

    def reads(look: Look) -> Tensor | None:
        if look.new == 1 or look.new < look.total:
            return None
        table = torch.zeros(look.query.shape[0], look.new, look.total, dtype=torch.bool)
        for head, logits in enumerate(look.logits):
            own = kept(logits, share, least)
            table[head][np.ix_(own, own)] = True
        return table

    return reads


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt-neox", marks=pytest.mark.slow)])
def test_equals_the_formula(family: str, tmp_path: Path) -> None:
    """A padded batch, each row alone; padding need not fill blocks here."""
    wanted = policy("token-sparse-attn", keep=0.6, window=WINDOW, kernel=KERNEL, least=2, length=0)
    engine = build(family, wanted, tmp_path)
    calls, padding = (37, 1, 1, 9, 1), (0, 3, 16)
    ids, mask = tokens(3, sum(calls), padding)
    logits, _ = engine.run(ids, mask, calls)
    for row, count in enumerate(padding):
        lengths = [calls[0] - count, *calls[1:]]
        alone = run_sparse(model_of(family), ids[row, count:], lengths, rule(0.6, 2), zeros=True).numpy()
        np.testing.assert_allclose(logits[row, count:], alone, rtol=0, atol=2e-4 * float(np.abs(alone).max()))


def attended(share: str, padding: int, select: TokensByHead) -> tuple[Tensor, Tensor, Tensor]:
    query, key = look_alike(4, 2, 30, 30)
    cut = cut_of(query, key, 1, 1, padding=padding)
    score = WindowMean(window=WINDOW, kernel=KERNEL).emit(cut)
    made = attend_among(cut, select.tokens(cut, score, Count("share", Fraction(share))))
    return query, key, made


def test_all_tokens_are_dense_attention() -> None:
    query, key, made = attended("1", 0, TokensByHead(last=WINDOW, least=0))
    repeated = key.repeat_interleave(2, 1)
    logits = (query @ repeated.transpose(2, 3) * 8**-0.5).masked_fill(~causal(30, 30), -torch.inf)
    torch.testing.assert_close(made, torch.softmax(logits, -1) @ repeated, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("padding", [0, 5])
def test_tokens_without_a_part_get_zeros(padding: int) -> None:
    query, key, made = attended("0.4", padding, TokensByHead(last=WINDOW, least=2))
    for head in range(4):
        own_query, own_key = query[0, head, padding:], key[0, head // 2, padding:]
        own = kept((own_query.double() @ own_key.double().T) * 8**-0.5, 0.4, 2)
        logits = (own_query[own] @ own_key[own].T * 8**-0.5).masked_fill(~causal(len(own), len(own)), -torch.inf)
        wanted = torch.zeros(30, 8)
        wanted[[padding + place for place in own]] = torch.softmax(logits, -1) @ own_key[own]
        torch.testing.assert_close(made[0, head], wanted, atol=1e-5, rtol=1e-4)
