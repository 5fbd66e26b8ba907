"""Single tokens read a part of caches from which a step has taken entries: what is remembered is of what stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.decoders.methods.test_mpcache import TEXTS
from tests.decoders.methods.test_mpcache import rule as peaks
from tests.sparse.engine import assert_equals_rule
from tests.sparse.methods.test_double_sparsity import label_rule, table
from tests.sparse.methods.test_quest import quest_rule
from tests.sparse.oracle import Rule

KEPT, RECENT = 22, 3
EVICTION = {
    "node": "evict_kv",
    "score": {"kind": "window_peak"},
    "select": {"kind": "best", "recent": RECENT},
    "budget": {"tokens": KEPT},
}
LAYERS = {"layers": [1, 2]}
SPARSE: dict[str, tuple[dict[str, Any], Rule]] = {
    "pages": ({"preset": "quest", "tokens": 12, "page": 4, "length": 0, "at": LAYERS}, quest_rule(3)),
    "tokens": (
        {"preset": "double-sparsity", "tokens": 9, "channels": 5, "table": table(2), "length": 0, "at": LAYERS},
        label_rule(table(2), 5, 9, "group_max"),
    ),
}


@pytest.mark.parametrize("order", [1, pytest.param(-1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", SPARSE)
def test_what_stays_is_what_is_read(what: str, order: int, tmp_path: Path) -> None:
    step, rule = SPARSE[what]
    wanted = {"version": 1, "name": "both", "steps": [step, EVICTION][::order]}
    evict = peaks(KEPT, RECENT, "0.2")
    assert_equals_rule("llama", wanted, rule, tmp_path, calls=TEXTS, padding=(0, 8, 13), evict=evict)
