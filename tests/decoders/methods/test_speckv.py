"""SpecKV: the tokens of a draft rate the prompt, and are gone."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from tests.decoders.bundles import compiled, model_folder
from tests.decoders.engine import CALLS, assert_equals_alone, build, tokens
from tests.decoders.methods import test_h2o as h2o
from tests.decoders.methods import test_snapkv as snapkv
from tests.decoders.methods.test_snapkv import smoothed, top
from tests.decoders.oracle import Call, Rule, run_alone
from tests.decoders.tiny import model_of, program_of
from tokcc.analysis.cache_sites import cache_sites
from tokcc.backends.bundle import Bundle
from tokcc.backends.generation import Generator
from tokcc.cli import app
from tokcc.config import load_policy
from tokcc.errors import PlanError, UsageError
from tokcc.passes.cache.planning import make_cache_plan
from tokcc.passes.methods import library
from tokcc.pipeline import decoder_speed

WINDOW, KERNEL, TOKENS = 4, 3, 7
# By call and row: the prompt has look-aheads of different lengths, one of them none at all; the second text has others.
DRAFTS: dict[int, list[list[int]]] = {
    0: [[5, 17, 30, 8, 66, 3, 91, 13, 44, 27], [71, 9, 25, 60, 12, 38], []],
    3: [[40], [41, 42, 43], [44, 45]],
}
Wide = dict[int, Tensor]


def policy(*others: dict[str, Any], **given: Any) -> dict[str, Any]:
    step = {"preset": "speckv", "tokens": TOKENS, "window": WINDOW, "kernel": KERNEL, **given}
    return {"version": 1, "name": "speckv", "steps": [step, *others]}


def padded(drafts: Sequence[Sequence[int]]) -> np.ndarray[Any, Any]:
    width = max(map(len, drafts))
    return np.array([[*row, *[-1] * (width - len(row))] for row in drafts], np.int64)


def given(drafts: dict[int, list[list[int]]]) -> dict[int, dict[str, np.ndarray[Any, Any]]]:
    return {call: {"lookahead_ids": padded(rows)} for call, rows in drafts.items()}


@contextmanager
def drafting(model: nn.Module, drafts: Sequence[Sequence[int]]) -> Iterator[Wide]:
    """Run every call a second time, on a copy of its cache, with a draft behind its tokens.

    Gives the probabilities of all its queries by layer, ``[H, S + A, L + A]``.
    """
    wide: Wide = {}
    coming = iter(drafts)
    busy = False

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal busy
        if busy:
            return
        draft, places = next(coming), kwargs["position_ids"]
        more = torch.tensor([draft], dtype=torch.int64)
        behind = places[:, -1:] + 1 + torch.arange(len(draft))
        changed = {
            **kwargs,
            "input_ids": torch.cat([kwargs["input_ids"], more], 1),
            "position_ids": torch.cat([places, behind], 1),
            "past_key_values": copy.deepcopy(kwargs["past_key_values"]),
        }
        busy = True
        with torch.no_grad():
            made = module(**changed).attentions
        busy = False
        wide.update({layer: probs[0].float() for layer, probs in enumerate(made)})

    hook = model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield wide
    finally:
        hook.remove()


def rule(wide: Wide, capacity: int = TOKENS) -> Rule:
    def evict(call: Call) -> Tensor | None:
        if call.new == 1 or call.total <= capacity:
            return None
        probs = wide[call.layer]
        first = max(0, call.new - WINDOW)
        columns, groups = call.total - WINDOW, probs.shape[0] // call.key.shape[0]
        rated = []
        for head in range(0, probs.shape[0], groups):
            best = [float(probs[head : head + groups, first:, j].max()) for j in range(columns)]
            rated.append(smoothed(best, KERNEL, "max"))
        return top(rated, capacity - WINDOW, call.total)

    return evict


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_equals_the_formula(family: str, tmp_path: Path) -> None:
    """Every row of a padded batch has the look-ahead that it has alone."""
    padding = (0, 3, 4)
    engine = build(family, policy(), tmp_path)
    ids, mask = tokens(3, sum(CALLS), padding)
    logits, last = engine.run(ids, mask, CALLS, given(DRAFTS))
    model = model_of(family)
    without = engine.run(ids, mask, CALLS)[0]
    for row, count in enumerate(padding):
        lengths = [CALLS[0] - count, *CALLS[1:]]
        drafts = [DRAFTS[call][row] if call in DRAFTS else [] for call in range(len(CALLS))]
        with drafting(model, drafts) as wide:
            alone = run_alone(model, ids[row, count:], lengths, rule(wide))
        scale = float(alone.logits.abs().max())
        np.testing.assert_allclose(logits[row, count:], alone.logits.numpy(), rtol=0, atol=2e-4 * scale)
        for layer, (keys, values) in enumerate(zip(alone.keys, alone.values, strict=True)):
            for name, wanted in (("key", keys), ("value", values)):
                got = last[f"present.{layer}.{name}"][row]
                got = got[:, got.shape[1] - wanted.shape[1] :]
                np.testing.assert_allclose(got, wanted.numpy(), rtol=0, atol=2e-4 * float(wanted.abs().max()))
    # The drafts changed what is kept in some row, so the test sees them. (Of qwen2's random heads they do not.)
    changed = [np.abs(logits[row, count:] - without[row, count:]).max() for row, count in enumerate(padding)]
    assert max(changed) > 1e-2 * np.abs(without[0]).max() or family == "qwen2"


def test_without_a_lookahead_it_is_snapkv_with_maxima(tmp_path: Path) -> None:
    score = {"kind": "window_attention", "window": WINDOW, "kernel": KERNEL, "pool": "max", "group": "max",
             "rows": "max", "when": "before_pool"}  # fmt: skip
    select = {"kind": "best", "recent": WINDOW}
    maxima = snapkv.policy(tokens=TOKENS, score=score, select=select)
    ids, mask = tokens(3, sum(CALLS), (0, 3, 5))
    results = []
    for number, each in enumerate((policy(), maxima)):
        folder = tmp_path / str(number)
        folder.mkdir()
        results.append(build("llama", each, folder).run(ids, mask, CALLS))
    (logits, held), (wanted, others) = results
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    assert held.keys() == others.keys()
    for name, value in others.items():
        np.testing.assert_allclose(held[name], value, rtol=0, atol=1e-5 * np.abs(value).max())


def test_a_lookahead_leaves_no_trace_where_nothing_is_evicted(tmp_path: Path) -> None:
    drafts = {0: [[5, 17, 30]] * 3, 1: [[9, 9]] * 3}
    assert_equals_alone("llama", policy(tokens=200), None, tmp_path, given=given(drafts))


def test_other_layers_do_not_see_it(tmp_path: Path) -> None:
    """Layer 1 keeps what the call's own tokens attend to; layer 2 keeps everything."""
    given_policy = policy({"preset": "h2o", "tokens": 8, "at": {"layers": [1]}}, at={"layers": [0]})
    engine = build("llama", given_policy, tmp_path)
    ids, mask = tokens(1, sum(CALLS), (0,))
    drafts = {0: [[5, 17, 30, 8]], 3: [[40]]}
    logits, last = engine.run(ids, mask, CALLS, given(drafts))
    model = model_of("llama")
    with drafting(model, [drafts[call][0] if call in drafts else [] for call in range(len(CALLS))]) as wide:
        ahead, attended = rule(wide), h2o.rule(8, 4)

        def evict(call: Call) -> Any:
            return (ahead, attended, lambda call: None)[call.layer](call)

        alone = run_alone(model, ids[0], CALLS, evict)
    np.testing.assert_allclose(logits[0], alone.logits.numpy(), rtol=0, atol=2e-4 * float(alone.logits.abs().max()))
    assert last["present.1.key"].shape[2] == 8
    assert last["present.2.key"].shape[2] == sum(CALLS)


def test_a_model_without_token_ids_is_refused() -> None:
    program = program_of("llama")
    ids = next(node for node in program.user_inputs if node.name == "input_ids")
    renamed = type(program)(**{**vars(program), "input_names": {**program.input_names, ids.name: "tokens"}})
    with pytest.raises(PlanError, match="takes none"):
        make_cache_plan(load_policy(policy(), presets=library()), renamed, cache_sites(renamed))


def test_fixed_slots_are_refused() -> None:
    program = program_of("llama")
    given_policy = {**policy(), "kv": {"layout": "slots"}}
    with pytest.raises(PlanError, match="rates the prompt only"):
        make_cache_plan(load_policy(given_policy, presets=library()), program, cache_sites(program))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("speckv")
    given_policy = {**policy(), "outputs": {"logits": "last_token"}}
    return compiled(model_folder(folder / "model"), folder / "out", given_policy)


def test_the_loop_gives_drafts_with_the_prompts(bundle: Bundle) -> None:
    prompts, drafts = [[*range(3, 23)], [*range(30, 42)]], [[5, 7], [9, 8, 4, 6]]
    generator = Generator(bundle)
    model = model_of("llama")
    for given_rows in ({}, {"lookahead_ids": drafts}):
        made = generator.generate(prompts, max_new_tokens=40, stop=(), given=given_rows)
        for row, prompt in enumerate(prompts):
            draft = given_rows["lookahead_ids"][row] if given_rows else []
            text = torch.tensor([*prompt, *made[row][:-1]])
            lengths = [len(prompt), *[1] * 39]
            with drafting(model, [draft, *[[]] * 39]) as wide:
                logits = run_alone(model, text, lengths, rule(wide)).logits
            assert logits[len(prompt) - 1 :].argmax(1).tolist() == made[row]
    contract = next(item for item in bundle.manifest.inputs if item.name == "lookahead_ids")
    assert contract.shape == ("batch", "lookahead")
    assert contract.unguided == -1
    assert contract.doc is not None


@pytest.mark.parametrize(
    ("given_rows", "message"),
    [({"lookahead_ids": [[3], [4]]}, "does not fit"), ({"segment_ids": [[1]]}, "no input `segment_ids`")],
)
def test_what_is_given_must_fit(given_rows: dict[str, list[list[int]]], message: str, bundle: Bundle) -> None:
    with pytest.raises(UsageError, match=message):
        Generator(bundle).generate([[3, 4, 5]], given=given_rows)


def test_run_needs_no_draft(bundle: Bundle) -> None:
    result = CliRunner().invoke(app, ["run", str(bundle.path), "w3 w4 w5 w6", "-n", "4", "--json", "--quiet"])
    assert result.exit_code == 0, result.output


@pytest.mark.slow
def test_it_is_measured_without_drafts(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_speed, "CONTEXTS", (16, 40))
    folder = model_folder(tmp_path / "model")
    made = compiled(folder, tmp_path / "out", policy(), calibrate=True)
    # A prompt was cut to its budget, and what was generated stays.
    assert all(row.tokens_out < row.tokens_in for row in made.report.layers)
