"""Numbers of heads, against transformers' own attention and heads that are made for the purpose."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.decoders.bundles import compiled, model_folder
from tests.decoders.tiny import model_of
from tokcc.analysis.head_numbers import copies, cut_error, span_mass
from tokcc.cli.app import main
from tokcc.pipeline import profile


def test_an_echo_head_and_an_induction_head() -> None:
    """One looks at the latest copy, one at what followed it, one at itself."""
    period, rows = 5, 15
    probs = torch.zeros(3, rows, rows)
    for row in range(rows):
        probs[0, row, max(row - period, 0)] = 1
        probs[1, row, max(row - period + 1, 0)] = 1
        probs[2, row, row] = 1
    echo, induction = copies(probs, period)
    assert echo.tolist() == [1, 0, 0]
    assert induction.tolist() == [0, 1, 0]


def test_all_copies_count() -> None:
    probs = torch.full((1, 9, 9), 1 / 9)
    echo, _ = copies(probs, 3)
    assert echo.item() == pytest.approx((1 + 1 + 1 + 2 + 2 + 2) / 6 / 9)


def test_a_cut_that_loses_nothing_and_one_that_does() -> None:
    generator = torch.Generator().manual_seed(0)
    probs = torch.softmax(torch.randn(4, 12, 12, generator=generator), 2)
    value = torch.randn(2, 12, 8, generator=generator)
    assert cut_error(probs, value, (0, 1), 12, 3) == pytest.approx(0, abs=1e-6)
    assert cut_error(probs, value, (0, 1), 6, 3) > 0.05
    flat = torch.ones_like(value)
    assert cut_error(probs, flat, (0, 1), 6, 3) == pytest.approx(0, abs=1e-6)


def test_equals_the_model_s_own_attention(tmp_path: Path) -> None:
    """Echo of every head, from transformers with eager attention on the same tokens."""
    made = profile(model_folder(tmp_path / "model"), tokens=64, heads=2)
    model = model_of("llama")
    ids = torch.randperm(97, generator=torch.Generator().manual_seed(0))[:16].repeat(4)
    with torch.no_grad():
        attentions = model(ids[None], output_attentions=True, use_cache=False).attentions
    for layer, probs in enumerate(attentions):
        echo, induction = copies(probs[0], 16)
        torch.testing.assert_close(torch.tensor(made.echo[layer]), echo, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(torch.tensor(made.induction[layer]), induction, atol=1e-5, rtol=1e-4)
    assert [len(row) for row in made.heads] == [2, 2, 2]
    assert all(0 < error < 2 for error in made.errors)
    assert span_mass(attentions[0][0], range(60, 64), range(0, 4)).shape == (4,)


@pytest.mark.slow
def test_the_file_serves_two_methods(tmp_path: Path) -> None:
    folder, path = model_folder(tmp_path / "model"), tmp_path / "heads.json"
    assert main(["profile", str(folder), "-o", str(path), "--tokens", "64", "--quiet"]) == 0
    assert sorted(json.loads(path.read_text())) == [
        "densities",
        "echo",
        "errors",
        "heads",
        "induction",
        "key_channels",
        "key_pairs",
        "measured",
        "query_channels",
        "query_pairs",
        "retrieval",
    ]
    razor = {"preset": "razor-attention", "profile": str(path), "sinks": 1, "recent": 5, "induction": 0.3}
    compiled(folder, tmp_path / "razor", {"version": 1, "name": "razor", "steps": [razor]})
    compress = {"preset": "compresskv", "profile": str(path), "tokens": 16, "least": 8, "window": 4}
    bundle = compiled(folder, tmp_path / "compress", {"version": 1, "name": "c", "steps": [compress]})
    applied = (bundle.path / "policy.lock.yaml").read_text()
    assert str(path) not in applied


@pytest.mark.parametrize("options", [["--tokens", "10"], ["--keep", "1.7"], ["--heads", "0"]])
def test_numbers_out_of_range_are_refused(options: list[str], tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    assert main(["profile", str(folder), "-o", str(tmp_path / "p.json"), "--quiet", *options]) == 2
    assert not (tmp_path / "p.json").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = model_folder(tmp_path / "model")
    code = main(["profile", str(folder), "-o", str(tmp_path / "file" / "p.json"), "--tokens", "64", "--quiet"])
    assert code != 0
