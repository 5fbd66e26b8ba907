"""Tokens that share a row of the stream and attend as themselves (DyMU, section 3.2), against the formula."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from tests.decoders import tiny
from tests.decoders.bundles import compiled, model_folder
from tests.decoders.engine import Engine
from tests.decoders.tiny import decoder_program, random_model
from tests.prompt.engine import build, policy
from tests.prompt.models import IMAGE, VOCABULARY, model_of, program_of
from tests.prompt.test_embeddings import captured
from tokcc.analysis.cache_sites import cache_sites
from tokcc.backends.bundle import Bundle
from tokcc.backends.calls import decoder_calls
from tokcc.backends.generation import DecoderEngine, Generator
from tokcc.backends.parity import Tolerance, check_parity, oracle
from tokcc.config import load_policy
from tokcc.errors import PlanError, PolicyError, UsageError
from tokcc.passes.cache.planning import make_cache_plan
from tokcc.passes.methods import library

POLICY = policy([{"preset": "dymu-llm"}])
NEW = 4


def turned(x: Tensor, places: Tensor, theta: float) -> Tensor:
    """Rotary positions by definition: pairs (i, i + D / 2) of ``[N, H, D]`` turn by place / theta ** (2 i / D)."""
    half = x.shape[-1] // 2
    angle = places[:, None].double() / theta ** (torch.arange(half).double() / half)
    cos, sin = angle.cos().float()[:, None], angle.sin().float()[:, None]
    one, two = x[..., :half], x[..., half:]
    return torch.cat([one * cos - two * sin, two * cos + one * sin], -1)


def unmerged_attention(attention: nn.Module, config: Any, given: Tensor, rows: Sequence[int]) -> Tensor:
    """Section 3.2, before the output projection: rows ``[U, C]``, the row of each of N tokens; returns ``[U, H D]``."""
    width, places = config.head_dim, torch.arange(len(rows))
    query, key, value = (
        (given @ p.weight.T).unflatten(-1, (-1, width)) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    theta = config.rope_parameters["rope_theta"]
    out: list[list[Tensor]] = [[] for _ in given]
    table = turned(key[list(rows)], places, theta)
    asked = turned(query[list(rows)], places, theta)
    share = query.shape[1] // key.shape[1]
    for i, row in enumerate(rows):
        heads = []
        for head in range(query.shape[1]):
            logits = torch.stack([asked[i, head] @ table[j, head // share] for j in range(i + 1)]) / width**0.5
            probs = logits.softmax(0)
            heads.append(sum(probs[j] * value[rows[j], head // share] for j in range(i + 1)))
        out[row].append(torch.cat(heads))
    return torch.stack([torch.stack(each).mean(0) for each in out])


def run(model: Any, embeds: Tensor, rows: Sequence[int]) -> Tensor:
    """A LLaMA over rows ``[U, C]`` whose attention sees N tokens; logits of the tokens ``[N, V]``."""

    def norm(module: nn.Module, x: Tensor) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + model.config.rms_norm_eps).rsqrt() * module.weight

    x = embeds
    with torch.no_grad():
        for layer in model.model.layers:
            own = unmerged_attention(layer.self_attn, model.config, norm(layer.input_layernorm, x), rows)
            x = x + own @ layer.self_attn.o_proj.weight.T
            given, mlp = norm(layer.post_attention_layernorm, x), layer.mlp
            gate = given @ mlp.gate_proj.weight.T
            x = x + (gate * gate.sigmoid() * (given @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
        return (norm(model.model.norm, x) @ model.lm_head.weight.T)[list(rows)]


def maps(sizes: Sequence[tuple[int, int, int, int]], seed: int) -> list[list[int]]:
    """For each prompt: text, tokens that share rows in any order, text; the number of their rows."""
    generator, made = torch.Generator().manual_seed(seed), []
    for front, image, groups, behind in sizes:
        drawn = torch.cat([torch.arange(groups), torch.randint(groups, (image - groups,), generator=generator)])
        own = (drawn[torch.randperm(image, generator=generator)] + front).tolist()
        made.append([*range(front), *own, *range(front + groups, front + groups + behind)])
    return made


def fed(engine: Engine, values: Sequence[Tensor], table: nn.Module, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Run left-padded prompts and single tokens; logits by call.

    Args:
        engine: The engine, of ids or of embeddings.
        values: Ids of each prompt's rows and of what follows.
        table: The embeddings.
        prompts: The row of each token.
    """
    rows, tokens = (max(f(own) for own in prompts) for f in (lambda own: max(own) + 1, len))
    ids = torch.zeros(len(prompts), rows + NEW, dtype=torch.int64)
    mask = torch.zeros(len(prompts), tokens + NEW, dtype=torch.int64)
    assign = torch.full((len(prompts), tokens), 3)  # what stands for padding does not matter
    for row, (own, known) in enumerate(zip(prompts, values, strict=True)):
        before = rows - max(own) - 1
        ids[row, before:] = known
        mask[row, tokens - len(own) :] = 1
        assign[row, tokens - len(own) :] = torch.tensor(own) + before
    places = (mask.cumsum(1) - 1).clamp(min=0)
    names = [item.name for item in engine.session.get_inputs()]
    past = {
        item.name: np.zeros((len(ids), item.shape[1], 0, item.shape[3]), np.float32)
        for item in engine.session.get_inputs()
        if "past" in item.name
    }
    found = []
    for call in range(NEW + 1):
        own_ids = ids[:, :rows] if call == 0 else ids[:, rows + call - 1 : rows + call]
        start, stop = (0, tokens) if call == 0 else (tokens + call - 1, tokens + call)
        with torch.no_grad():
            known = {"input_ids": own_ids.numpy(), "inputs_embeds": table(own_ids).numpy()}
        feeds = {
            **{name: known[name] for name in known if name in names},
            "attention_mask": mask[:, :stop].numpy(),
            "position_ids": places[:, start:stop].numpy(),
            "token_assign": assign.numpy() if call == 0 else np.full((len(ids), 1), -1),
            **past,
        }
        outputs = [item.name for item in engine.session.get_outputs()]
        results = dict(zip(outputs, engine.session.run(None, feeds), strict=True))
        past = {name: results[name.replace("past_key_values", "present")] for name in past}
        assert {value.shape[2] for value in past.values()} == {stop}
        found.append(torch.from_numpy(results["logits"]))
    return found


SIZES = {1: [(3, 12, 4, 3)], 3: [(3, 12, 4, 3), (2, 9, 5, 2), (6, 1, 1, 1)]}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return build("llama", POLICY, tmp_path_factory.mktemp("engine"))


def compared(engine: Engine, model: Any, sizes: Sequence[tuple[int, int, int, int]], seed: int) -> None:
    """Prompts of a padded batch give what the formula gives for each alone."""
    prompts, generator = maps(sizes, seed), torch.Generator().manual_seed(seed)
    values = [torch.randint(3, IMAGE, (max(own) + 1 + NEW,), generator=generator) for own in prompts]
    table = model.get_input_embeddings()
    calls = fed(engine, values, table, prompts)
    for row, (own, known) in enumerate(zip(prompts, values, strict=True)):
        rows = [*own, *range(max(own) + 1, max(own) + 1 + NEW)]
        with torch.no_grad():
            wanted = run(model, table(known), rows)
        got = torch.cat([calls[0][row, -len(own) :], *(call[row] for call in calls[1:])])
        scale = float(wanted.abs().max())
        np.testing.assert_allclose(got.numpy(), wanted.numpy(), rtol=0, atol=2e-4 * scale)


@pytest.mark.parametrize("batch", [1, 3])
def test_any_map_gives_what_the_formula_gives(engine: Engine, batch: int) -> None:
    """Grouped heads, a prompt and single tokens; every token's logits."""
    compared(engine, model_of("llama"), SIZES[batch], seed=batch)


@pytest.mark.slow  # quickly in tests/vlm/test_unmerged.py
def test_a_decoder_of_embeddings(tmp_path: Path) -> None:
    """As a vision-language model has it: the stream begins with an input."""
    engine = build("llama", POLICY, tmp_path, captured(model_of("llama", "sdpa"), grid=False))
    for batch, sizes in SIZES.items():
        compared(engine, model_of("llama"), sizes, seed=7 + batch)


def test_without_a_map_it_is_the_model(engine: Engine) -> None:
    """-1 in all places, as calibration feeds it, and each token's own row; a padded batch and single tokens."""
    model, generator = model_of("llama"), torch.Generator().manual_seed(5)
    ids, mask = torch.randint(3, IMAGE, (2, 9 + NEW), generator=generator), torch.ones(2, 9 + NEW, dtype=torch.int64)
    mask[1, :4] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=mask, position_ids=places).logits
    own = torch.arange(9).expand(2, -1).numpy()
    for given in ({}, {0: {"token_assign": own}}):
        logits, _ = engine.run(ids, mask, (9, *[1] * NEW), given)
        for row, count in enumerate((0, 4)):
            scale = float(wanted.abs().max())
            got = logits[row, count:]
            np.testing.assert_allclose(got, wanted[row, count:].numpy(), rtol=0, atol=2e-4 * scale)


def test_one_layer_of_equal_inputs_is_the_dense_layer_averaged(tmp_path: Path) -> None:
    """The seed's check: tokens that read equal inputs attend as in the plain layer, and their row has their mean."""
    config = model_of("llama").config.to_dict() | {"num_hidden_layers": 1}
    model: Any = random_model(type(model_of("llama").config)(**config), "eager")
    one = build("llama", POLICY, tmp_path, decoder_program(random_model(model.config, "sdpa")))
    (own,) = maps([(3, 12, 4, 3)], seed=2)
    known = torch.randint(3, IMAGE, (max(own) + 1 + NEW,), generator=torch.Generator().manual_seed(2))
    attended: list[Tensor] = []
    layer = model.model.layers[0]
    hook = layer.self_attn.register_forward_hook(lambda m, args, out: attended.append(out[0][0]))
    with torch.no_grad():
        rows = model.get_input_embeddings()(known[: max(own) + 1])
        model(inputs_embeds=rows[own][None])
        hook.remove()
        groups = [[i for i, row in enumerate(own) if row == wanted] for wanted in range(max(own) + 1)]
        x = rows + torch.stack([attended[0][group].mean(0) for group in groups])
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        wanted = model.lm_head(model.model.norm(x))[own]
    got = fed(one, [known], model.get_input_embeddings(), [own])[0][0]
    np.testing.assert_allclose(got.numpy(), wanted.numpy(), rtol=0, atol=2e-4 * float(wanted.abs().max()))


def test_the_last_token_may_read_an_earlier_row(tmp_path: Path) -> None:
    """A prompt that ends with an image: the row for generation is the last token's, not the last one."""
    engine = build("llama", policy([{"preset": "dymu-llm"}], outputs={"logits": "last_token"}), tmp_path)
    model, own = model_of("llama"), [0, 1, 2, 3, 4, 4, 3, 2]
    known = torch.randint(3, IMAGE, (5 + NEW,), generator=torch.Generator().manual_seed(1))
    calls = fed(engine, [known], model.get_input_embeddings(), [own])
    with torch.no_grad():
        wanted = run(model, model.get_input_embeddings()(known), [*own, *range(5, 5 + NEW)])
    assert calls[0].shape == (1, 1, VOCABULARY)
    got = torch.cat([call[0] for call in calls])
    scale = float(wanted.abs().max())
    np.testing.assert_allclose(got.numpy(), wanted[len(own) - 1 :].numpy(), rtol=0, atol=2e-4 * scale)


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama-mha", "gpt-neox"))]
)
def test_engines_equal_the_reduced_program(family: str, tmp_path: Path) -> None:
    """What every compilation checks: a padded prompt with a random map, and calls behind it."""
    made = build(family, POLICY, tmp_path)
    tokens = torch.full([2, 4], VOCABULARY - 1)
    example = {"input_ids": tokens, "attention_mask": tokens, "position_ids": tokens}
    reference = oracle(made.program)
    calls = decoder_calls(made.program, example, reference, added=made.plan.inputs, prompt=made.plan.prompt)
    first = calls[0][0]
    assert first["input_ids"].shape[1] < first["token_assign"].shape[1] == first["attention_mask"].shape[1]
    assert all(len(set(row[keep].tolist())) < int(keep.sum()) for row, keep in zip(
        first["token_assign"], first["attention_mask"].bool(), strict=True
    ))  # fmt: skip
    session = made.session

    def run_engine(feeds: Any) -> Any:
        return dict(zip([o.name for o in session.get_outputs()], session.run(None, dict(feeds)), strict=True))

    checks = check_parity(run_engine, made.program.output_names, *calls, Tolerance())
    assert all(check.passed for check in checks)


@pytest.mark.parametrize("wrong", [7, -1])
def test_rows_that_are_not_there_stop_the_engine(engine: Engine, wrong: int) -> None:
    """Row 7 of 7, and a token that stands farther from the end than any row."""
    ids = torch.randint(3, IMAGE, (1, 7))
    mask = torch.ones(1, 9, dtype=torch.int64)
    assign = torch.tensor([[wrong, 1, 2, 3, 4, 4, 4, 5, 6]])
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": mask.cumsum(1) - 1, "token_assign": assign}
    past = {
        item.name: torch.zeros(1, item.shape[1], 0, item.shape[3])
        for item in engine.session.get_inputs()
        if "past" in item.name
    }
    feeds |= past
    with pytest.raises(ort.capi.onnxruntime_pybind11_state.InvalidArgument, match="ind"):
        engine.session.run(None, {name: value.numpy() for name, value in feeds.items()})
    with pytest.raises(IndexError):
        oracle(engine.program)(feeds)
    feeds["token_assign"] = assign[:, 1:]
    with pytest.raises(ort.capi.onnxruntime_pybind11_state.Fail, match="broadcast"):
        engine.session.run(None, {name: value.numpy() for name, value in feeds.items()})


def refused(family: str, step: dict[str, Any], **more: Any) -> None:
    program = program_of(family)
    wanted = load_policy(policy([{"preset": "dymu-llm", **step}], **more), presets=library())
    make_cache_plan(wanted, program, cache_sites(program))


@pytest.mark.parametrize(
    ("family", "step", "more", "match"),
    [
        ("gpt2", {}, {}, "positions of their own"),
        ("llama", {"at": {"layers": [0]}}, {}, "every layer or in none"),
        ("llama", {}, {"kv": {"layout": "slots"}}, "slots"),
        ("llama", {"budget": {"keep": 0.5}}, {}, "takes no `budget`"),
        ("llama", {"positions": "compact"}, {}, "takes no `positions`"),
        ("llama", {"select": {"kind": "topk"}}, {}, "takes no `select`"),
    ],
)
def test_what_it_cannot_do(family: str, step: dict[str, Any], more: dict[str, Any], match: str) -> None:
    with pytest.raises((PlanError, PolicyError), match=match) as error:
        refused(family, step, **more)
    assert error.value.help


def test_no_step_is_beside_it() -> None:
    program = program_of("llama")
    wanted = policy([{"preset": "dymu-llm"}, {"preset": "h2o", "tokens": 8}])
    with pytest.raises(PolicyError, match="another step is beside it"):
        make_cache_plan(load_policy(wanted, presets=library()), program, cache_sites(program))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("shared")
    return compiled(model_folder(folder / "model"), folder / "out", POLICY)


def test_the_bundle(bundle: Bundle) -> None:
    """The contract, the policy that is replayed, and the own loop: text alone needs no map."""
    shapes = {item.name: item.shape for item in bundle.manifest.inputs}
    given = next(item for item in bundle.manifest.inputs if item.name == "token_assign")
    assert given.unguided == -1
    assert given.shape == shapes["position_ids"] != shapes["input_ids"]
    assert "node: unmerge" in (bundle.path / "policy.lock.yaml").read_text()
    assert load_policy(bundle.path / "policy.lock.yaml", presets=library()).policy.steps[0].name == "dymu-llm"
    prompts, model = [[5, 6, 7, 8, 9], [11, 12]], tiny.model_of("llama")
    for prompt, got in zip(prompts, Generator(bundle).generate(prompts, max_new_tokens=6, stop=()), strict=True):
        with torch.no_grad():
            made = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert got == made[0, len(prompt) :].tolist()


def test_the_own_loop_takes_maps_of_the_prompt_s_length_only(bundle: Bundle) -> None:
    decoder = DecoderEngine(bundle)
    ids, tokens = np.array([[3, 4, 5]]), np.arange(5)[None]
    mask, assign = np.ones((1, 5), np.int64), np.array([[0, 1, 1, 1, 2]])
    logits, past = decoder.call(ids, mask, tokens, decoder.empty_past(1), {"token_assign": assign})
    wanted = run(tiny.model_of("llama"), tiny.model_of("llama").get_input_embeddings()(torch.tensor(ids[0])), assign[0])
    np.testing.assert_allclose(logits[0], wanted[-1].detach().numpy(), rtol=0, atol=2e-4 * float(wanted.abs().max()))
    assert past["past_key_values.0.key"].shape[2] == 5
    for wrong in (assign[:, :1], assign[0]):  # one column would stand for all tokens
        with pytest.raises(UsageError, match="`token_assign` does not fit the call"):
            decoder.call(ids, mask, tokens, decoder.empty_past(1), {"token_assign": wrong})


@pytest.mark.slow  # it measures for some seconds
def test_the_first_call_is_timed(tmp_path: Path) -> None:
    report = compiled(model_folder(tmp_path / "model"), tmp_path / "out", POLICY, calibrate=True).report
    assert any("a prompt of 511 tokens, which share" in note for note in report.notes)
    assert report.latency is not None
    assert report.latency.shapes["token_assign"] == (1, 511)
    rows = report.latency.shapes["input_ids"][1]
    assert rows < 300
    # The means over tokens are products, which are small only where a model is wider than its prompts are long.
    means = 3 * 2 * rows * 511 * 64
    assert report.totals.flops_after - means < report.totals.flops_before
