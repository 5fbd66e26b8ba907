"""KVLink: documents that were read alone, behind each other, against one text with a mask."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.decoders.bundles import compiled, model_folder
from tests.decoders.engine import build, tokens
from tests.decoders.tiny import model_of, program_of
from tokcc.analysis.cache_sites import cache_sites
from tokcc.backends.bundle import Bundle
from tokcc.backends.generation import DecoderEngine, Generator, Past, joined
from tokcc.config import load_policy
from tokcc.errors import PlanError, UsageError
from tokcc.passes.cache.planning import make_cache_plan
from tokcc.passes.methods import library
from tokcc.pipeline import decoder_speed

POLICY = {"version": 1, "name": "kvlink", "steps": [{"preset": "kvlink"}]}
# System prompt, document, link, document, link, question: tokens and segments, without padding.
PARTS = ((3, 0), (7, 1), (2, 0), (5, 2), (2, 0), (4, 0))
LENGTH, STEPS = sum(length for length, _ in PARTS), 64


def segments_of(parts: Sequence[tuple[int, int]], steps: int) -> Tensor:
    """Segment of each token, generated ones included."""
    return torch.tensor([*[s for length, s in parts for _ in range(length)], *[0] * steps])


def by_mask(family: str, ids: Tensor, segments: Tensor) -> Tensor:
    """Logits ``[T, V]`` of transformers' own model for one text, with a mask of four axes."""
    place = torch.arange(len(ids))
    seen = (place <= place[:, None]) & ((segments == segments[:, None]) | (segments[:, None] == 0))
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.no_grad():
        out = model_of(family)(input_ids=ids[None], attention_mask=mask[None, None], position_ids=place[None])
    return out.logits[0]


class Reader:
    """An engine that is fed by hand, from any cache, at any positions."""

    def __init__(self, family: str, folder: Path) -> None:
        self.session = build(family, POLICY, folder).session

    def empty(self, batch: int) -> Past:
        made = {}
        for item in self.session.get_inputs():
            if "past" in item.name:
                dtype = np.int64 if "int64" in item.type else np.float32
                made[item.name] = np.zeros((batch, item.shape[1], 0, item.shape[3]), dtype)
        return made

    def read(self, ids: Tensor, real: Tensor, places: Tensor, past: Past, segments: Tensor | None = None) -> Any:
        given = torch.zeros_like(ids) if segments is None else segments
        feeds = {"input_ids": ids, "attention_mask": real, "position_ids": places, "segment_ids": given}
        names = [item.name for item in self.session.get_outputs()]
        results = self.session.run(None, {name: x.numpy() for name, x in feeds.items()} | past)
        out = dict(zip(names, results, strict=True))
        return out["logits"], {name: out[name.replace("past_key_values", "present")] for name in past}


def close(got: np.ndarray[Any, Any], wanted: Tensor) -> None:
    np.testing.assert_allclose(got, wanted.numpy(), rtol=0, atol=2e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt-neox"])
def test_documents_are_linked(family: str, tmp_path: Path) -> None:
    """Three rows whose documents differ in length: shorter ones are padded in front, and padding lies in the middle."""
    reader = Reader(family, tmp_path)
    shorter = ((0, 0, 0), (3, 2, 1), (6, 4, 0))  # tokens that system prompt and documents of a row lack
    ids, _ = tokens(3, LENGTH + STEPS, ())
    rows, places, segments = [], [], []
    for row, (one, two, system) in enumerate(shorter):
        lengths = [length for length, _ in PARTS]
        lengths[0] -= system
        lengths[1] -= one
        lengths[3] -= two
        mine = tuple((length, segment) for length, (_, segment) in zip(lengths, PARTS, strict=True))
        count = sum(lengths) + STEPS
        rows.append(ids[row, :count])
        segments.append(segments_of(mine, STEPS))
        places.append(np.cumsum([0, *lengths]))
    wanted = [by_mask(family, row, own) for row, own in zip(rows, segments, strict=True)]

    def part(number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens of a part of all rows, which are real, and their positions within the part."""
        width = max(int(p[number + 1] - p[number]) for p in places)
        made, real = torch.zeros(3, width, dtype=torch.int64), torch.zeros(3, width, dtype=torch.int64)
        for row, p in enumerate(places):
            own = rows[row][int(p[number]) : int(p[number + 1])]
            made[row, width - len(own) :], real[row, width - len(own) :] = own, 1
        return made, real, (real.cumsum(1) - 1).clamp(min=0)

    # Read alone, in any order, each from position 0 and of segment 0.
    alone = {}
    for number in (3, 0, 1):
        text, real, place = part(number)
        alone[number] = reader.read(text, real, place, reader.empty(3))[1]
    past = []
    for row in range(3):  # rows begin their documents at positions of their own
        mine = [{name: x[row : row + 1] for name, x in alone[number].items()} for number in (0, 1, 3)]
        past.append(joined(mine, [int(places[row][number]) for number in (0, 1, 3)], [0, 1, 2]))
    held = {name: np.concatenate([p[name] for p in past]) for name in past[0]}
    # Links and question in one call, then single tokens.
    fed = [[int(i) for n in (2, 4, 5) for i in range(p[n], p[n + 1])] for p in places]
    text = torch.stack([rows[row][own] for row, own in enumerate(fed)])
    logits, held = reader.read(text, torch.ones_like(text), torch.tensor(fed), held)
    for row, own in enumerate(fed):
        close(logits[row], wanted[row][own])
    for step in range(STEPS):
        at = [int(p[-1]) + step for p in places]
        text = torch.stack([rows[row][i] for row, i in enumerate(at)])[:, None]
        logits, held = reader.read(text, torch.ones_like(text), torch.tensor(at)[:, None], held)
        for row, i in enumerate(at):
            close(logits[row, 0], wanted[row][i])
    # The mask matters: without it the same text says something else.
    plain = by_mask(family, rows[0], torch.zeros_like(segments[0]))
    assert float((plain[-1] - wanted[0][-1]).abs().max()) > 1e-2 * float(plain.abs().max())


def test_one_call_with_segments_is_the_same(tmp_path: Path) -> None:
    reader = Reader("llama", tmp_path)
    ids, real = tokens(3, LENGTH, (0, 2, 3))
    own = segments_of(PARTS, 0)[None].expand(3, -1).clone()
    place = (real.cumsum(1) - 1).clamp(min=0)
    logits, held = reader.read(ids, real, place, reader.empty(3), own)
    for row, count in enumerate((0, 2, 3)):
        close(logits[row, count:], by_mask("llama", ids[row, count:], own[row, count:]))
        assert held["past_key_values.1.key_segment"][row, 0, :, 0].tolist() == [-1] * count + own[row, count:].tolist()


def test_without_segments_it_is_the_model(tmp_path: Path) -> None:
    """Logits alone: keys are held as they are before they are turned."""
    from tests.decoders.oracle import run_alone

    calls = (9, 1, 1, 5, *[1] * 64)
    engine = build("llama", POLICY, tmp_path)
    ids, mask = tokens(3, sum(calls), (0, 3, 5))
    logits, last = engine.run(ids, mask, calls)
    for row, count in enumerate((0, 3, 5)):
        alone = run_alone(model_of("llama"), ids[row, count:], [9 - count, *calls[1:]], None)
        close(logits[row, count:], alone.logits)
        values = last["present.1.value"][row][:, count:]
        np.testing.assert_allclose(values, alone.values[1].numpy(), rtol=0, atol=1e-4)


def test_one_document_without_links_is_an_ordinary_prompt(tmp_path: Path) -> None:
    reader = Reader("llama", tmp_path)
    ids, _ = tokens(1, 20, ())
    one = torch.ones(1, 14, dtype=torch.int64)
    _, past = reader.read(ids[:, :14], one, torch.arange(14)[None] + 30, reader.empty(1))  # from any position on
    past = joined([past], [-30], [1])
    logits, _ = reader.read(ids[:, 14:], one[:, :6], torch.arange(14, 20)[None], past)
    close(logits[0], by_mask("llama", ids[0], torch.zeros(20))[14:])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("kvlink")
    return compiled(model_folder(folder / "model"), folder / "out", POLICY)


def test_with_the_loops_engine(bundle: Bundle) -> None:
    engine, random = DecoderEngine(bundle), np.random.default_rng(0)
    documents, question = [random.integers(3, 90, (1, n)) for n in (7, 5)], random.integers(3, 90, (1, 4))

    def read(ids: Any, start: int, past: Past) -> tuple[Any, Past]:
        places = np.arange(start, start + ids.shape[1])[None]
        return engine.call(ids, np.ones((1, start + ids.shape[1]), np.int64), places, past)

    pasts = [read(ids, 0, engine.empty_past(1))[1] for ids in documents]
    logits, _ = read(question, 12, joined(pasts, starts=[0, 7], segments=[1, 2]))
    text = torch.from_numpy(np.concatenate([*documents, question], 1))[0]
    close(logits[0], by_mask("llama", text, segments_of(((7, 1), (5, 2), (4, 0)), 0))[-1])
    made = Generator(bundle).generate([text.tolist()], max_new_tokens=3, stop=())[0]
    given = {"segment_ids": [[0] * 16]}
    assert Generator(bundle).generate([text.tolist()], max_new_tokens=3, stop=(), given=given)[0] == made
    assert int(by_mask("llama", text, torch.zeros(16))[-1].argmax()) == made[0]


def test_the_example_of_the_documentation(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").symlink_to(bundle.path)
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[3] / "docs" / "decoders.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "joined(" in block)
    random = np.random.default_rng(1)
    one, two, links, question = (random.integers(3, 90, (1, n)) for n in (100, 50, 4, 6))
    scope: dict[str, Any] = {"np": np, "documents": [one, two], "links": links, "question": question}
    exec(code, scope)
    whole = np.concatenate([one, links[:, :2], two, links[:, 2:], question], 1)[0]
    parts = ((100, 1), (2, 0), (50, 2), (2, 0), (6, 0))
    close(scope["logits"][0], by_mask("llama", torch.from_numpy(whole), segments_of(parts, 0))[-1])


@pytest.mark.slow
def test_it_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_speed, "CONTEXTS", (16, 40))
    made = compiled(model_folder(tmp_path / "model"), tmp_path / "out", POLICY, calibrate=True)
    # Keys and values of two heads of 16, a position and a segment.
    assert made.report.layers[0].kv_bytes_after == 40 * (2 * 2 * 16 * 4 + 16)


class TestRefusals:
    @pytest.mark.parametrize(("family", "message"), [("gpt2", "counted anew"), ("gemma3", "in every layer or in none")])
    def test_models(self, family: str, message: str) -> None:
        program = program_of(family)
        with pytest.raises(PlanError, match=message):
            make_cache_plan(load_policy(POLICY, presets=library()), program, cache_sites(program))

    @pytest.mark.parametrize(
        ("steps", "message"),
        [
            ([{"preset": "kvlink", "at": {"layers": [0]}}], "in every layer or in none"),
            ([{"preset": "kvlink"}, {"preset": "h2o", "tokens": 12}], "nothing can be evicted"),
        ],
    )
    def test_policies(self, steps: list[dict[str, Any]], message: str) -> None:
        program = program_of("llama")
        given = load_policy({"version": 1, "name": "p", "steps": steps}, presets=library())
        with pytest.raises(PlanError, match=message):
            make_cache_plan(given, program, cache_sites(program))

    def test_caches_of_other_engines(self) -> None:
        past = {"past_key_values.0.key": np.zeros((1, 2, 3, 4), np.float32)}
        with pytest.raises(UsageError, match="do not say"):
            joined([past], [0], [1])
        with pytest.raises(UsageError, match="a position and a segment"):
            joined([past], [0, 1], [1])
