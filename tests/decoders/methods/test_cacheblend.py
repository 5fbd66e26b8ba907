"""CacheBlend against its formulas: layer by layer in plain torch, each row alone, keys turned where they stand."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from tests.decoders import tiny
from tests.decoders.bundles import compiled, model_folder
from tests.prompt.engine import build
from tests.prompt.models import LAYERS, VOCABULARY, model_of, program_of
from tokcc.analysis.cache_sites import cache_sites
from tokcc.backends.bundle import Bundle
from tokcc.backends.generation import DecoderEngine, Generator, old_entries
from tokcc.config import load_policy
from tokcc.errors import PlanError, PolicyError, TokccError, UsageError
from tokcc.passes.cache.planning import make_cache_plan
from tokcc.passes.methods import library

STEPS = 16


def policy(share: float = 0.16, **more: Any) -> dict[str, Any]:
    step = {"preset": "cacheblend", "share": share, **more}
    return {"version": 1, "name": "cacheblend", "steps": [step], "outputs": {"*": "last_token"}}


# the oracle -----------------------------------------------------------------------------------------------------------


class Layers:
    """A decoder of transformers, taken apart: weights and norms are its own, everything between is written out."""

    def __init__(self, family: str) -> None:
        self.model: Any = model_of(family)
        self.base = self.model.model
        config = self.model.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.theta = config.rope_parameters["rope_theta"]

    def turn(self, x: Tensor, places: Tensor) -> Tensor:
        """Rotary embedding of ``[heads, N, D]`` at positions ``[N]``."""
        half = x.shape[-1] // 2
        angle = places[:, None] / self.theta ** (torch.arange(half) / half)
        cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def projected(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[heads, N, D]`` of a stream ``[N, C]``, not turned."""
        own = self.base.layers[layer]
        h = own.input_layernorm(x)

        def split(linear: Any, heads: int) -> Tensor:
            return linear(h).reshape(len(h), heads, -1).transpose(0, 1)

        attention = own.self_attn
        return (
            split(attention.q_proj, self.heads),
            split(attention.k_proj, self.kv_heads),
            split(attention.v_proj, self.kv_heads),
        )

    def through(self, layer: int, x: Tensor, query: Tensor, key: Tensor, value: Tensor, places: Tensor) -> Tensor:
        """What leaves a layer, of rows at positions ``[N]`` over keys 0, 1, ..., L - 1."""
        own, group = self.base.layers[layer], self.heads // self.kv_heads
        logits = query @ key.repeat_interleave(group, 0).transpose(1, 2) / query.shape[-1] ** 0.5
        seen = torch.arange(key.shape[1]) <= places[:, None]
        probs = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        made = (probs @ value.repeat_interleave(group, 0)).transpose(0, 1).flatten(1)
        x = x + own.self_attn.o_proj(made)
        return x + own.mlp(own.post_attention_layernorm(x))

    def logits(self, x: Tensor) -> Tensor:
        return self.model.lm_head(self.base.norm(x))


@dataclass
class Blended:
    """What one row gave.

    Attributes:
        logits: ``[1 + steps, V]``: of the prompt's last token and the ones behind it.
        keys: By layer ``[Hkv, L, D]``, of the prompt.
        values: Likewise.
        old: By layer: old keys, turned where they stand now, and old values.
        rows: Tokens that went on behind layer 1.
    """

    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    old: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)


@torch.no_grad()
def blended(
    family: str, texts: Sequence[Tensor], question: Tensor, share: float, following: Tensor, check: int = 1
) -> Blended:
    """Run one row."""
    parts, made = Layers(family), Blended()
    known = sum(map(len, texts))
    ids = torch.cat([*texts, question])
    total = len(ids)
    every = torch.arange(total)
    old: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(LAYERS)]
    for text in texts:  # alone, from position 0 on
        x, own = parts.base.embed_tokens(text), torch.arange(len(text))
        for layer in range(LAYERS):
            query, key, value = parts.projected(layer, x)
            old[layer].append((key, value))
            x = parts.through(layer, x, parts.turn(query, own), parts.turn(key, own), value, own)
    for pieces in old:
        keys, values = (torch.cat(list(x), 1) for x in zip(*pieces, strict=True))
        made.old.append((parts.turn(keys, every[:known]), values))
    x, rows = parts.base.embed_tokens(ids), every
    for layer in range(LAYERS):
        query, key, value = parts.projected(layer, x)
        query, key = parts.turn(query, rows), parts.turn(key, rows)
        if layer > check:
            whole = [torch.cat([a, torch.zeros(a.shape[0], total - known, a.shape[2])], 1) for a in made.old[layer]]
            whole[0][:, rows], whole[1][:, rows] = key, value
            key, value = whole
        made.keys.append(key)
        made.values.append(value)
        x = parts.through(layer, x, query, key, value, rows)
        if layer == check:
            change = (value[:, :known] - made.old[layer][1]).square().sum((0, 2))
            best = change.argsort(descending=True, stable=True)[: int(share * known)]
            rows = torch.cat([best.sort().values, every[known:]])
            made.rows = rows.tolist()
            x = x[rows]
    logits = [parts.logits(x[-1])]
    keys, values = list(made.keys), list(made.values)
    for step, token in enumerate(following):
        x, place = parts.base.embed_tokens(token[None]), torch.tensor([total + step])
        for layer in range(LAYERS):
            query, key, value = parts.projected(layer, x)
            keys[layer] = torch.cat([keys[layer], parts.turn(key, place)], 1)
            values[layer] = torch.cat([values[layer], value], 1)
            x = parts.through(layer, x, parts.turn(query, place), keys[layer], values[layer], place)
        logits.append(parts.logits(x[-1]))
    made.logits = torch.stack(logits)
    return made


# the engine -----------------------------------------------------------------------------------------------------------


class Reader:
    """An engine that is fed by hand."""

    def __init__(self, wanted: dict[str, Any], folder: Path, family: str = "llama") -> None:
        self.built = build(family, wanted, folder)
        self.session = self.built.session
        self.inputs = {item.name: item for item in self.session.get_inputs()}

    def empty(self, batch: int) -> dict[str, Any]:
        past = [item for name, item in self.inputs.items() if name.startswith("past")]
        return {item.name: np.zeros((batch, item.shape[1], 0, item.shape[3]), np.float32) for item in past}

    def call(self, ids: Tensor, mask: Tensor, past: Any, given: Any = None) -> tuple[Any, dict[str, Any]]:
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        feeds = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "position_ids": places.numpy(), **past}
        for spec in self.built.plan.inputs:
            shape = [{"B": len(ids), "R": 0}.get(size, size) for size in spec.shape]
            feeds[spec.name] = np.zeros(shape, np.int64 if spec.dtype == torch.int64 else np.float32)
        feeds |= given or {}
        names = [item.name for item in self.session.get_outputs()]
        out = dict(zip(names, self.session.run(None, feeds), strict=True))
        return out["logits"], {name: out[name.replace("past_key_values", "present")] for name in past}

    def old(self, texts: Sequence[Sequence[Tensor]]) -> dict[str, Any]:
        """What stands for rows of texts that the engine reads alone; shorter rows are filled up in front."""
        longest = max(sum(map(len, row)) for row in texts)
        made: dict[str, list[Any]] = {spec.name: [] for spec in self.built.plan.inputs}
        for row in texts:
            pasts = [self.call(t[None], torch.ones(1, len(t)).long(), self.empty(1))[1] for t in row]
            for name, rows in made.items():
                if name == "old_position_ids":
                    own = np.concatenate([np.arange(len(t)) for t in row])[None]
                    rows.append(np.pad(own, ((0, 0), (longest - own.shape[1], 0)), constant_values=7))
                else:
                    own = np.concatenate([past[name.replace("old", "past")] for past in pasts], 2)
                    # Whatever stands beside padding is never read.
                    rows.append(np.pad(own, ((0, 0), (0, 0), (longest - own.shape[2], 0), (0, 0)), constant_values=9))
        return {name: np.concatenate(rows) for name, rows in made.items()}


def close(got: Any, wanted: Tensor) -> None:
    np.testing.assert_allclose(got, wanted.numpy(), rtol=0, atol=2e-4 * float(wanted.abs().max()))


def prompts(
    lengths: Sequence[Sequence[int]], question: int, seed: int = 0
) -> tuple[list[list[Tensor]], Tensor, Tensor]:
    """Texts, questions and continuations of rows."""
    generator = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> Tensor:
        return torch.randint(3, VOCABULARY - 8, shape, generator=generator)

    return [[some(n) for n in row] for row in lengths], some(len(lengths), question), some(len(lengths), STEPS)


def padded(texts: Sequence[Sequence[Tensor]], question: Tensor) -> tuple[Tensor, Tensor]:
    rows = [torch.cat([*row, own]) for row, own in zip(texts, question, strict=True)]
    longest = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :], mask[i, longest - len(row) :] = row, 1
    return ids, mask


def compare(reader: Reader, family: str, lengths: Sequence[Sequence[int]], share: float, check: int = 1) -> None:
    """Blend a batch and go on for some steps; every row is what it is alone."""
    texts, question, following = prompts(lengths, 4)
    ids, mask = padded(texts, question)
    wanted = [
        blended(family, row, own, share, more, check) for row, own, more in zip(texts, question, following, strict=True)
    ]
    logits, past = reader.call(ids, mask, reader.empty(len(ids)), reader.old(texts))
    assert logits.shape[1] == 1
    for row, alone in enumerate(wanted):
        close(logits[row, 0], alone.logits[0])
        start = ids.shape[1] - alone.keys[0].shape[1]
        assert start == int((mask[row] == 0).sum())
        for layer in range(LAYERS):
            close(past[f"past_key_values.{layer}.key"][row][:, start:], alone.keys[layer])
            close(past[f"past_key_values.{layer}.value"][row][:, start:], alone.values[layer])
    for step in range(STEPS):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        logits, past = reader.call(following[:, step : step + 1], mask, past)
        for row, alone in enumerate(wanted):
            close(logits[row, 0], alone.logits[1 + step])
    assert past["past_key_values.0.key"].shape[2] == past[f"past_key_values.{LAYERS - 1}.key"].shape[2] == mask.shape[1]


EVEN, UNEVEN = ((9, 11), (12, 8), (5, 15)), ((9, 11), (6, 7), (10, 3, 4))


@pytest.mark.parametrize(
    ("family", "share", "lengths"),
    [
        ("llama", 0.3, UNEVEN),
        pytest.param("qwen2", 0.16, EVEN, marks=pytest.mark.slow),
        pytest.param("llama-mha", 0.5, UNEVEN, marks=pytest.mark.slow),
    ],
)
def test_equals_the_formulas(family: str, share: float, lengths: Any, tmp_path: Path) -> None:
    compare(Reader(policy(share), tmp_path, family), family, lengths, share)


@pytest.mark.slow
def test_another_layer_compares(tmp_path: Path) -> None:
    compare(Reader(policy(0.3, layer=2), tmp_path), "llama", UNEVEN, 0.3, check=2)


def whole_text(texts: Sequence[Sequence[Tensor]], question: Tensor, row: int) -> Tensor:
    """Logits of transformers' own model for a whole prompt."""
    ids = torch.cat([*texts[row], question[row]])
    with torch.no_grad():
        return model_of("llama")(input_ids=ids[None]).logits[0]


def test_everything_anew_is_an_ordinary_prompt(tmp_path: Path) -> None:
    """r = 1, and no old entries at all: what the model itself gives; the graph is that of every other share."""
    reader = Reader(policy(1.0), tmp_path)
    compare(reader, "llama", UNEVEN, 1.0)
    texts, question, _ = prompts(UNEVEN, 4)
    ids, mask = padded(texts, question)
    anew, kept = reader.call(ids, mask, reader.empty(3), reader.old(texts))
    plain, past = reader.call(ids, mask, reader.empty(3))
    for row in range(3):
        wanted = whole_text(texts, question, row)[-1]
        close(anew[row, 0], wanted)
        close(plain[row, 0], wanted)
        real = mask[row].bool().numpy()
        for name, x in past.items():
            np.testing.assert_allclose(kept[name][row][:, real], x[row][:, real], rtol=0, atol=1e-5)


def test_behind_an_ordinary_past(tmp_path: Path) -> None:
    """A system prompt is in the cache already; texts with old entries follow it, and see it where they run anew."""
    reader = Reader(policy(1.0), tmp_path)
    texts, question, _ = prompts(((6, 9, 11),), 4)
    ids, mask = padded(texts, question)
    _, past = reader.call(ids[:, :6], mask[:, :6], reader.empty(1))
    logits, past = reader.call(ids[:, 6:], mask, past, reader.old([texts[0][1:]]))
    close(logits[0, 0], whole_text(texts, question, 0)[-1])
    assert past["past_key_values.4.key"].shape[2] == 30


def test_nothing_anew_but_the_question(tmp_path: Path) -> None:
    """r = 0: behind layer 1 the question alone runs, and old entries stay as they are."""
    reader = Reader(policy(0.0), tmp_path)
    compare(reader, "llama", UNEVEN, 0.0)
    texts, question, _ = prompts(((9, 11),), 4)
    ids, mask = padded(texts, question)
    old = reader.old(texts)
    logits, past = reader.call(ids, mask, reader.empty(1), old)
    alone = blended("llama", texts[0], question[0], 0.0, torch.zeros(0, dtype=torch.int64))
    assert alone.rows == [20, 21, 22, 23]
    for layer in range(2, LAYERS):
        np.testing.assert_array_equal(
            past[f"past_key_values.{layer}.value"][:, :, :20], old[f"old_key_values.{layer}.value"]
        )
        # The first text stands where it stood; the second is turned on.
        key, before = past[f"past_key_values.{layer}.key"], old[f"old_key_values.{layer}.key"]
        np.testing.assert_allclose(key[:, :, :9], before[:, :, :9], rtol=0, atol=1e-6)
        close(key[0, :, :20], alone.old[layer][0])
        assert np.abs(key[:, :, 9:20] - before[:, :, 9:]).max() > 0.1
    # It is an approximation: the tokens of the second text never saw the first.
    assert float((whole_text(texts, question, 0)[-1] - torch.from_numpy(logits[0, 0])).abs().max()) > 0.1


def test_old_keys_that_stand_where_they_stood(tmp_path: Path) -> None:
    """A caller may turn keys itself, or read texts at other positions: the engine turns by the difference."""
    reader = Reader(policy(0.3), tmp_path)
    texts, question, _ = prompts(((9, 11),), 4)
    ids, mask = padded(texts, question)
    old = reader.old(texts)
    wanted, _ = reader.call(ids, mask, reader.empty(1), old)
    parts, moved = Layers("llama"), dict(old)
    for name, x in old.items():
        if name.endswith("key"):
            by = torch.arange(20) + 50 - torch.from_numpy(old["old_position_ids"][0])
            moved[name] = parts.turn(torch.from_numpy(x[0]), by)[None].numpy().astype(np.float32)
    moved["old_position_ids"] = np.arange(50, 70)[None]
    got, _ = reader.call(ids, mask, reader.empty(1), moved)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize("rows", [24, 25])
def test_old_entries_of_all_tokens_stop(rows: int, tmp_path: Path) -> None:
    """Something must be asked: the last token needs a row."""
    reader = Reader(policy(), tmp_path)
    texts, question, _ = prompts(((rows,),), 4)
    ids, mask = padded(texts, question)
    errors = onnxruntime.capi.onnxruntime_pybind11_state
    with pytest.raises((errors.InvalidArgument, errors.Fail), match="Non-zero status code"):
        reader.call(ids[:, :24], mask[:, :24], reader.empty(1), reader.old(texts))


def test_the_published_numbers() -> None:
    params = library()["cacheblend"].params
    assert (params["share"].default, params["layer"].default) == (0.16, 1)


# bundles --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("cacheblend")
    return compiled(model_folder(folder / "model"), folder / "out", policy(1.0))


def test_with_the_loops_engine(bundle: Bundle) -> None:
    engine, random = DecoderEngine(bundle), np.random.default_rng(0)
    one, two, question = (random.integers(3, 90, (1, n)) for n in (7, 5, 4))

    def read(ids: Any, given: Any = None) -> tuple[Any, Any]:
        ones = np.ones_like(ids)
        return engine.call(ids, ones, np.arange(ids.shape[1])[None], engine.empty_past(1), given)

    old = old_entries(engine, [read(one)[1], read(two)[1]])
    assert old["old_position_ids"].tolist() == [[*range(7), *range(5)]]
    text = np.concatenate([one, two, question], 1)
    logits, past = read(text, old)
    with torch.no_grad():
        wanted = tiny.model_of("llama")(input_ids=torch.from_numpy(text)).logits[0, -1]
    close(logits[0], wanted)  # all of it is computed anew
    assert {x.shape[2] for x in past.values()} == {16}
    made = Generator(bundle).generate([text[0].tolist()], max_new_tokens=3, stop=())[0]
    assert made[0] == int(wanted.argmax())
    with pytest.raises(UsageError, match="behind each other"):
        old_entries(engine, [], [])
    with pytest.raises(UsageError, match="behind each other"):
        old_entries(engine, [past], [0, 3])


def test_the_example_of_the_documentation(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").symlink_to(bundle.path)
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[3] / "docs" / "decoders.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "old_entries(" in block)
    random = np.random.default_rng(1)
    one, two, question = (random.integers(3, 90, (1, n)) for n in (20, 30, 6))
    scope: dict[str, Any] = {"np": np, "texts": [one, two], "question": question}
    exec(code, scope)
    whole = torch.from_numpy(np.concatenate([one, two, question], 1))
    with torch.no_grad():
        close(scope["logits"][0], tiny.model_of("llama")(input_ids=whole).logits[0, -1])


def test_engines_without_old_entries(tmp_path: Path) -> None:
    plain = DecoderEngine(compiled(model_folder(tmp_path / "model"), tmp_path / "out", "none"))
    with pytest.raises(UsageError, match="takes no old entries"):
        old_entries(plain, [plain.empty_past(1)])


@pytest.mark.slow  # it measures for some seconds
def test_the_first_call_is_timed(tmp_path: Path) -> None:
    report = compiled(model_folder(tmp_path / "model"), tmp_path / "out", policy(), calibrate=True).report
    assert any("old entries are given for 480 of them" in note for note in report.notes)
    assert report.latency is not None
    assert report.totals.flops_after < report.totals.flops_before


# refusals -------------------------------------------------------------------------------------------------------------


def planned(wanted: dict[str, Any], family: str = "llama", programs: Any = program_of) -> Any:
    program = programs(family)
    return make_cache_plan(load_policy(wanted, presets=library()), program, cache_sites(program))


class TestRefusals:
    @pytest.mark.parametrize("outputs", [{"*": "full"}, {"logits": "full"}])
    def test_other_outputs(self, outputs: dict[str, str]) -> None:
        with pytest.raises(PlanError, match="`logits` cannot be `full`"):
            planned({**policy(), "outputs": outputs})

    def test_its_own_outputs(self) -> None:
        wanted = policy()
        del wanted["outputs"]
        assert planned(wanted).last_token_outputs

    @pytest.mark.parametrize("layer", [LAYERS - 1, LAYERS])
    def test_models_that_are_too_shallow(self, layer: int) -> None:
        with pytest.raises(PlanError, match=r"no layer is behind|has 5 layers|layers between"):
            planned(policy(layer=layer))

    def test_models_without_rotation(self) -> None:
        with pytest.raises(PlanError, match="cannot be moved"):
            planned(policy(), "gpt2")

    def test_rotations_that_scale(self, monkeypatch: pytest.MonkeyPatch) -> None:
        yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 128}
        name, settings = tiny.FAMILIES["llama"]
        monkeypatch.setitem(tiny.FAMILIES, "yarn", (name, {**settings, "rope_parameters": yarn}))
        with pytest.raises(PlanError, match="scaled twice"):
            planned(policy(), "yarn", tiny.program_of)

    def test_sliding_windows(self) -> None:
        with pytest.raises(PlanError, match="sliding window"):
            planned(policy(), "mistral", tiny.program_of)

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            ({"budget": {"keep": 0.5}}, "caches keep every token"),
            ({"protect": {"last": 3}}, "nothing can be protected"),
            ({"positions": "compact"}, "counted anew where old entries"),
            ({"at": {"layers": [1, 2]}}, "another step changes"),
        ],
    )
    def test_steps(self, more: dict[str, Any], message: str) -> None:
        with pytest.raises((PlanError, PolicyError), match=message):
            planned(policy(**more))

    def test_other_steps(self) -> None:
        wanted = policy()
        wanted["steps"].append({"preset": "h2o", "tokens": 12})
        with pytest.raises(PolicyError, match="another step changes"):
            planned(wanted)

    def test_pieces_that_do_not_fit(self) -> None:
        wanted = policy(reduce={"kind": "drop"}, budget={"keep": 0.5})
        del wanted["steps"][0]["share"]
        with pytest.raises(TokccError, match="reads old entries, and nothing takes them"):
            planned(wanted)
