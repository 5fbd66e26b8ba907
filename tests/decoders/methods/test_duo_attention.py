"""DuoAttention: heads with low gates keep sinks and recent tokens, the others everything."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.decoders.engine import build, tokens
from tests.decoders.masked import Seen, assert_equals_masked
from tests.decoders.tiny import program_of
from tokcc.analysis.cache_sites import cache_sites
from tokcc.config import load_policy
from tokcc.errors import TokccError
from tokcc.passes.cache.heads.by_profile import ByProfile
from tokcc.passes.cache.plan import CachePlan
from tokcc.passes.cache.planning import make_cache_plan
from tokcc.passes.methods import library

GATES = [[0.9, 0.1], [0.2, 0.3], [0.8, 0.7]]


def policy(profile: Path | str, **given: object) -> dict[str, object]:
    step = {"preset": "duo-attention", "profile": str(profile), "sinks": 2, "recent": 6, **given}
    return {"version": 1, "name": "duo", "steps": [step]}


def write(folder: Path, gates: list[list[float]] = GATES) -> Path:
    path = folder / "gates.json"
    path.write_text(json.dumps({"gates": gates}))
    return path


def streaming(heads: dict[int, list[int]]) -> object:
    def rule(seen: Seen) -> None:
        total = seen.key.shape[1]
        for head in heads.get(seen.layer, []):
            for j in range(total):
                if 2 <= j < total - 6:
                    seen.weight[head, j] = 0

    return rule


def plan_of(given: dict[str, object], family: str = "llama") -> CachePlan:
    program = program_of(family)
    return make_cache_plan(load_policy(given, presets=library()), program, cache_sites(program))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_equals_masked_heads(family: str, tmp_path: Path) -> None:
    """Three of six heads: one of layer 0, both of layer 1."""
    lowest = {0: [1], 1: [0, 1]}
    _, last = assert_equals_masked(family, policy(write(tmp_path)), streaming(lowest), tmp_path)
    total = 9 + 1 + 1 + 5 + 64
    assert last["present.0.key"].shape[1:3] == (1, total)
    assert last["present.0.key_1"].shape[1:3] == (1, 8)
    assert last["present.1.value"].shape[1:3] == (2, 8)
    assert "present.1.value_1" not in last
    assert last["present.2.key"].shape[1:3] == (2, total)


def test_multi_head_attention(tmp_path: Path) -> None:
    """As many key heads as query heads, and the streaming ones not side by side."""
    gates = [[0.9, 0.1, 0.8, 0.2], [0.9] * 4, [0.9] * 4]
    given = policy(write(tmp_path, gates), streaming=2 / 12)
    assert_equals_masked("gpt-neox", given, streaming({0: [1, 3]}), tmp_path)


def test_no_streaming_head_is_the_model_itself(tmp_path: Path) -> None:
    ids, mask = tokens(2, 30, (0, 4))
    whole = build("llama", "none", tmp_path).run(ids, mask, (20, *[1] * 10))[0]
    engine = build("llama", policy(write(tmp_path), streaming=0.0), tmp_path)
    np.testing.assert_array_equal(engine.run(ids, mask, (20, *[1] * 10))[0], whole)


def test_equal_gates_count_from_the_front() -> None:
    choice = ByProfile(lowest={"gates": 0.5}, tables={"gates": ((0.5, 0.5), (0.5, 0.5))})
    assert choice.choose({0: 2, 1: 2}) == {0: (0, 1)}
    rest = ByProfile(lowest={"gates": 0.5}, tables={"gates": ((0.5, 0.5), (0.5, 0.5))}, rest=True)
    assert rest.choose({0: 2, 1: 2}) == {1: (0, 1)}


def test_a_key_head_is_chosen_by_any_of_its_query_heads() -> None:
    choice = ByProfile(highest={"echo": 0.25}, tables={"echo": ((0, 0, 9, 0),)})
    assert choice.choose({0: 2}) == {0: (1,)}


def test_the_bundle_names_the_heads_and_needs_no_profile(tmp_path: Path) -> None:
    """The applied policy replays without the file."""
    path = write(tmp_path)
    plan = plan_of(policy(path))
    path.unlink()
    again = plan_of(plan.to_dict())
    assert [(e.layer, e.heads) for e in again.evictions] == [(e.layer, e.heads) for e in plan.evictions] != []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no table `gates`"),
        ("{", "cannot be read"),
        ('{"other": []}', "no entry `gates`"),
        ('{"gates": [[1, 2]]}', "1 layers, the model"),
        ('{"gates": [[1, 2, 3], [1, 2, 3], [1, 2, 3]]}', "3 heads in layer 0"),
    ],
)
def test_a_profile_that_does_not_fit_is_refused(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "gates.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(TokccError, match=message):
        plan_of(policy(path if content is not None else ""))


def test_overlapping_steps_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    step = policy(path)["steps"][0]  # type: ignore[index]
    with pytest.raises(TokccError, match="two steps evict"):
        plan_of({"version": 1, "name": "twice", "steps": [step, {"preset": "h2o", "tokens": 20}]})
