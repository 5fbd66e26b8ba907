"""Prompts that get shorter between layers, whatever the method: what it rests on, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.decoders.tiny import program_of as program_of_family
from tests.passes.oracle import program_of as program_of_encoder
from tests.passes.reference_models import patches, vision
from tests.prompt.engine import PADDING, PROMPT, TOKENS, build, compare, policy, reference_calls, visual_policy
from tests.prompt.models import IMAGE, LAYERS, model_of, program_of, prompts
from tests.prompt.oracle import Cut, Seen, run
from tests.prompt.test_fastv import rule as fastv
from tokcc.analysis.cache_sites import cache_sites
from tokcc.config import load_policy
from tokcc.errors import PlanError, PolicyError, TokccError
from tokcc.passes.cache.planning import make_cache_plan
from tokcc.passes.methods import library
from tokcc.testing import reduce_program


def planned(wanted: Mapping[str, Any], family: str = "llama") -> Any:
    program = program_of(family)
    return make_cache_plan(load_policy(wanted, presets=library()), program, cache_sites(program))


@pytest.mark.parametrize("step", [{"keep": 1.0}, {"budget": {"tokens": 99}}, {"budget": {"remove": 0}}])
def test_nothing_to_drop_is_the_model_as_it_is(step: Mapping[str, Any], tmp_path: Path) -> None:
    plan = planned(visual_policy({"preset": "fastv", **step}))
    assert plan.prompt is None
    assert not plan.changes


def test_two_steps_one_after_the_other(tmp_path: Path) -> None:
    steps = [{"preset": "fastv", "layer": 0, "keep": 0.75}, {"preset": "fastv", "layer": 2, "budget": {"remove": 5}}]
    wanted = policy(steps, segments={"image": {"input_ids": IMAGE, "tokens": TOKENS}})
    compare("llama", wanted, lambda: [Cut(0, fastv(12)), Cut(2, fastv(7))], tmp_path)


@pytest.mark.slow
def test_a_cut_between_attention_and_mlp(tmp_path: Path) -> None:
    step = {"preset": "fastv", "at": {"layers": [1], "site": "after_attention"}}
    engine = build("llama", visual_policy(step), tmp_path)
    ids, mask = prompts(PADDING, PROMPT, PROMPT + 2, TOKENS)
    after, last = engine.run(ids, mask, (PROMPT, 1, 1))
    lengths = [last[f"present.{layer}.key"].shape[2] for layer in range(LAYERS)]
    assert lengths == [PROMPT + 2] * 2 + [PROMPT + 2 - TOKENS // 2] * (LAYERS - 2)
    # Tokens that stay see what they see with the cut behind the MLP: it works on each token by itself.
    whole = build("llama", visual_policy({"preset": "fastv"}), tmp_path)
    behind, _ = whole.run(ids, mask, (PROMPT, 1, 1))
    np.testing.assert_allclose(after[:, -3:], behind[:, -3:], rtol=0, atol=2e-4 * np.abs(behind).max())


def test_a_fixed_range(tmp_path: Path) -> None:
    """A range counts tokens, not padding, and says itself how many there are."""

    def first(seen: Seen) -> list[int]:
        row = seen.probs[seen.layer][:, -1].mean(0)
        among = list(range(3, 15))
        stay = sorted(among, key=lambda j: (-float(row[j]), j))[:6]
        return sorted(set(seen.alive) - set(among) | set(stay))

    wanted = policy([{"preset": "fastv"}], segments={"document": {"start": 3, "stop": 15}})
    compare("llama", wanted, lambda: [Cut(1, first)], tmp_path, steps=3)


def test_a_number_of_removed_tokens_needs_no_count(tmp_path: Path) -> None:
    wanted = policy([{"preset": "fastv", "budget": {"remove": 4}}], segments={"image": {"input_ids": IMAGE}})
    compare("llama", wanted, lambda: [Cut(1, fastv(TOKENS - 4))], tmp_path, steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama-mha", "qwen2"])
def test_other_families(family: str, tmp_path: Path) -> None:
    compare(family, visual_policy({"preset": "fastv"}), lambda: [Cut(1, fastv(TOKENS // 2))], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "gpt-neox", "falcon", "phi3", "qwen3"])
def test_lengths_in_other_families(family: str, tmp_path: Path) -> None:
    wanted = policy(
        [{"preset": "fastv", "layer": 0, "budget": {"remove": 6}}], segments={"image": {"start": 2, "stop": 12}}
    )
    engine = build(family, wanted, tmp_path, program_of_family(family))
    ids, mask = prompts(PADDING, PROMPT, PROMPT + 2, TOKENS)
    logits, last = engine.run(ids, mask, (PROMPT, 1, 1))
    lengths = [last[f"present.{layer}.key"].shape[2] for layer in range(3)]
    assert lengths == [PROMPT + 2, PROMPT - 4, PROMPT - 4]
    wanted_logits = reference_calls(engine.program, ids, mask, (PROMPT, 1, 1)).numpy()
    real = mask.bool().numpy()
    np.testing.assert_allclose(logits[real], wanted_logits[real], rtol=0, atol=1e-4 * np.abs(wanted_logits).max())


def test_the_last_token_alone(tmp_path: Path) -> None:
    whole = build("llama", visual_policy({"preset": "fastv"}), tmp_path)
    single = build("llama", visual_policy({"preset": "fastv"}, outputs={"logits": "last_token"}), tmp_path)
    ids, mask = prompts(PADDING, PROMPT, PROMPT + 2, TOKENS)
    every, _ = whole.run(ids, mask, (PROMPT, 1, 1))
    last, _ = single.run(ids, mask, (PROMPT, 1, 1))
    np.testing.assert_allclose(last, every[:, -3:], rtol=0, atol=1e-5)
    assert not any("scatter_tokens" in str(node.target) for node in single.program.graph.nodes)


def test_later_text_is_not_made_shorter(tmp_path: Path) -> None:
    engine = build("llama", visual_policy({"preset": "fastv"}), tmp_path)
    ids, mask = prompts((0,), PROMPT, PROMPT + 6, TOKENS)
    ids[:, PROMPT : PROMPT + 4] = IMAGE
    together, last = engine.run(ids, mask, (PROMPT, 6))
    assert last["present.4.key"].shape[2] == PROMPT + 6 - TOKENS // 2
    alone, _ = engine.run(ids, mask, (PROMPT, *[1] * 6))
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-4 * np.abs(alone).max())


def test_another_number_of_tokens_stops_the_engine(tmp_path: Path) -> None:
    """Text would go without a word otherwise."""
    engine = build("llama", visual_policy({"preset": "fastv"}), tmp_path)
    ids, mask = prompts((0, 0), PROMPT, PROMPT, TOKENS)
    engine.run(ids, mask, (PROMPT,))
    for found in (0, TOKENS - 1, TOKENS + 1):
        other = ids.clone()
        other[1][ids[1] == IMAGE] = 5
        other[1, 2 : 2 + found] = IMAGE
        with pytest.raises(Exception, match=r"(?i)index|indices"):
            engine.run(other, mask, (PROMPT,))


@pytest.mark.parametrize(
    "step", [{"preset": "fastv"}, pytest.param({"preset": "lazyllm-prefill"}, marks=pytest.mark.slow)]
)
def test_padding_behind_the_prompt_stops_the_engine(step: Mapping[str, Any], tmp_path: Path) -> None:
    engine = build("llama", visual_policy(step), tmp_path)
    ids, mask = prompts((0, 0), PROMPT, PROMPT, TOKENS)
    mask[1, -1] = 0
    with pytest.raises(Exception, match=r"(?i)index|indices"):
        engine.run(ids, mask, (PROMPT,))


def test_with_an_eviction(tmp_path: Path) -> None:
    """Behind a cut, what is evicted is evicted from what is left: sinks and recent tokens of it stay."""
    capacity, new = 18, 6
    steps = [{"preset": "fastv"}, {"preset": "streaming-llm", "positions": "keep", "budget": {"tokens": capacity}}]
    wanted = policy(steps, segments={"image": {"input_ids": IMAGE, "tokens": TOKENS}})
    engine = build("llama", wanted, tmp_path)
    calls = (PROMPT, *[1] * new)
    ids, mask = prompts(PADDING, PROMPT, sum(calls), TOKENS)
    batch, last = engine.run(ids, mask, calls)
    assert {last[f"present.{layer}.key"].shape[2] for layer in range(LAYERS)} == {capacity}
    (sinks,) = {eviction.sinks for eviction in engine.plan.evictions}

    def left(slots: list[int]) -> list[int]:
        return slots if len(slots) <= capacity else slots[:sinks] + slots[len(slots) - (capacity - sinks) :]

    model = model_of("llama")
    for row, padding in enumerate(PADDING):
        own, prompt = ids[row, padding:], PROMPT - padding
        alive = run(model, own, prompt, [Cut(1, fastv(TOKENS // 2))]).alive[0]
        total = len(own)

        def hide(module: Any, args: Any, kwargs: Any, *, alive: list[int] = alive, prompt: int = prompt) -> Any:
            first = list(range(prompt)) if module.layer_idx < 2 else alive
            seen = torch.eye(total, dtype=torch.bool)  # noqa: B023
            for query in range(prompt):
                seen[query, [j for j in first if j <= query]] = True
            slots = left(first)
            for query in range(prompt, total):  # noqa: B023
                seen[query, [*slots, query]] = True
                slots = left([*slots, query])
            hidden = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
            return args, {**kwargs, "attention_mask": hidden[None, None]}

        hooks = [layer.self_attn.register_forward_pre_hook(hide, with_kwargs=True) for layer in model.model.layers]
        with torch.no_grad():
            alone = model(input_ids=own[None], use_cache=False).logits[0]
        for hook in hooks:
            hook.remove()
        rows = [*alive, *range(prompt, total)]
        scale = float(alone.abs().max())
        np.testing.assert_allclose(batch[row, padding:][rows], alone[rows].numpy(), rtol=0, atol=2e-4 * scale)


REFUSED: list[tuple[dict[str, Any], type[TokccError], str]] = [
    (visual_policy({"preset": "fastv", "layer": 4}), PlanError, "no layer is behind layer 4"),
    (visual_policy({"preset": "fastv", "layer": 5}), PlanError, "layer 5 does not exist"),
    (visual_policy({"preset": "fastv", "at": {"site": "encoder_output"}}), PlanError, "cut between its layers"),
    (visual_policy({"preset": "fastv"}, kv={"layout": "slots"}), PlanError, "slots"),
    (policy([{"preset": "fastv"}]), PolicyError, "does not say which those are"),
    (policy([{"preset": "fastv"}], segments={"image": {"tokens": 5}}), PolicyError, "which tokens belong to it"),
    (policy([{"preset": "fastv"}], segments={"image": {"start": 5, "stop": 5}}), PolicyError, "belong to it"),
    (policy([{"preset": "fastv"}], segments={"image": {"input_ids": 5}}), PlanError, "how many tokens segment `image`"),
    (
        policy(
            [{"preset": "adaptinfer", "layers": [1], "budget": {"remove": 3}}], segments={"image": {"input_ids": 5}}
        ),
        PlanError,
        "how many tokens segment `image`",
    ),
    (policy([{"preset": "adaptinfer", "layers": [1], "tokens": [3], "protect": {"segment": "words"}}]), PolicyError,
     "no segment `words`"),
    (policy([{"preset": "lazyllm-prefill", "budget": {"remove": 3}}]), PlanError, "different lengths"),
    (visual_policy({"preset": "fastv", "score": {"kind": "last_rows"}}), PolicyError, "unknown"),
    (
        policy(
            [{"preset": "fastv"}],
            segments={"image": {"input_ids": 5, "tokens": 9}, "rest": {"start": 2, "stop": 5}},
        ),
        PolicyError,
        "segments of one kind",
    ),
    (
        policy([{"preset": "fastv"}, {"preset": "lazyllm-prefill"}], segments={"image": {"input_ids": 5, "tokens": 9}}),
        PolicyError,
        "different segments",
    ),
    (
        policy(
            [{"preset": "fastv", "layer": 0}, {"preset": "fastv", "layer": 2, "positions": "compact"}],
            segments={"image": {"input_ids": 5, "tokens": 9}},
        ),
        PolicyError,
        "counted anew by another",
    ),
    (
        policy([{"preset": "fastv"}, {"preset": "streaming-llm"}], segments={"image": {"input_ids": 5, "tokens": 9}}),
        PlanError,
        "turns queries or keys itself",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("wanted", "kind", "what"), REFUSED)
def test_refused(wanted: dict[str, Any], kind: type[TokccError], what: str) -> None:
    with pytest.raises(kind, match=what):
        planned(json.loads(json.dumps(wanted)))


def test_positions_that_are_learned_cannot_be_counted_anew() -> None:
    program = program_of_family("gpt2")
    wanted = policy(
        [{"preset": "fastv", "layer": 0, "positions": "compact", "budget": {"remove": 2}}],
        segments={"image": {"start": 2, "stop": 8}},
    )
    with pytest.raises(PlanError, match="counted anew"):
        make_cache_plan(load_policy(wanted, presets=library()), program, cache_sites(program))


def test_sliding_windows_behind_the_cut_are_refused() -> None:
    program = program_of_family("mistral")
    wanted = policy(
        [{"preset": "fastv", "layer": 0, "budget": {"remove": 2}}], segments={"image": {"start": 2, "stop": 8}}
    )
    with pytest.raises(PlanError, match="sliding window"):
        make_cache_plan(load_policy(wanted, presets=library()), program, cache_sites(program))


def test_the_applied_policy_gives_the_same_plan() -> None:
    plan = planned(visual_policy({"preset": "pyramiddrop", "layers": [0, 2], "keep": [1.0, 0.5]}))
    again = planned(plan.to_dict())
    assert [prune.removed for prune in plan.prompt.prunes] == [8]
    assert [(p.layer, p.removed) for p in again.prompt.prunes] == [(p.layer, p.removed) for p in plan.prompt.prunes]


def test_dressed_prompts_have_what_is_needed() -> None:
    prompt = planned(visual_policy({"preset": "fastv"})).prompt
    mask = torch.ones(2, prompt.shortest + 4, dtype=torch.int64)
    mask[1, :3] = 0
    ids = torch.full_like(mask, IMAGE)
    made = prompt.dressed({"input_ids": ids, "attention_mask": mask})["input_ids"]
    assert ((made == IMAGE) & (mask > 0)).sum(1).tolist() == [TOKENS, TOKENS]


def test_an_encoder_has_no_prompt() -> None:
    program = program_of_encoder(vision(), {"patches": patches(2, 50)})
    with pytest.raises(PlanError, match="for a decoder's prompt"):
        reduce_program(program, visual_policy({"preset": "fastv"}))
