"""SpecPC against its words: the target reads a shorter prompt, chosen by what a draft attends to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tokcc
from tests.decoders.bundles import compiled, model_folder
from tests.decoders.tiny import model_of as model_of_tiny
from tests.prompt.engine import PADDING, PROMPT, assert_reads_shorter, build, policy
from tests.prompt.models import model_of, texts
from tests.prompt.oracle import read_alone
from tests.prompt.test_embeddings import captured
from tokcc.backends.bundle import Bundle
from tokcc.backends.generation import Generator
from tokcc.ir.builder import EagerBuilder
from tokcc.passes.prompt.cut import PromptCut
from tokcc.passes.prompt.selectors.neighbours import Neighbours

WINDOW, STEPS = 4, 6
SETTINGS = [
    {"tokens": 9, "kernel": 5, "neighbours": 4},
    pytest.param({"tokens": 12, "kernel": 6, "neighbours": 5}, marks=pytest.mark.slow),
    pytest.param({"tokens": 9, "kernel": 32, "neighbours": 32}, marks=pytest.mark.slow),
    pytest.param({"tokens": 9, "kernel": 1, "neighbours": 1}, marks=pytest.mark.slow),
]


def pooled(scores: Sequence[float], kernel: int) -> list[float]:
    """The maximum over a window, zeros beyond the ends: (k - 1) // 2 to the left, the rest to the right."""
    left = (kernel - 1) // 2
    padded = [0.0] * left + list(scores) + [0.0] * (kernel - 1 - left)
    return [max(padded[j : j + kernel]) for j in range(len(scores))]


def chosen(scores: Sequence[float], capacity: int, window: int, neighbours: int) -> list[int]:
    """The tokens that stay: the window, then the best tokens with their neighbours, each where it comes up first."""
    length = len(scores)
    if length <= capacity:
        return list(range(length))
    best = sorted(range(length), key=lambda j: (-scores[j], j))[:capacity]
    left = (neighbours - 1) // 2
    offsets = sorted(range(-left, neighbours - left), key=lambda o: (abs(o), o))
    found = list(range(length - window, length))
    seen = set(found)
    for token in best:
        for offset in offsets:
            near = min(max(token + offset, 0), length - 1)
            if near not in seen:
                seen.add(near)
                found.append(near)
    return sorted(found[:capacity])


def kept(scores: Tensor, given: dict[str, int], window: int = WINDOW) -> list[int]:
    """What stays of one row."""
    smooth = pooled(scores.tolist(), given["kernel"])
    return chosen(smooth, given["tokens"] + window, window, given["neighbours"])


def importance(batch: Sequence[int], length: int = PROMPT, seed: int = 1) -> Tensor:
    """Numbers for every token, those of padding the largest; the ends of the second and third row matter most."""
    made = torch.rand(len(batch), length, generator=torch.Generator().manual_seed(seed))
    for row, count in enumerate(batch):
        made[row, :count] = 9.0
        if row == 1:
            made[row, count] = 5.0
        if row == 2:
            made[row, -1] = 5.0
    return made


def fed(numbers: Tensor, calls: int) -> dict[int, dict[str, Any]]:
    nothing = np.zeros((len(numbers), 1), np.float32)
    return {0: {"importance": numbers.numpy()}, **{call: {"importance": nothing} for call in range(1, calls)}}


@pytest.mark.parametrize("batch", [PADDING, (0,)])
@pytest.mark.parametrize("given", SETTINGS)
def test_equals_the_target_on_the_shorter_prompt(given: dict[str, int], batch: tuple[int, ...], tmp_path: Path) -> None:
    """Logits and all caches of the prompt, then those of every step behind it."""
    engine = build("llama", policy([{"preset": "specpc", "window": WINDOW, **given}]), tmp_path)
    assert [(spec.name, spec.shape) for spec in engine.plan.inputs] == [("importance", ("B", "S"))]
    calls = (PROMPT, *[1] * STEPS)
    numbers = importance(batch)

    def stays(row: int, prompt: Tensor) -> list[int]:
        stay = kept(numbers[row, batch[row] :], given)
        assert len(stay) == given["tokens"] + WINDOW < len(prompt)
        return stay

    assert_reads_shorter(engine, "llama", batch, calls, stays, fed(numbers, len(calls)))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "gpt-neox"])
def test_other_families(family: str, tmp_path: Path) -> None:
    given = {"tokens": 9, "kernel": 5, "neighbours": 4}
    engine = build(family, policy([{"preset": "specpc", "window": WINDOW, **given}]), tmp_path)
    ids, mask = texts((0,), PROMPT + 3)
    numbers = importance((0,))
    logits, _ = engine.run(ids, mask, (PROMPT, 1, 1, 1), fed(numbers, 4))
    stay = [*kept(numbers[0], given), *range(PROMPT, PROMPT + 3)]
    alone, _ = read_alone(model_of(family), ids[0, stay])
    np.testing.assert_allclose(logits[0][stay], alone.numpy(), rtol=0, atol=2e-4 * float(alone.abs().max()))


def test_without_neighbours_it_is_the_best_and_the_window(tmp_path: Path) -> None:
    """Said without the sequence: a plain choice of the best in front of the window."""
    step = {"preset": "specpc", "window": WINDOW, "tokens": 9, "kernel": 1, "neighbours": 1}
    engine = build("llama", policy([step]), tmp_path)
    ids, mask = texts(PADDING, PROMPT)
    numbers = importance(PADDING)
    logits, _ = engine.run(ids, mask, (PROMPT,), fed(numbers, 1))
    for row, count in enumerate(PADDING):
        best = numbers[row, count:-WINDOW].topk(9).indices
        stay = [*sorted(best.tolist()), *range(PROMPT - count - WINDOW, PROMPT - count)]
        alone, _ = read_alone(model_of("llama"), ids[row, count:][stay])
        np.testing.assert_allclose(
            logits[row, count:][stay], alone.numpy(), rtol=0, atol=2e-4 * float(alone.abs().max())
        )


@pytest.mark.parametrize("room", [PROMPT - 2 - WINDOW, pytest.param(200, marks=pytest.mark.slow)])
def test_shorter_prompts_are_read_whole(room: int, tmp_path: Path) -> None:
    """All rows fit, or all but the longest, of which two tokens go; so does a row that the window holds."""
    given = {"tokens": room, "kernel": 5, "neighbours": 4}
    engine = build("llama", policy([{"preset": "specpc", "window": WINDOW, **given}]), tmp_path)
    batch = (0, 3, PROMPT - 2)
    ids, mask = texts(batch, PROMPT + STEPS)
    numbers = importance(batch)
    logits, last = engine.run(ids, mask, (PROMPT, *[1] * STEPS), fed(numbers, 1 + STEPS))
    assert last["present.0.key"].shape[2] == min(PROMPT, room + WINDOW) + STEPS
    for row, count in enumerate(batch):
        prompt = PROMPT - count
        stay = [*kept(numbers[row, count:], given), *range(prompt, prompt + STEPS)]
        assert len(stay) == min(prompt, room + WINDOW) + STEPS
        alone, _ = read_alone(model_of("llama"), ids[row, count:][stay])
        got = logits[row, count:][stay]
        np.testing.assert_allclose(got, alone.numpy(), rtol=0, atol=2e-4 * float(alone.abs().max()))


def test_a_second_text_is_read_whole(tmp_path: Path) -> None:
    """Its positions go on from what stayed of the first, row by row, and numbers given with it mean nothing."""
    given = {"tokens": 20, "kernel": 5, "neighbours": 4}
    engine = build("llama", policy([{"preset": "specpc", "window": WINDOW, **given}]), tmp_path)
    batch = (0, 3, 12)  # the last row is shorter than what stays
    ids, mask = texts(batch, PROMPT + 7)
    numbers, more = importance(batch), importance((0, 0, 0), 5, seed=3)
    nothing = np.zeros((3, 1), np.float32)
    given_by_call = {0: numbers.numpy(), 1: nothing, 2: more.numpy(), 3: nothing}
    fed_values = {call: {"importance": values} for call, values in given_by_call.items()}
    logits, _ = engine.run(ids, mask, (PROMPT, 1, 5, 1), fed_values)
    for row, count in enumerate(batch):
        prompt = PROMPT - count
        stay = [*kept(numbers[row, count:], given), *range(prompt, prompt + 7)]
        alone, _ = read_alone(model_of("llama"), ids[row, count:][stay])
        np.testing.assert_allclose(
            logits[row, count:][stay], alone.numpy(), rtol=0, atol=2e-4 * float(alone.abs().max())
        )


@pytest.mark.slow
def test_decoders_that_take_embeddings(tmp_path: Path) -> None:
    """Their stream begins with an input."""
    given = {"tokens": 9, "kernel": 5, "neighbours": 4}
    program = captured(model_of("llama", "sdpa"), grid=False)
    engine = build("llama", policy([{"preset": "specpc", "window": WINDOW, **given}]), tmp_path, program)
    ids, mask = texts(PADDING, PROMPT)
    numbers = importance(PADDING)
    feeds: dict[str, Any] = {"importance": numbers.numpy(), "attention_mask": mask.numpy()}
    with torch.no_grad():
        feeds["inputs_embeds"] = model_of("llama").get_input_embeddings()(ids).numpy()
    feeds["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0).numpy()
    for item in engine.session.get_inputs():
        if "past" in item.name:
            feeds[item.name] = np.zeros((len(ids), item.shape[1], 0, item.shape[3]), np.float32)
    (logits,) = engine.session.run(["logits"], feeds)
    for row, count in enumerate(PADDING):
        stay = kept(numbers[row, count:], given)
        alone, _ = read_alone(model_of("llama"), ids[row, count:][stay])
        np.testing.assert_allclose(
            logits[row, count:][stay], alone.numpy(), rtol=0, atol=2e-4 * float(alone.abs().max())
        )


@pytest.mark.parametrize("width", [1, 2, 5, 32])
def test_the_numbers_of_neighbours_give_the_sequence(width: int) -> None:
    """Many rows with ties, of any length: the selector alone."""
    generator = torch.Generator().manual_seed(width)
    for case in range(150):
        length = int(torch.randint(2, 60, (), generator=generator))
        window = int(torch.randint(1, min(length, 7), (), generator=generator))
        capacity = int(torch.randint(window, length + 1, (), generator=generator))
        padding = int(torch.randint(0, 5, (), generator=generator))
        scores = torch.randint(0, 6 if case % 2 else 1000, (length,), generator=generator).float()
        slots = torch.arange(padding + length)
        real = (slots >= padding)[None]
        row = torch.cat([torch.full([padding], 2000.0), scores])[None]
        cut = cut_of(row, real, real & (slots < padding + length - window), capacity)
        index = Neighbours(width=width).select(cut, row).index[0] - padding
        assert index.tolist() == chosen(scores.tolist(), capacity, window, width), (case, length, capacity)


def cut_of(row: Tensor, real: Tensor, candidates: Tensor, capacity: int) -> PromptCut:
    def nobody(*given: Any, **more: Any) -> Any:
        raise AssertionError("a selector reads the score alone")

    return PromptCut(
        b=EagerBuilder(), x=row[..., None], layer=-1, num_layers=3, tokens=row.shape[1], kept=capacity, first_call=1,
        candidates=candidates, real=real, padding_first=True, present=None, remaining=None, before=-1,
        attention=nobody, probe=nobody, branch=nobody, entry=nobody, input=nobody, fail=nobody,
    )  # fmt: skip


LOOP = {"tokens": 9, "kernel": 5, "neighbours": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("specpc") / "model")


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    return compiled(folder, folder.parent / "out", policy([{"preset": "specpc", "window": 4, **LOOP}]))


def test_the_loop_takes_the_numbers_with_the_prompts(bundle: Bundle) -> None:
    prompts = [[*range(3, 29)], [*range(30, 50)], [5, 6, 7]]
    rows = [torch.rand(len(prompt), generator=torch.Generator().manual_seed(len(prompt))) for prompt in prompts]
    given = {"importance": [row.tolist() for row in rows]}
    made = Generator(bundle).generate(prompts, max_new_tokens=8, stop=(), given=given)
    for prompt, row, tokens in zip(prompts, rows, made, strict=True):
        ids = [prompt[j] for j in kept(row, LOOP)]
        for token in tokens:
            logits, _ = read_alone(model_of_tiny("llama"), torch.tensor(ids))
            assert token == int(logits[-1].argmax())
            ids.append(token)


def test_nothing_given_keeps_the_beginning_and_the_window(bundle: Bundle) -> None:
    prompt = [*range(3, 33)]
    made = Generator(bundle).generate([prompt], max_new_tokens=5, stop=())[0]
    ids = [*prompt[:9], *prompt[-4:]]
    for token in made:
        assert token == int(read_alone(model_of_tiny("llama"), torch.tensor(ids))[0][-1].argmax())
        ids.append(token)


def test_the_report_says_what_every_layer_holds(bundle: Bundle) -> None:
    report = bundle.report
    assert bundle.manifest.state == "ok"
    assert [row.step for row in report.layers] == ["specpc", "", ""]
    assert {row.tokens_out for row in report.layers} == {9 + 4}
    assert all(row.tokens_in > 100 for row in report.layers)
    contract = next(item for item in bundle.manifest.inputs if item.name == "importance")
    assert contract.doc == "how important each token is"
    assert contract.unguided == 0


def test_a_dry_run_shows_what_every_layer_would_hold(folder: Path) -> None:
    plan = tokcc.compile(folder, policy([{"preset": "specpc", "window": 4, **LOOP}]), dry_run=True).to_dict()
    assert [(row["layer"], row["step"], row["tokens_out"]) for row in plan["layers"]] == [
        (0, "specpc", 13), (1, "", 13), (2, "", 13),
    ]  # fmt: skip
    assert {row["tokens_in"] for row in plan["layers"]} == {511}
    assert plan["ideal_speedup"] > 2
