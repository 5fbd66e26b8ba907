"""Models that cache a latent of each token: attention with one key head, and all that goes with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.decoders.bundles import compiled, model_folder
from tests.decoders.engine import CALLS, build, tokens
from tests.decoders.tiny import model_of, program_of
from tokcc.analysis.cache_sites import cache_sites
from tokcc.backends.genai_config import GENAI_CONFIG
from tokcc.backends.generation import Generator
from tokcc.capture.latent_cache import as_one_head, latent_layers


@pytest.mark.parametrize("family", ["deepseek-v3", "deepseek-v32"])
def test_keys_are_latents_and_turned_keys(family: str) -> None:
    program = program_of(family)
    nodes = {node.name: node for node in program.graph.nodes}
    for site in cache_sites(program):
        shapes = [list(nodes[name].meta["val"].shape)[1::2] for name in (site.past_key, site.past_value, site.query)]
        assert shapes == [[1, 24], [1, 16], [4, 24]]


def test_the_model_is_itself_again() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model, before = model_of("deepseek-v3"), ALL_ATTENTION_FUNCTIONS["sdpa"]
    own = type(model.model.layers[0].self_attn).expand_kv
    with as_one_head(model, {0, 2}):
        assert model.model.layers[1].self_attn.expand_kv.__func__ is own
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not before
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
    assert model.model.layers[0].self_attn.expand_kv.__func__ is own
    assert latent_layers(model) == {0, 1, 2}
    assert not latent_layers(model_of("llama"))


def test_layers_that_expand_latents_otherwise_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("deepseek-v3")
    layer = model.model.layers[1].self_attn
    plain = layer.expand_kv
    monkeypatch.setattr(layer, "expand_kv", lambda c, r: plain(2 * c, r), raising=False)
    assert latent_layers(model) == {0, 2}


@pytest.mark.parametrize(
    "steps",
    [
        [{"preset": "quest", "at": {"layers": "all"}, "page": 4, "tokens": 4096, "length": 0}],
        pytest.param([{"preset": "h2o", "tokens": 4096}], marks=pytest.mark.slow),
    ],
    ids=["quest", "h2o"],
)
def test_methods_for_other_models_serve_these(steps: list[dict[str, Any]], tmp_path: Path) -> None:
    """Where they may read and keep everything, as transformers does it."""
    calls = CALLS[:10]
    engine = build("deepseek-v3", {"version": 1, "name": "own", "steps": steps}, tmp_path)
    ids, mask = tokens(2, sum(calls), (0, 3))
    logits, _ = engine.run(ids, mask, calls)
    for row, count in enumerate((0, 3)):
        with torch.no_grad():
            wanted = model_of("deepseek-v3")(input_ids=ids[row : row + 1, count:]).logits[0]
        np.testing.assert_allclose(logits[row, count:], wanted.numpy(), rtol=0, atol=2e-4 * float(wanted.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("kv", [{}, {"kv": {"layout": "slots", "tokens": 64}}], ids=["merged", "slots"])
def test_a_bundle_generates_what_the_model_does(kv: dict[str, Any], tmp_path: Path) -> None:
    """With an indexer, whose keys travel; onnxruntime-genai knows one width and gets no configuration."""
    family, prompts = "deepseek-v32", [list(range(5, 30)), list(range(40, 57))]
    step = {"preset": "hisa", "tokens": 12, "block": 4, "candidates": 64, "length": 13}
    folder = model_folder(tmp_path / "model", family)
    bundle = compiled(folder, tmp_path / "bundle", {"version": 1, "name": "hisa", "steps": [step], **kv})
    # Not of the padding token, whose embedding is zero: all keys are alike to it.
    found = Generator(bundle).generate(prompts, max_new_tokens=10, stop=())
    for row, prompt in zip(found, prompts, strict=True):
        wanted = model_of(family).generate(
            torch.tensor([prompt]), max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert row == wanted[0, len(prompt) :].tolist()
    assert not (bundle.path / GENAI_CONFIG).exists()
