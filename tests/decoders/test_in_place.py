"""A slot for every token: every row as it is alone, buffers written where they stay, and what the drivers are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from tests.decoders.bundles import compiled, model_folder
from tests.decoders.engine import CALLS, build, tokens
from tests.decoders.oracle import run_alone
from tests.decoders.test_slots import names_read, plan_of
from tests.decoders.tiny import model_of
from tests.sparse.engine import policy as sparse_policy
from tokcc.backends.calls import lengths_past
from tokcc.backends.generation import DecoderEngine, Generator
from tokcc.config import load_policy
from tokcc.errors import PlanError, PolicyError, UsageError
from tokcc.passes.cache.storages.in_place import InPlace
from tokcc.passes.methods import library

SLOTS = 96
PADDING = (0, 3, 5)


def policy(tokens: int = SLOTS, *steps: dict[str, Any]) -> dict[str, Any]:
    return {"version": 1, "name": "p", "steps": list(steps), "kv": {"layout": "slots", "tokens": tokens}}


def quest(slots: int = SLOTS, **changes: Any) -> dict[str, Any]:
    given = {"tokens": 12, "page": 4, "length": 0, "at": {"layers": "all"}, **changes}
    return {**sparse_policy("quest", **given), "kv": {"layout": "slots", "tokens": slots}}


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_every_row_as_it_is_alone(family: str, tmp_path: Path) -> None:
    engine = build(family, policy(), tmp_path)
    assert engine.plan.otherwise == InPlace(slots=SLOTS)
    ids, mask = tokens(3, sum(CALLS), PADDING)
    logits, last = engine.run(ids, mask, CALLS)
    for row, count in enumerate(PADDING):
        alone = run_alone(model_of(family), ids[row, count:], [CALLS[0] - count, *CALLS[1:]], None)
        scale = float(alone.logits.abs().max())
        np.testing.assert_allclose(logits[row, count:], alone.logits.numpy(), rtol=0, atol=2e-4 * scale)
        for layer, wanted in enumerate(alone.keys):
            got = last[f"present.{layer}.key"][row][:, count : sum(CALLS)]
            np.testing.assert_allclose(got, wanted.numpy(), rtol=0, atol=2e-4 * float(wanted.abs().max()))
        assert not last["present.0.key"][row][:, sum(CALLS) :].any()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_layers_with_windows_keep_everything(family: str, tmp_path: Path) -> None:
    engine = build(family, policy(), tmp_path)
    ids, mask = tokens(3, sum(CALLS), PADDING)
    logits, _ = engine.run(ids, mask, CALLS)
    other, _ = build(family, {"version": 1, "name": "none", "steps": []}, tmp_path).run(ids, mask, CALLS)
    real = mask.bool().numpy()
    np.testing.assert_allclose(logits[real], other[real], rtol=0, atol=1e-5 * float(np.abs(other).max()))


def test_padding_behind_the_prompts(tmp_path: Path) -> None:
    """As onnxruntime-genai pads: a row gives what it gives alone, at its own tokens."""
    engine = build("llama", quest(), tmp_path)
    calls, lengths = (14, *[1] * 30), (14, 10, 6)
    ids, _ = tokens(3, sum(calls), ())
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, length : calls[0]] = 0
        ids[row, length : calls[0]] = 0
    logits, _ = engine.run(ids, mask, calls)
    turned, front = torch.zeros_like(ids), torch.zeros_like(mask)
    for row, length in enumerate(lengths):
        behind = calls[0] - length
        turned[row, behind:], front[row, behind:] = ids[row, mask[row].bool()], 1
    wanted, _ = engine.run(turned, front, calls)
    for row in range(len(lengths)):
        found, right = logits[row, mask[row].bool()], wanted[row, front[row].bool()]
        np.testing.assert_allclose(found, right, rtol=0, atol=1e-5 * float(np.abs(right).max()))


def test_nothing_is_copied_where_little_is_read(tmp_path: Path) -> None:
    """Only what writes reads the old buffers; the sparse branch takes rows out of the new ones, and no run of them."""
    build("llama", quest(), tmp_path)
    graph = onnx.load(tmp_path / "model.onnx").graph
    makers = {name: node for node in graph.node for name in node.output}
    for layer in range(3):
        for part in ("key", "value", "key_bounds"):
            old, new = f"past_key_values.{layer}.{part}", f"present.{layer}.{part}"
            assert makers[new].op_type == "ScatterND"
            readers = [node for node in graph.node if old in names_read(node) and node.op_type != "Shape"]
            assert [node.output[0] for node in readers] == [new]
        choice = next(
            node for node in graph.node if node.op_type == "If" and f"present.{layer}.key" in names_read(node)
        )
        branches = {attribute.name: attribute.g for attribute in choice.attribute}
        for part in ("key", "value"):
            name = f"present.{layer}.{part}"
            inside = [node for node in branches["then_branch"].node if name in node.input]
            assert {node.op_type for node in inside} <= {"Reshape", "Shape"}
            taken = [
                node for node in branches["then_branch"].node if {*node.input} & {o for n in inside for o in n.output}
            ]
            assert "GatherND" in {node.op_type for node in taken}
            assert {node.op_type for node in taken} <= {"GatherND", "Concat"}
            dense = [node for node in branches["else_branch"].node if name in node.input]
            assert {node.op_type for node in dense} == {"Slice"}
        assert not any(f"present.{layer}.key" in node.input for node in graph.node if node.op_type != "Gather")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("in_place")
    model = model_folder(folder / "llama")
    return {name: compiled(model, folder / name, given) for name, given in {"none": "none", "slots": quest(80)}.items()}


def test_our_loop_writes_where_it_reads(bundles: dict[str, Any]) -> None:
    engine = DecoderEngine(bundles["slots"])
    assert engine.slots == 80
    ids, mask = tokens(2, 30, (0, 4))
    past = engine.empty_past(2)
    buffers = {name: value.ctypes.data for name, value in past.items()}
    assert {value.shape[2] for value in past.values()} == {80, 20}
    positions = np.maximum(mask.numpy().cumsum(1) - 1, 0)
    seen, start = [], 0
    for length in (20, *[1] * 10):
        stop = start + length
        logits, past = engine.call(ids.numpy()[:, start:stop], mask.numpy()[:, :stop], positions[:, start:stop], past)
        seen.append(logits)
        start = stop
    assert {name: value.ctypes.data for name, value in past.items()} == buffers
    # A shorter mask takes the text back: the same tokens again give the same.
    for stop in (25, 26):
        again, past = engine.call(
            ids.numpy()[:, stop - 1 : stop], mask.numpy()[:, :stop], positions[:, stop - 1 : stop], past
        )
        np.testing.assert_allclose(again, seen[stop - 20], rtol=0, atol=1e-5 * float(np.abs(again).max()))


def test_more_tokens_than_slots(bundles: dict[str, Any]) -> None:
    generator = Generator(bundles["slots"])
    prompt = list(range(3, 73))
    assert len(generator.generate([prompt], max_new_tokens=11, stop=())[0]) == 11
    with pytest.raises(UsageError, match="at most 80") as caught:
        generator.generate([prompt], max_new_tokens=12, stop=())
    assert "more tokens than the caches have slots" in str(caught.value)
    engine = generator.engine
    many = np.ones((1, 81), np.int64)
    with pytest.raises(UsageError, match="more tokens than"):
        engine.call(many, many, many.cumsum(1) - 1, engine.empty_past(1))


@pytest.mark.slow
def test_all_pages_are_the_whole_cache(bundles: dict[str, Any], tmp_path: Path) -> None:
    everything = compiled(tmp_path_model(bundles), tmp_path / "all", quest(80, tokens=80))
    prompts = [list(range(3, 40)), list(range(50, 60))]
    made = [Generator(bundle).generate(prompts, max_new_tokens=20, stop=()) for bundle in (bundles["none"], everything)]
    assert made[0] == made[1]


def tmp_path_model(bundles: dict[str, Any]) -> Path:
    return Path(bundles["none"].path).parent / "llama"


def test_genai_is_told_how_long(bundles: dict[str, Any]) -> None:
    written = json.loads((Path(bundles["slots"].path) / "genai_config.json").read_text())
    assert written["search"]["past_present_share_buffer"] is True
    assert written["search"]["max_length"] == written["model"]["context_length"] == 80


def test_what_is_refused() -> None:
    with pytest.raises(PlanError, match="slots for 96 tokens hold all"):
        plan_of("llama", policy(SLOTS, {"preset": "tova", "tokens": 8}))
    with pytest.raises(PolicyError, match="`tokens` goes with `layout: slots`"):
        load_policy({**policy(), "kv": {"layout": "merged", "tokens": 8}}, presets=library())
    plan = plan_of("llama", policy())
    assert plan.longest == SLOTS
    assert plan_of("llama", plan.to_dict()).otherwise == plan.otherwise


def test_checks_fit_into_the_slots() -> None:
    assert lengths_past(5) == (12, 1, 1, 11, 1, 1, 1, 1)
    assert lengths_past(5, 29) == lengths_past(5)
    assert lengths_past(5, 20) == (12, 1, 1, 2, 1, 1, 1, 1)
    assert lengths_past(5, 10) == (3, 1, 1, 1, 1, 1, 1, 1)
    assert lengths_past(5, 3) == (1, 1, 1)
