"""GemFilter against its words: the first layers choose tokens of a prompt, and the model reads those as its prompt."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from tests.decoders.bundles import compiled as compiled_folder
from tests.decoders.bundles import model_folder
from tests.decoders.engine import Engine
from tests.decoders.tiny import model_of as tiny_model
from tests.prompt.engine import PADDING, PROMPT, assert_reads_shorter, build, policy
from tests.prompt.models import LAYERS, model_of, program_of, texts
from tests.prompt.oracle import projected, read_alone
from tests.prompt.rules import best
from tokcc.analysis.cache_sites import cache_sites
from tokcc.analysis.computed import computed
from tokcc.backends.generation import Generator
from tokcc.backends.onnx import build_onnx
from tokcc.config import load_policy
from tokcc.errors import AxisError, PlanError
from tokcc.passes.cache.planning import make_cache_plan
from tokcc.passes.methods import library

STEPS = 4
GIVEN = {"layer": 2, "tokens": 9}


def gems(model: nn.Module, ids: Tensor, layer: int, tokens: int, last: int = 1, pool: int = 5) -> list[int]:
    """What stays of a prompt ``[N]``: the model reads all of it, and one layer's last query is what matters."""
    length = len(ids)
    with torch.no_grad():
        hidden = model(input_ids=ids[None], output_hidden_states=True).hidden_states[layer][0]
    cos, sin = model.model.rotary_emb(hidden[None], torch.arange(length)[None])
    query, key = projected(model.model.layers[layer], hidden, (cos[0], sin[0]))
    products = [sum(float(q[-1] @ k[j]) for q, k in zip(query, key, strict=True)) for j in range(length)]
    side = pool // 2
    pooled = [sum(products[max(j - side, 0) : j + side + 1]) / pool for j in range(length)]
    front = length - last
    return [*best(torch.tensor(pooled, dtype=torch.float64), range(front), tokens), *range(front, length)]


def compiled(family: str, folder: Path, **given: Any) -> Engine:
    return build(family, policy([{"preset": "gem-filter", **given}]), folder)


@pytest.mark.parametrize("batch", [PADDING, pytest.param((0,), marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("family", "layer", "more"),
    [
        ("llama", 2, {}),
        ("llama-mqa", 0.41, {"last": 4}),
        pytest.param("llama", 0, {}, marks=pytest.mark.slow),
        pytest.param("llama", LAYERS - 1, {"pool": 1}, marks=pytest.mark.slow),
        pytest.param("llama-mha", 1, {"pool": 3, "last": 2}, marks=pytest.mark.slow),
        pytest.param("qwen2", 2, {}, marks=pytest.mark.slow),
    ],
)
def test_equals_the_model_run_twice(
    family: str, layer: float, more: Mapping[str, int], batch: tuple[int, ...], tmp_path: Path
) -> None:
    """The prompt, single tokens and a second text: logits and all caches are those of the short prompt."""
    engine = compiled(family, tmp_path, layer=layer, tokens=9, **more)
    number = layer if isinstance(layer, int) else int(layer * LAYERS)
    found: list[list[int]] = []

    def stays(row: int, prompt: Tensor) -> list[int]:
        found.append(gems(model_of(family), prompt, number, 9, **more))
        return found[-1]

    assert_reads_shorter(engine, family, batch, (PROMPT, 1, 1, 5, 1), stays)
    assert all(len(stay) == 9 + more.get("last", 1) for stay in found)
    assert any(stay != list(range(len(stay))) for stay in found)


@pytest.mark.parametrize("tokens", [PROMPT - 3, pytest.param(200, marks=pytest.mark.slow)])
def test_what_fits_is_read_whole(tokens: int, tmp_path: Path) -> None:
    """All rows, or all but the longest: it is the model itself then."""
    engine = compiled("llama", tmp_path, layer=2, tokens=tokens)

    def stays(row: int, prompt: Tensor) -> list[int]:
        assert (len(prompt) <= tokens + 1) == (row > 0 or tokens == 200)
        return gems(model_of("llama"), prompt, 2, tokens)

    assert_reads_shorter(engine, "llama", (0, 3, PROMPT - 2), (PROMPT, *[1] * STEPS), stays)


def test_a_share_of_a_longer_prompt(tmp_path: Path) -> None:
    """Of each row as much as of the longest, so that padding goes first."""
    engine = compiled("llama", tmp_path, layer=1, budget={"keep": 0.2})
    kept = int(np.ceil(0.2 * (2 * PROMPT - 1)))
    assert_reads_shorter(
        engine,
        "llama",
        (0, 7),
        (2 * PROMPT, *[1] * STEPS),
        lambda row, prompt: gems(model_of("llama"), prompt, 1, kept),
    )


def test_the_last_token_alone_asks(tmp_path: Path) -> None:
    """Another last token keeps other tokens of the same text."""
    found = set()
    ids, mask = texts((0,), PROMPT)
    engine = compiled("llama", tmp_path, **GIVEN)
    for token in (5, 6, 7):
        ids[0, -1] = token
        stay = gems(model_of("llama"), ids[0], 2, 9)
        logits, _ = engine.run(ids, mask, (PROMPT,))
        alone, _ = read_alone(model_of("llama"), ids[0][stay])
        np.testing.assert_allclose(logits[0][stay], alone.numpy(), rtol=0, atol=2e-4 * float(alone.abs().max()))
        found.add(tuple(stay))
    assert len(found) > 1


def test_only_the_first_call_reads_ahead(tmp_path: Path) -> None:
    """In later calls no product of the first reading is computed: by the program, and by the engine."""
    program, plain = compiled("llama", tmp_path, **GIVEN).program, program_of("llama")

    def products(past: int, new: int) -> int:
        total, shapes = past + new, {}
        for node in program.user_inputs:
            name, fake = program.public_name(node), node.meta["val"]
            size = total if name == "attention_mask" else new
            shapes[name] = (1, size) if fake.ndim == 2 else (1, fake.shape[1], past, fake.shape[3])
        taken = computed(program, program.bindings(shapes))
        return sum(node.target is torch.ops.aten.linear.default for node in taken)

    layer = 7  # q, k, v and what is attended to; three of the MLP
    assert products(40, 1) == products(40, 5) == LAYERS * layer + 1
    assert products(0, PROMPT) == (LAYERS + 2) * layer + 1 + 2
    graph = build_onnx(program).graph
    alone = build_onnx(plain).graph
    assert in_branches(graph) >= 2 * layer + 2
    assert _reads(graph) == _reads(alone)


def in_branches(graph: ir.Graph) -> int:
    """Products with a weight inside of branches."""
    names = set(graph.initializers)
    inner = [node for node in graph.all_nodes() if node.graph is not graph and node.op_type in ("MatMul", "Gemm")]
    return sum(any(value is not None and value.name in names for value in node.inputs) for node in inner)


def _reads(graph: ir.Graph) -> int:
    """The same outside of them."""
    names = set(graph.initializers)
    outer = [node for node in graph if node.op_type in ("MatMul", "Gemm")]
    return sum(any(value is not None and value.name in names for value in node.inputs) for node in outer)


def test_weights_are_in_the_file_once(tmp_path: Path) -> None:
    """The file grows by nodes: its weights are those of the model."""

    def stored(wanted: Mapping[str, Any] | str, name: str) -> int:
        folder = tmp_path / name
        folder.mkdir()
        values = build_onnx(build("llama", wanted, folder).program).graph.initializers.values()
        sizes = [0 if value.shape is None else int(np.prod(value.shape.numpy())) for value in values]
        return sum(size for size in sizes if size >= 32)

    assert stored(policy([{"preset": "gem-filter", **GIVEN}]), "gems") == stored("none", "none")


def planned(step: Mapping[str, Any], family: str = "llama") -> Any:
    program = program_of(family)
    return make_cache_plan(load_policy(policy([step]), presets=library()), program, cache_sites(program))


def test_no_such_layer(tmp_path: Path) -> None:
    with pytest.raises(AxisError, match=f"layer {LAYERS} does not exist"):
        compiled("llama", tmp_path, layer=LAYERS)
    with pytest.raises(AxisError, match="in front of the cut"):
        compiled("llama", tmp_path, layer=1, at={"layers": [2]})


def test_positions_that_are_not_turned() -> None:
    with pytest.raises(PlanError, match="cannot be counted anew"):
        planned({"preset": "gem-filter"}, "gpt2")


def test_reads_ahead_of_a_later_cut(tmp_path: Path) -> None:
    """In front of layer 1, for layer 3: the tokens go before layer 1, as its products over all of them say."""
    step = {"preset": "gem-filter", "layer": 3, "tokens": 9, "at": {"layers": [1]}, "positions": "keep"}
    engine = build("llama", policy([step]), tmp_path)
    ids, mask = texts(PADDING, PROMPT + STEPS)
    _, last = engine.run(ids, mask, (PROMPT, *[1] * STEPS))
    model = model_of("llama")
    for row, count in enumerate(PADDING):
        own, prompt = ids[row, count:], PROMPT - count
        _, whole = read_alone(model, own)
        # What goes in front of layer 1 has gone through layer 0, whose keys are all there.
        held = last["present.0.key"][row][:, count:]
        np.testing.assert_allclose(held, whole.layers[0].keys[0].numpy(), rtol=0, atol=1e-4)
        stay = [*gems(model, own[:prompt], 3, 9), *range(prompt, len(own))]
        held = last["present.1.key"][row]
        want = whole.layers[1].keys[0][:, stay].numpy()
        np.testing.assert_allclose(held, want, rtol=0, atol=2e-4 * np.abs(want).max())


@pytest.mark.slow
def test_a_bundle(tmp_path: Path) -> None:
    """The own loop generates what the model does behind the short prompt; the report counts no attention beside it."""
    given = {"preset": "gem-filter", "layer": 2, "tokens": 7, "last": 2}
    wanted = policy([given], outputs={"logits": "last_token"})
    bundle = compiled_folder(model_folder(tmp_path / "model"), tmp_path / "out", wanted)
    prompts = [[*range(3, 29)], [*range(30, 50)], [5, 6, 7]]
    made = Generator(bundle).generate(prompts, max_new_tokens=8, stop=())
    model = tiny_model("llama")
    for prompt, tokens in zip(prompts, made, strict=True):
        ids = [prompt[j] for j in gems(model, torch.tensor(prompt), 2, 7, last=2)]
        for token in tokens:
            logits, _ = read_alone(model, torch.tensor(ids))
            assert token == int(logits[-1].argmax())
            ids.append(token)
    plain = compiled_folder(tmp_path / "model", tmp_path / "plain", "none")
    rows = [[row.flops_after for row in each.report.layers] for each in (bundle, plain)]
    assert len(set(rows[0])) == 1
    assert 0 < rows[0][0] < rows[1][0]


def test_the_other_name() -> None:
    """An alias: equal steps and parameters are equal programs."""
    ours, theirs = library()["gemfilter"], library()["gem-filter"]
    assert (ours.params, ours.steps, ours.needs) == (theirs.params, theirs.steps, theirs.needs)
