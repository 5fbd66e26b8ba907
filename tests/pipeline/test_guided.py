"""Methods with weights and inputs of their own, from the policy to the bundle and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.export import Dim

import tokcc
from tests.passes.reference_models import WIDTH, patches, vision
from tokcc.backends.bundle import Bundle
from tokcc.errors import PlanError, UsageError
from tokcc.passes.features import features
from tokcc.passes.inputs import EngineInput, Guided
from tokcc.passes.piece import Score, pieces
from tokcc.passes.trained import Trained, linear_specs

_POLICY = """
steps:
  - node: prune
    at: {site: encoder_output}
    score: {kind: text_relevance, projection: true, weights: parts/towers.safetensors}
    budget: {tokens: 9}
outputs: {"*": reduced}
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bundle]:
    folder = tmp_path_factory.mktemp("guided")
    (folder / "parts").mkdir()
    generator = torch.Generator().manual_seed(1)
    tensors = {"norm.weight": torch.ones(WIDTH), "projection.weight": torch.randn(20, WIDTH, generator=generator)}
    save_file(tensors, folder / "parts" / "towers.safetensors")
    (folder / "policy.yaml").write_text(_POLICY)
    return folder, build(folder / "policy.yaml", folder / "out", keep_baseline=True)


def build(policy: Any, output: Path, **options: Any) -> Bundle:
    bundle = tokcc.compile(
        vision(),
        policy,
        example_inputs={"patches": patches(2, 50)},
        dynamic_shapes={"patches": {0: Dim("batch", min=1, max=8)}},
        output=output,
        calibrate=options.get("calibration") is not None,
        **options,
    )
    assert isinstance(bundle, Bundle)
    return bundle


def feeds(rows: int = 3, count: int = 3) -> dict[str, Any]:
    text = np.random.default_rng(0).standard_normal((2, rows, 20)).astype(np.float32)
    return {"patches": patches(2, 50, seed=4).numpy(), "text": text, "text_count": np.full(2, count)}


def test_the_contract_says_what_to_feed(compiled: tuple[Path, Bundle]) -> None:
    bundle = compiled[1]
    own, text, count = bundle.manifest.inputs
    assert (own.name, own.doc, own.unguided) == ("patches", None, None)
    assert (text.name, text.shape, text.unguided) == ("text", ("batch", "T", 20), 0.0)
    assert (count.name, count.dtype, count.shape) == ("text_count", "int64", ("batch",))
    assert "vectors of the text" in (text.doc or "")
    assert any("`text` float32[batch, T, 20]" in note for note in bundle.report.notes)


def test_rows_beyond_the_count_do_not_matter(compiled: tuple[Path, Bundle]) -> None:
    bundle = compiled[1]
    short, padded = feeds(2, 2), feeds(5, 2)
    padded["text"][:, :2] = short["text"]
    one, two = bundle.run(short), bundle.run(padded)
    assert np.array_equal(one["tokens.token_index"], two["tokens.token_index"])
    other = {**short, "text": -short["text"]}
    assert not np.array_equal(one["tokens.token_index"], bundle.run(other)["tokens.token_index"])


def test_the_eager_program_agrees(compiled: tuple[Path, Bundle]) -> None:
    folder, bundle = compiled
    given = feeds()
    example = {"patches": patches(2, 50)}
    with torch.no_grad():
        reduced = tokcc.reduce(vision(), folder / "policy.yaml", example_inputs=example).module(check_guards=False)
        wanted = reduced(**{name: torch.from_numpy(value) for name, value in given.items()})
    found = bundle.run(given)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value.numpy(), atol=1e-5)


def test_a_missing_input_is_explained(compiled: tuple[Path, Bundle]) -> None:
    with pytest.raises(UsageError) as caught:
        compiled[1].run({"patches": feeds()["patches"]})
    assert "the policy added text=float32[batch, T, 20]" in (caught.value.help or "")


def test_the_bundle_can_be_compiled_again_without_the_authors_files(
    compiled: tuple[Path, Bundle], tmp_path: Path
) -> None:
    bundle = compiled[1]
    stored = bundle.path / "weights" / "towers.safetensors"
    assert "weights/towers.safetensors" in bundle.manifest.files
    assert load_file(stored).keys() == {"norm.weight", "projection.weight"}
    again = build(bundle.path / "policy.lock.yaml", tmp_path / "again")
    given = feeds()
    for name, value in bundle.run(given).items():
        assert np.array_equal(again.run(given)[name], value)


def test_calibration_may_provide_the_inputs_or_not(compiled: tuple[Path, Bundle], tmp_path: Path) -> None:
    folder = compiled[0]
    images = patches(3, 50, seed=9).numpy()
    bare = build(folder / "policy.yaml", tmp_path / "bare", calibration={"patches": images})
    assert bare.report.fidelity is not None
    assert any("the data has no `text`: 0 is fed" in note for note in bare.report.notes)
    text = np.ones((3, 2, 20), dtype=np.float32)
    data = {"patches": images, "text": text, "text_count": np.array([1, 2, 2])}
    full = build(folder / "policy.yaml", tmp_path / "full", calibration=data)
    assert not any("is fed" in note for note in full.report.notes)


def test_pt2(compiled: tuple[Path, Bundle], tmp_path: Path) -> None:
    """Parity with the oracle is checked on the loaded archive, at other batch sizes and lengths of the text."""
    bundle = build(compiled[0] / "policy.yaml", tmp_path / "out", backends=("pt2",))
    assert {check.engine for check in bundle.report.parity.checks} == {"pt2"}
    assert bundle.report.parity.passed


def test_a_dry_run_reads_no_data(compiled: tuple[Path, Bundle]) -> None:
    plan = tokcc.compile(
        vision(), compiled[0] / "policy.yaml", example_inputs={"patches": patches(2, 50)}, dry_run=True
    ).to_dict()
    assert any("besides the model's own inputs" in note for note in plan["notes"])


def test_the_documented_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The class of docs/guided.md does what it says: a gate of trained weights, scaled by an input."""
    text = (Path(__file__).parents[2] / "docs" / "guided.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    known = (Trained, Guided, Score, EngineInput, linear_specs, features)
    names: dict[str, Any] = {"ClassVar": ClassVar, **{item.__name__: item for item in known}}
    exec(code, names)
    monkeypatch.setitem(pieces("scores"), "mine", names["Mine"])
    gate = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(2))
    save_file({"gate.weight": gate}, tmp_path / "gate.safetensors")
    score = {"kind": "mine", "weights": str(tmp_path / "gate.safetensors")}
    step = {"node": "prune", "at": {"site": "encoder_output"}, "score": score, "budget": {"tokens": 6}}
    bundle = build({"steps": [step], "outputs": {"*": "reduced"}}, tmp_path / "out")
    assert [item.name for item in bundle.manifest.inputs] == ["patches", "mood"]
    images = patches(2, 50, seed=4)
    with torch.no_grad():
        rating = (vision()(images)["tokens"][:, 1:] @ gate.T)[:, :, 0]
    for mood in (1.0, -1.0):
        given = {"patches": images.numpy(), "mood": np.full(2, mood, dtype=np.float32)}
        kept = bundle.run(given)["tokens.token_index"][:, 1:] - 1
        assert np.array_equal(kept, np.sort((mood * rating).topk(6).indices.numpy(), axis=1))


def test_a_name_that_the_model_has(compiled: tuple[Path, Bundle]) -> None:
    policy = {
        "steps": [
            {"node": "prune", "score": {"kind": "text_relevance", "text": "patches"}, "budget": {"tokens": 9}}
        ]
    }  # fmt: skip
    with pytest.raises(PlanError, match="`patches`"):
        tokcc.reduce(vision(), policy, example_inputs={"patches": patches(2, 50)})
