"""LeoAM: chunks by the bound of their abstract, the first and the newest always, with a length for each layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from tests.sparse.engine import assert_equals_rule
from tests.sparse.oracle import Look, Rule

Array = npt.NDArray[Any]
SLOTS = {"layout": "slots", "tokens": 64}


def bound(query: Array, chunk: Array) -> float:
    """What no product of the query with a key of the chunk can exceed, channel by channel."""
    return float(sum(max(q * column.max(), q * column.min()) for q, column in zip(query, chunk.T, strict=True)))


def leoam_rule(chunks: dict[int, int], wanted: int, sinks: int, local: int) -> Rule:
    """A single token reads so many chunks, whose length depends on the layer."""

    def rule(look: Look) -> Tensor | None:
        size = chunks.get(look.layer)
        if look.new > 1 or size is None:
            return None
        query, key = look.query[:, 0].double().numpy(), look.key.double().numpy()
        heads, groups = len(query), len(query) // len(key)
        starts = range(0, look.total, size)
        read = torch.zeros(heads, 1, look.total, dtype=torch.bool)
        for group in range(len(key)):
            members = range(group * groups, (group + 1) * groups)
            rated = [max(bound(query[h], key[group, s : s + size]) for h in members) for s in starts]
            newest = (look.total - 1) // size
            must = {*range(min(sinks, newest + 1)), *range(max(newest - local, 0), newest + 1)}
            rest = sorted((i for i in range(len(rated)) if i not in must), key=lambda i: -rated[i])
            # Where more must be read than there is room for, the newest are.
            for chunk in [*sorted(must, reverse=True), *rest][:wanted]:
                for head in members:
                    read[head, 0, chunk * size : (chunk + 1) * size] = True
        return read

    return rule


def leoam(*steps: dict[str, Any], kv: dict[str, Any] | None = None) -> dict[str, Any]:
    made = [{"preset": "leoam", "length": 0, **step} for step in steps]
    return {"version": 1, "name": "leoam", "steps": made, **({"kv": kv} if kv else {})}


def test_a_bound_is_one() -> None:
    rng = np.random.default_rng(0)
    query, chunk = rng.standard_normal(8), rng.standard_normal((5, 8))
    assert bound(query, chunk) >= (chunk @ query).max()


@pytest.mark.parametrize("kv", [SLOTS, pytest.param(None, marks=pytest.mark.slow)], ids=["slots", "merged"])
def test_layers_with_chunks_of_their_own(kv: dict[str, Any] | None, tmp_path: Path) -> None:
    wanted = leoam(
        {"at": {"layers": [0]}, "chunk": 4, "tokens": 16},
        {"at": {"layers": [1, 2]}, "chunk": 8, "tokens": 32},
        kv=kv,
    )
    rule = leoam_rule({0: 4, 1: 8, 2: 8}, 4, 1, 1)
    assert_equals_rule("llama", wanted, rule, tmp_path, padding=(0, 8, 16))


@pytest.mark.slow
def test_all_chunks_are_the_whole_cache(tmp_path: Path) -> None:
    assert_equals_rule("llama", leoam({"chunk": 4, "tokens": 4096}, kv=SLOTS), lambda look: None, tmp_path)


@pytest.mark.slow
def test_less_room_than_what_must_be_read(tmp_path: Path) -> None:
    wanted = leoam({"chunk": 4, "tokens": 8}, kv=SLOTS)
    assert_equals_rule("llama", wanted, leoam_rule({0: 4, 1: 4, 2: 4}, 2, 1, 1), tmp_path)
