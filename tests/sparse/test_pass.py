"""Sparse attention by block: dense where everything is read, in short calls, and in those of another stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.decoders.engine import build
from tests.sparse.engine import assert_equals_rule
from tests.sparse.oracle import Look, blocks_to_tokens
from tokcc.config import Blocks, load_policy
from tokcc.errors import PlanError, PolicyError
from tokcc.passes.methods import library

BLOCK = 4


def long_form(**changes: Any) -> dict[str, Any]:
    step = {
        "node": "sparse_attention",
        "blocks": {"query": BLOCK, "key": BLOCK},
        "score": {"kind": "pooled"},
        "select": {"kind": "best", "sinks": 1},
        "budget": {"tokens": 12},
    }
    return {"version": 1, "name": "own", "steps": [{**step, **changes}]}


def means(x: Tensor, block: int) -> Tensor:
    """``[H, N, D]`` -> ``[H, blocks, D]``."""
    return torch.stack([part.double().mean(1) for part in x.split(block, 1)], 1)


def pooled_rule(
    keep: int, *, share: str = "each", sinks: int = 1, block_q: int = BLOCK, block_k: int = BLOCK, layers: Any = None
) -> Any:
    def rule(look: Look) -> Tensor | None:
        if layers is not None and look.layer not in layers:
            return None
        query, key = means(look.query, block_q), means(look.repeated, block_k)
        score = query @ key.transpose(1, 2) * look.scale
        groups = look.query.shape[0] // look.key.shape[0]
        if share == "group_max":
            score = score.unflatten(0, (-1, groups)).amax(1).repeat_interleave(groups, 0)
        if share == "group_mean":
            score = score.unflatten(0, (-1, groups)).mean(1).repeat_interleave(groups, 0)
        if share == "all_mean":
            score = score.mean(0, keepdim=True).expand_as(score)
        past = look.total - look.new
        table = torch.zeros(score.shape, dtype=torch.bool)
        for head, row in ((h, r) for h in range(table.shape[0]) for r in range(table.shape[1])):
            first = past + row * block_q
            last = min(first + block_q, look.total) - 1
            must = {*range(first // block_k, last // block_k + 1), *range(min(sinks, last // block_k + 1))}
            rest = [j for j in range(last // block_k + 1) if j not in must]
            rest.sort(key=lambda j: -float(score[head, row, j]))
            table[head, row, [*sorted(must), *rest][: max(keep, len(must))][:keep]] = True
        return blocks_to_tokens(table, block_q, block_k, look.new, look.total)

    return rule


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt-neox", "llama-mqa"])
def test_pooled_blocks(family: str, tmp_path: Path) -> None:
    assert_equals_rule(family, long_form(), pooled_rule(3), tmp_path)


@pytest.mark.parametrize("share", ["group_max", "group_mean", "all_mean"])
def test_heads_that_share_a_list(share: str, tmp_path: Path) -> None:
    select = {"kind": "best", "sinks": 1, "share": share}
    assert_equals_rule("llama", long_form(select=select), pooled_rule(3, share=share), tmp_path)


def test_blocks_of_two_sizes(tmp_path: Path) -> None:
    wanted = long_form(blocks={"query": 8, "key": 4}, budget={"tokens": 16})
    assert_equals_rule("llama", wanted, pooled_rule(4, block_q=8), tmp_path)


def test_capped_logits(tmp_path: Path) -> None:
    # The first layer has a sliding window, and stays as it is.
    wanted = long_form()
    engine = assert_equals_rule("gemma2", wanted, lambda look: _windowed(look, pooled_rule(3)), tmp_path)
    assert list(engine.plan.sparse) == [layer for layer, w in enumerate(engine.plan.windows) if not w]
    assert any("sliding" in warning for warning in engine.plan.warnings)


def _windowed(look: Look, rule: Any) -> Tensor | None:
    if look.layer % 2:
        return rule(look)
    near = torch.arange(look.total) > torch.arange(look.total - look.new, look.total)[:, None] - 8
    return near[None]


def test_everything_is_dense(tmp_path: Path) -> None:
    assert_equals_rule("llama", long_form(budget={"keep": 1.0}), lambda look: None, tmp_path)


def test_short_calls_stay_dense(tmp_path: Path) -> None:
    wanted = long_form(at={"length": 50})
    sparse = pooled_rule(3)
    assert_equals_rule(
        "llama", wanted, lambda look: sparse(look) if look.total >= 50 else None, tmp_path, padding=(0, 0)
    )


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_one_stage(stage: str, tmp_path: Path) -> None:
    sparse = pooled_rule(3)
    wanted = long_form(at={"stage": stage, "layers": [0, 2]})

    def rule(look: Look) -> Tensor | None:
        return sparse(look) if (look.new > 1) == (stage == "prefill") and look.layer != 1 else None

    assert_equals_rule("llama", wanted, rule, tmp_path)


def test_two_steps_for_different_calls(tmp_path: Path) -> None:
    """Prompts and single tokens of one layer read by a step of their own each."""
    (prompts,) = long_form(at={"stage": "prefill", "length": 0})["steps"]
    (single,) = long_form(at={"stage": "decode", "length": 0}, budget={"tokens": 8}, blocks={"key": 2})["steps"]
    many, few = pooled_rule(3), pooled_rule(4, block_q=1, block_k=2)
    wanted = {"version": 1, "name": "both", "steps": [prompts, single]}
    engine = assert_equals_rule("llama", wanted, lambda look: (many if look.new > 1 else few)(look), tmp_path)
    assert {planned.step for planned in engine.plan.parts} == {0, 1}


def test_two_steps_for_the_same_calls_are_refused(tmp_path: Path) -> None:
    (prompts,) = long_form(at={"stage": "prefill"})["steps"]
    wanted = {"version": 1, "name": "both", "steps": [prompts, *long_form()["steps"]]}
    with pytest.raises(PolicyError, match="both for the same calls"):
        build("llama", wanted, tmp_path)


def test_own_blocks_may_be_left_out_for_single_queries_only(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot work with these blocks"):
        build("llama", long_form(select={"kind": "best", "own": False}), tmp_path)
    with pytest.raises(PolicyError, match="in front of a row's own"):
        build("llama", long_form(select={"kind": "best", "own": False, "local": 1}), tmp_path)


def test_blocks_beside_a_preset_keep_what_they_do_not_mention() -> None:
    wanted = {"version": 1, "steps": [{"preset": "xattention", "blocks": {"key": 16}}]}
    (step,) = load_policy(wanted, presets=library()).policy.steps
    assert step.blocks == Blocks(query=128, key=16)
    assert (step.at.stage, step.at.length) == ("prefill", 1024)


@pytest.mark.parametrize(
    ("more", "message"), [({"at": {"stage": "prefill"}}, "`stage` and `length`"), ({"blocks": {"key": 4}}, "`blocks`")]
)
def test_other_steps_have_no_stage_and_no_blocks(more: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=f"{message} are for sparse attention"):
        load_policy({"version": 1, "steps": [{"preset": "evit", **more}]}, presets=library())
