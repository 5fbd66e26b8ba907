"""Fixed slots: every row as it is alone, the other layout's numbers, buffers shared in place, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor

from tests.decoders.engine import Engine, assert_equals_alone, build, tokens
from tests.decoders.methods import test_h2o as h2o
from tests.decoders.methods import test_keydiff as keydiff
from tests.decoders.methods import test_keyformer as keyformer
from tests.decoders.methods import test_knorm as knorm
from tests.decoders.methods import test_streaming_llm as streaming
from tests.decoders.methods import test_tova as tova
from tests.decoders.oracle import Call, Rule, run_alone
from tests.decoders.tiny import model_of, program_of
from tokcc.analysis.cache_sites import cache_sites
from tokcc.config import load_policy
from tokcc.errors import PlanError, PolicyError, TokccError
from tokcc.passes.cache.fixed_slots import fixed_slots
from tokcc.passes.cache.plan import CachePlan
from tokcc.passes.cache.planning import make_cache_plan
from tokcc.passes.cache.storage import CacheForm
from tokcc.passes.cache.storages.slots import Slots
from tokcc.passes.methods import library

CALLS = (9, 1, 1, 5, *[1] * 64)
PADDING = (0, 3, 5)
SLOTS = 12


def policy(preset: str | None = None, layout: str = "slots", **keys: Any) -> dict[str, Any]:
    steps = [{"preset": preset, **keys}] if preset else []
    return {"version": 1, "name": "p", "steps": steps, "kv": {"layout": layout}}


def windowed(rule: Rule | None, layers: tuple[int, ...], window: int = 8) -> Rule:
    """A rule for all layers but those with a sliding window, which keep what it shows."""

    def evict(call: Call) -> Tensor | None:
        if call.layer not in layers:
            return rule(call) if rule else None
        kept = list(range(max(0, call.total - (window - 1)), call.total))
        return torch.tensor([kept] * call.key.shape[0])

    return evict


# Family, keys of the preset, rule, number of states.
CASES: dict[str, tuple[str, dict[str, Any], Rule, int]] = {
    "h2o": ("llama", {"preset": "h2o", "tokens": SLOTS}, h2o.rule(SLOTS, 6), 1),
    "h2o-qwen2": ("qwen2", {"preset": "h2o", "tokens": SLOTS}, h2o.rule(SLOTS, 6), 1),
    "tova": ("llama", {"preset": "tova", "tokens": SLOTS}, tova.rule(SLOTS), 0),
    "tova-gpt2": ("gpt2", {"preset": "tova", "tokens": SLOTS}, tova.rule(SLOTS), 0),
    "streaming-llm": ("llama", {"preset": "streaming-llm", "tokens": SLOTS}, streaming.rule(SLOTS, 4), 0),
    "knorm": (
        "llama",
        {"preset": "knorm", "tokens": SLOTS, "recent": 2, "at": {"layers": "all"}},
        knorm.rule(SLOTS, 0, 2),
        0,
    ),
    "keydiff": ("llama", {"preset": "keydiff", "tokens": SLOTS}, keydiff.rule(SLOTS), 0),
    "keyformer": (
        "llama",
        {"preset": "keyformer", "tokens": SLOTS, "over": 16},
        keyformer.rule(SLOTS, 4, 1.0, 2.0, 16),
        2,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_every_row_alone_and_the_other_layout(case: str, tmp_path: Path) -> None:
    family, keys, rule, states = CASES[case]
    places = case == "streaming-llm"
    engine = assert_equals_alone(family, policy(**keys), rule, tmp_path, calls=CALLS, padding=PADDING, slots=places)
    rows = keys["tokens"] + max(-(-states * keys["tokens"] // 16), 1)
    shapes = {item.name: item.shape[1:] for item in engine.session.get_inputs() if "past" in item.name}
    heads = 4 if family == "gpt2" else 2
    assert shapes == {f"past_key_values.{i}.{part}": [heads, rows, 16] for i in range(3) for part in ("key", "value")}
    assert [item.shape[1:] for item in engine.session.get_outputs()][1:] == [[heads, rows, 16]] * 6
    assert_equals_merged(engine, family, policy(layout="merged", **keys), tmp_path)


def assert_equals_merged(engine: Engine, family: str, merged: Mapping[str, Any], folder: Path) -> None:
    """Logits, entries and states after many calls; the other layout holds as many entries by then."""
    ids, mask = tokens(len(PADDING), sum(CALLS), PADDING)
    logits, last = engine.run(ids, mask, CALLS)
    other, kept = build(family, merged, folder).run(ids, mask, CALLS)
    real = mask.bool().numpy()
    np.testing.assert_allclose(logits[real], other[real], rtol=0, atol=1e-5 * float(np.abs(other).max()))
    slots = engine.plan.otherwise.always()
    for name, wanted in kept.items():
        if not name.endswith((".key", ".value")):
            continue
        np.testing.assert_allclose(last[name][:, :, :slots], wanted, rtol=0, atol=1e-5 * float(np.abs(wanted).max()))
    for layer in range(3):
        behind = last[f"present.{layer}.key"][:, :, slots:].reshape(len(ids), -1)
        states = [value for name, value in kept.items() if name.startswith(f"present.{layer}.key_")]
        heads = last[f"present.{layer}.key"].shape[1]
        flat = [state.reshape(len(ids), heads, -1) for state in states]
        given = behind.reshape(len(ids), heads, -1)
        wanted = np.concatenate([*flat, np.zeros((len(ids), heads, given.shape[2] - sum(f.shape[2] for f in flat)))], 2)
        np.testing.assert_allclose(given, wanted, rtol=0, atol=1e-3)
        assert not last[f"present.{layer}.value"][:, :, slots:].any()


def test_layers_with_windows_alone(tmp_path: Path) -> None:
    """All of them lose nothing: they need no step, and as many slots as the window shows."""
    engine = assert_equals_alone("mistral", policy(), windowed(None, (0, 1, 2)), tmp_path, calls=CALLS)
    assert engine.plan.otherwise == Slots(slots=7, rows=8)
    none = {"version": 1, "name": "none", "steps": []}
    assert_equals_merged(engine, "mistral", none, tmp_path)


def test_layers_with_windows_among_others(tmp_path: Path) -> None:
    """Windows keep more than they show: as much as the others."""
    engine = build("gemma3", policy("h2o", tokens=SLOTS), tmp_path)
    ids, mask = tokens(3, sum(CALLS), PADDING)
    logits, _ = engine.run(ids, mask, CALLS)
    for row, count in enumerate(PADDING):
        rule = windowed(h2o.rule(SLOTS, 6), (0,))
        alone = run_alone(model_of("gemma3"), ids[row, count:], [CALLS[0] - count, *CALLS[1:]], rule)
        scale = float(alone.logits.abs().max())
        np.testing.assert_allclose(logits[row, count:], alone.logits.numpy(), rtol=0, atol=2e-4 * scale)


def test_an_entry_in_front(tmp_path: Path) -> None:
    """What was evicted, fused into one entry; together with a state."""
    step = {
        "node": "evict_kv",
        "score": {"kind": "attention_sum"},
        "select": {"kind": "best", "sinks": 2, "recent": 4},
        "reduce": {"kind": "fuse_front"},
        "budget": {"tokens": SLOTS},
    }
    merged = {"version": 1, "name": "fused", "steps": [step]}
    engine = build("llama", {**merged, "kv": {"layout": "slots"}}, tmp_path)
    assert engine.plan.otherwise == Slots(slots=SLOTS, rows=SLOTS + 2)
    ids, mask = tokens(3, sum(CALLS), PADDING)
    real = mask.bool().numpy()
    logits, last = engine.run(ids, mask, CALLS)
    other, kept = build("llama", merged, tmp_path).run(ids, mask, CALLS)
    np.testing.assert_allclose(logits[real], other[real], rtol=0, atol=1e-5 * float(np.abs(other).max()))
    for part in ("key", "value"):
        given, wanted = last[f"present.1.{part}"][:, :, SLOTS], kept[f"present.1.{part}_front"][:, :, 0]
        np.testing.assert_allclose(given, wanted, rtol=0, atol=1e-5 * float(np.abs(wanted).max()))


def test_a_prompt_longer_than_the_slots(tmp_path: Path) -> None:
    calls = (30, 1, 14, *[1] * 20)
    assert_equals_alone("llama", policy("h2o", tokens=SLOTS), h2o.rule(SLOTS, 6), tmp_path, calls=calls)


@pytest.mark.parametrize("preset", ["h2o", "tova"])
def test_padding_behind_the_prompts(preset: str, tmp_path: Path) -> None:
    """As onnxruntime-genai pads: a row gives what it gives alone, at its own tokens."""
    rule = h2o.rule(SLOTS, 6) if preset == "h2o" else tova.rule(SLOTS)
    engine = build("llama", policy(preset, tokens=SLOTS), tmp_path)
    calls, lengths = (14, *[1] * 30), (14, 9, 3)
    ids, _ = tokens(3, sum(calls), ())
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, length : calls[0]] = 0
        ids[row, length : calls[0]] = 0
    logits, _ = engine.run(ids, mask, calls)
    for row, length in enumerate(lengths):
        real = mask[row].bool()
        alone = run_alone(model_of("llama"), ids[row, real], (length, *calls[1:]), rule)
        scale = float(alone.logits.abs().max())
        np.testing.assert_allclose(logits[row, real], alone.logits.numpy(), rtol=0, atol=2e-4 * scale)


@pytest.mark.parametrize("case", ["h2o", "tova", "streaming-llm", "keyformer"])
def test_one_buffer_for_past_and_present(case: str, tmp_path: Path) -> None:
    """Runtimes let a call write over what it reads."""
    family, keys, _, _ = CASES[case]
    engine = build(family, policy(**keys), tmp_path)
    ids, mask = tokens(3, sum(CALLS), PADDING)
    wanted, _ = engine.run(ids, mask, CALLS)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    shapes = {i.name: (3, *i.shape[1:]) for i in engine.session.get_inputs() if "past" in i.name}
    buffers = {name: ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32)) for name, shape in shapes.items()}
    start, logits = 0, []
    for length in CALLS:
        stop = start + length
        binding = engine.session.io_binding()
        binding.bind_cpu_input("input_ids", ids[:, start:stop].numpy())
        binding.bind_cpu_input("attention_mask", mask[:, :stop].numpy())
        binding.bind_cpu_input("position_ids", positions[:, start:stop].numpy())
        for name, buffer in buffers.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
        binding.bind_output("logits")
        engine.session.run_with_iobinding(binding)
        logits.append(binding.get_outputs()[-1].numpy())
        start = stop
    np.testing.assert_array_equal(np.concatenate(logits, 1), wanted)


@pytest.mark.parametrize("case", ["h2o", "tova", "streaming-llm"])
def test_a_buffer_is_read_before_it_is_written(case: str, tmp_path: Path) -> None:
    """Buffers are copied by slices, and nothing else reads them; every slice is needed for what takes its place."""
    family, keys, _, _ = CASES[case]
    build(family, policy(**keys), tmp_path)
    graph = onnx.load(tmp_path / "model.onnx").graph
    makers = {name: node for node in graph.node for name in node.output}
    for layer in range(3):
        for part in ("key", "value"):
            buffer = f"past_key_values.{layer}.{part}"
            needed, work = set(), [f"present.{layer}.{part}"]
            assert makers[work[0]].op_type == "Concat"
            while work:
                name = work.pop()
                if name not in needed and name in makers:
                    needed.add(name)
                    work += names_read(makers[name])
            readers = [node for node in graph.node if buffer in names_read(node) and node.op_type != "Shape"]
            assert readers
            assert {node.op_type for node in readers} == {"Slice"}
            assert all(node.output[0] in needed for node in readers)


def names_read(node: onnx.NodeProto) -> set[str]:
    """What a node reads, bodies of branches and loops included."""
    found = set(node.input)
    for attribute in node.attribute:
        for graph in [attribute.g, *attribute.graphs]:
            for inner in graph.node:
                found |= names_read(inner)
            found |= {output.name for output in graph.output}
    return found


def plan_of(family: str, given: Mapping[str, Any]) -> CachePlan:
    program = program_of(family)
    return make_cache_plan(load_policy(given, presets=library()), program, cache_sites(program))


def two(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    return {**policy(), "steps": [first, second]}


REFUSED: dict[str, tuple[str, dict[str, Any], str, type[TokccError]]] = {
    "nothing": ("llama", policy(), "layers 0, 1, 2 keep everything", PlanError),
    "some layers": ("llama", policy("tova", tokens=8, at={"layers": [0, 2]}), "layers 1 keep everything", PlanError),
    "a share": ("llama", policy("tova", budget={"keep": 0.5}), "a share of the text", PlanError),
    "capacities by layer": (
        "llama",
        policy("tova", tokens=64, select={"kind": "layer_ramp", "recent": 8}),
        "its selector says",
        PlanError,
    ),
    "wider rows": ("llama", policy("h2o", tokens=8, select={"kind": "pooled_heads"}), "its selector says", PlanError),
    "the prompt only": ("llama", policy("snapkv", tokens=64), "appends what is generated", PlanError),
    "unequal": (
        "llama",
        two(
            {"preset": "tova", "tokens": 8, "at": {"layers": [0]}},
            {"preset": "tova", "tokens": 9, "at": {"layers": [1, 2]}},
        ),
        "8 in layer 0, 9 in layer 1",
        PlanError,
    ),
    "heads": (
        "llama",
        two(
            {"preset": "tova", "tokens": 8, "heads": {"kind": "listed", "heads": {0: [0], 1: [0], 2: [0]}}},
            {"preset": "tova", "tokens": 8, "heads": {"kind": "listed", "heads": {0: [1], 1: [1], 2: [1]}}},
        ),
        "treats heads of layer 0 differently",
        PlanError,
    ),
    "a wider window": (
        "gemma3",
        policy("tova", tokens=6, at={"layers": [1, 2]}),
        "fewer than a sliding window",
        PlanError,
    ),
    "as a storage": (
        "llama",
        {"version": 1, "steps": [{"node": "store_kv", "store": {"kind": "slots", "slots": 8, "rows": 8}}]},
        "layout: slots",
        PolicyError,
    ),
    "another storage": (
        "llama",
        two({"preset": "tova", "tokens": 8}, {"node": "store_kv", "store": {"kind": "merged"}}),
        "in another way than fixed slots",
        PlanError,
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    family, given, message, kind = REFUSED[case]
    with pytest.raises(kind) as caught:
        plan_of(family, given)
    assert message in str(caught.value)


def test_refused_models() -> None:
    """A model without a padding mask, and layers of different widths."""
    loaded = load_policy(policy(), presets=library())
    forms = [CacheForm(2, 16, 16, torch.float32), CacheForm(2, 32, 32, torch.float32)]
    with pytest.raises(PlanError, match="padding mask"):
        fixed_slots(loaded, forms, (8, 8), [], {}, None)
    with pytest.raises(PlanError, match="different numbers of heads or widths"):
        fixed_slots(loaded, forms, (8, 8), [], {}, "attention_mask")
    with pytest.raises(PlanError, match="layer 0 does not go into fixed slots"):
        fixed_slots(loaded, [CacheForm(2, 16, 8, torch.float32)] * 2, (8, 8), [], {}, "attention_mask")


def test_forms_that_do_not_fit() -> None:
    storage = Slots(slots=8, rows=9)
    half = CacheForm(2, 16, 16, torch.float16, ("key_score",))
    with pytest.raises(ValueError, match="a cache in fp32"):
        storage.check(half)
    with pytest.raises(ValueError, match="of one width, not of 16 and 8"):
        storage.check(CacheForm(2, 16, 8, torch.float32))
    with pytest.raises(ValueError, match="at least 10 rows"):
        storage.check(CacheForm(2, 16, 16, torch.float32, ("key_score", "key_step", "key_weight")))
    storage.check(CacheForm(2, 16, 16, torch.float16))


def test_a_plan_that_is_written_down_and_read_again() -> None:
    plan = plan_of("llama", policy("h2o", tokens=SLOTS))
    assert plan.to_dict()["kv"] == {"layout": "slots"}
    assert plan_of("llama", plan.to_dict()).otherwise == plan.otherwise == Slots(slots=12, rows=13)
