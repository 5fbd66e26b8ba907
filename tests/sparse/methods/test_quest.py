"""Quest: pages by bounds of their products, written out from the keys of each page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.decoders.engine import build, tokens
from tests.sparse.engine import CALLS, assert_equals_rule, policy
from tests.sparse.oracle import Look, Rule, run_sparse  # noqa: F401
from tokcc.errors import PlanError

PAGE, PAGES = 4, 3
LAYERS = {"at": {"layers": [1, 2]}}
SLOTS = {"kv": {"layout": "slots", "tokens": 64}}


def bounds(query: Tensor, key: Tensor, page: int) -> Tensor:
    """``[H, D]`` and keys by query head ``[H, N, D]`` -> ``[H, pages]``."""
    found = []
    for part in key.double().split(page, 1):
        high, low = part.amax(1), part.amin(1)
        found.append(torch.maximum(query.double() * high, query.double() * low).sum(-1))
    return torch.stack(found, 1)


def quest_rule(pages: int, *, page: int = PAGE, share: str = "group_max", layers: Any = (1, 2), least: int = 0) -> Rule:
    """A single token reads so many pages, the newest among them."""

    def rule(look: Look) -> Tensor | None:
        if look.new > 1 or look.layer not in layers or look.total < least:
            return None
        score = bounds(look.query[:, 0], look.repeated, page)
        groups = look.query.shape[0] // look.key.shape[0]
        by_group = score.unflatten(0, (-1, groups))
        if share == "group_max":
            score = by_group.amax(1).repeat_interleave(groups, 0)
        elif share == "group_mean":
            score = by_group.mean(1).repeat_interleave(groups, 0)
        read = torch.zeros(look.query.shape[0], 1, look.total, dtype=torch.bool)
        for head, row in enumerate(score):
            order = sorted(range(len(row) - 1), key=lambda i: -float(row[i]))
            for number in [len(row) - 1, *order[: pages - 1]]:
                read[head, 0, number * page : (number + 1) * page] = True
        return read

    return rule


def quest(layout: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    given = {"tokens": PAGE * PAGES, "page": PAGE, "length": 0, **LAYERS, **changes}
    return {**policy("quest", **given), **(layout or {})}


@pytest.mark.parametrize("family", ["llama", pytest.param("llama-mqa", marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", ["slots", "merged"])
def test_every_row_reads_the_best_pages(family: str, layout: str, tmp_path: Path) -> None:
    engine = assert_equals_rule(family, quest(SLOTS if layout == "slots" else None), quest_rule(PAGES), tmp_path)
    told = any("copies for every token" in warning for warning in engine.plan.warnings)
    assert told == (layout == "merged")


@pytest.mark.slow
@pytest.mark.parametrize("share", ["group_mean", "each"])
@pytest.mark.parametrize("layout", ["slots", "merged"])
def test_heads_that_share_a_list(share: str, layout: str, tmp_path: Path) -> None:
    wanted = quest(SLOTS if layout == "slots" else None, share=share)
    assert_equals_rule("llama", wanted, quest_rule(PAGES, share=share), tmp_path)


@pytest.mark.slow
def test_slots_that_are_no_whole_pages(tmp_path: Path) -> None:
    slots = {"kv": {"layout": "slots", "tokens": 61}}
    assert_equals_rule("llama", quest(slots), quest_rule(PAGES), tmp_path)
    assert_equals_rule("llama", quest(slots, share="each"), quest_rule(PAGES, share="each"), tmp_path)


def test_what_is_remembered_is_what_the_keys_say(tmp_path: Path) -> None:
    """Of every page that is filled, and padding counts nothing; short texts and the first layers are read whole."""
    slots = quest(SLOTS, length=58)
    del slots["steps"][0]["at"]
    rule = quest_rule(PAGES, layers=(2,), least=58)
    engine = assert_equals_rule("llama", slots, rule, tmp_path, padding=(0, 0))
    padding = (0, 8, 3)
    ids, mask = tokens(3, sum(CALLS), padding)
    _, last = engine.run(ids, mask, CALLS)
    assert {name for name in last if "bounds" in name} == {"present.2.key_bounds"}
    state, keys = last["present.2.key_bounds"], last["present.2.key"]
    assert state.shape == (3, 2, 16, 32)
    for row, count in enumerate(padding):
        for page in range(count // PAGE, sum(CALLS) // PAGE):
            real = keys[row, :, max(page * PAGE, count) : (page + 1) * PAGE]
            np.testing.assert_array_equal(state[row, :, page], np.concatenate([real.max(1), real.min(1)], -1))


def test_evicted_entries_are_in_no_page(tmp_path: Path) -> None:
    wanted = quest()
    wanted["steps"].append({"preset": "tova", "tokens": 16})
    with pytest.raises(PlanError, match="remembers blocks of entries"):
        build("llama", wanted, tmp_path)
