"""From a model folder to generated tokens: the whole compile, and the own loop over caches of different lengths."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.decoders.bundles import compiled, model_folder
from tests.decoders.tiny import model_of
from tests.prompt.engine import visual_policy
from tests.prompt.models import IMAGE
from tests.prompt.oracle import Cut, run
from tests.prompt.test_fastv import rule
from tokcc.backends.bundle import Bundle
from tokcc.backends.generation import DecoderEngine, Generator
from tokcc.errors import LoweringError, UsageError

COUNT, KEPT = 16, 8
POLICY = visual_policy({"preset": "fastv", "layer": 0})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("fastv")
    return compiled(model_folder(folder / "model"), folder / "out", POLICY)


def test_generates_what_the_model_does_with_hidden_keys(bundle: Bundle) -> None:
    prompts = [[1, 5, *[IMAGE] * COUNT, 7, 8, 9], [*[IMAGE] * COUNT, 11, 12]]
    got = Generator(bundle).generate(prompts, max_new_tokens=12, stop=())
    for prompt, tokens in zip(prompts, got, strict=True):
        ids = list(prompt)
        for token in tokens:
            trace = run(model_of("llama"), torch.tensor(ids), len(prompt), [Cut(0, rule(KEPT))])
            assert token == int(trace.logits[-1].argmax())
            ids.append(token)


def test_caches_have_lengths_of_their_own(bundle: Bundle) -> None:
    engine = DecoderEngine(bundle)
    ids = torch.tensor([[1, *[IMAGE] * COUNT, 4, 5]]).numpy()
    positions = torch.arange(ids.shape[1])[None].numpy()
    _, past = engine.call(ids, torch.ones(ids.shape).long().numpy(), positions, engine.empty_past(1))
    assert [past[f"past_key_values.{layer}.value"].shape[2] for layer in range(3)] == [19, 11, 11]


def test_the_report_says_what_was_done(bundle: Bundle) -> None:
    report = bundle.report
    assert bundle.manifest.state == "ok"
    assert [row.step for row in report.layers] == ["fastv", "", ""]
    kept = [row.tokens_in - row.tokens_out for row in report.layers]
    assert kept == [0, COUNT - KEPT, COUNT - KEPT]
    assert report.totals.flops_after < report.totals.flops_before
    lock = (bundle.path / "policy.lock.yaml").read_text()
    assert f"input_ids: {IMAGE}" in lock


@pytest.mark.slow  # it measures for some seconds
def test_the_first_call_is_timed(tmp_path: Path) -> None:
    report = compiled(model_folder(tmp_path / "model"), tmp_path / "out", POLICY, calibrate=True).report
    assert any(f"{COUNT} of them of the segments" in note for note in report.notes)
    assert report.latency is not None
    assert report.latency.shapes["input_ids"] == (1, 511)
    assert report.totals.flops_after < report.totals.flops_before


def test_a_prompt_without_an_image_stops(bundle: Bundle) -> None:
    with pytest.raises(LoweringError, match="fails in a call of 4 tokens"):
        Generator(bundle).generate([[3, 4, 5, 6]], max_new_tokens=2)


def test_text_is_no_measure(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a text says nothing"):
        compiled(
            model_folder(tmp_path / "model"),
            tmp_path / "out",
            POLICY,
            calibrate=True,
            calibration=[list(range(3, 90))] * 20,
        )
