"""Fewer image tokens and smaller caches: LLaVA against oracles that know nothing of tokcc."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.decoders.methods.rules import best
from tests.decoders.oracle import Call, run_alone
from tests.vlm.bundles import NEW, PROMPTS, compiled, given_for, pictures, wanted_tokens
from tests.vlm.families import FAMILIES, IMAGE, VOCABULARY, Given, model_of
from tokcc.backends.bundle import Bundle
from tokcc.backends.vlm import VisionLanguage
from tokcc.errors import PlanError, UsageError
from tokcc.pipeline import verify

KEPT, SLOTS, RECENT = 5, 12, 6
POLICY = {
    "version": 1,
    "name": "both",
    "steps": [{"preset": "fastervlm", "tokens": KEPT}, {"preset": "h2o", "tokens": SLOTS}],
}


@functools.cache
def written_out() -> Any:
    """LLaVA with the same weights, and attention that can be looked at."""
    model = transformers.LlavaForConditionalGeneration._from_config(
        FAMILIES["llava"].config(), attn_implementation="eager"
    )
    model.load_state_dict(model_of("llava").state_dict())
    return model.eval()


def kept_features(pixels: Tensor) -> tuple[Tensor, list[int]]:
    """FasterVLM by hand: the patches that the class token attends to most, of the layer whose output is taken."""
    model = written_out()
    with torch.no_grad():
        seen = model.model.vision_tower(pixels, output_hidden_states=True, output_attentions=True)
        layer = model.config.vision_feature_layer
        received = seen.attentions[layer][0, :, 0, 1:].sum(0)
        kept = sorted(sorted(range(len(received)), key=lambda j: (-float(received[j]), j))[:KEPT])
        rows = model.model.multi_modal_projector(seen.hidden_states[layer][:, 1:][:, kept])
    return rows[0], kept


def embedded(words: list[int], given: list[Given]) -> Tensor:
    """A prompt's embeddings ``[S, H]``, with the kept features of its pictures in their places."""
    table, left = model_of("llava").get_input_embeddings(), iter(given)
    with torch.no_grad():
        parts = [kept_features(next(left).units)[0] if word == IMAGE else table(torch.tensor([word])) for word in words]
    return torch.cat(parts)


@pytest.fixture(scope="module")
def reduced(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return compiled("llava", tmp_path_factory.mktemp("reduced") / "out", POLICY)


@pytest.fixture(scope="module")
def engines(reduced: Bundle) -> VisionLanguage:
    return VisionLanguage(reduced)


def test_the_kept_features(engines: VisionLanguage, reduced: Bundle) -> None:
    media = reduced.manifest.media
    assert media is not None
    assert (media.stock_tokens, media.tokens) == (16, KEPT)
    given = given_for("llava")
    rows, made = engines.prepare(PROMPTS, [pictures(row) for row in given])
    assert [row.count(IMAGE) for row in rows] == [KEPT, 2 * KEPT, 0]
    for row, (words, own) in enumerate(zip(PROMPTS, given, strict=True)):
        wanted = embedded(words, own).numpy()
        got = made.embeds[row, made.embeds.shape[1] - len(wanted) :]
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-4 * float(np.abs(wanted).max()))


def test_the_index_counts_patches(reduced: Bundle) -> None:
    pixels = given_for("llava")[0][0].units
    index = reduced.part("vision_encoder").run({"pixel_values": pixels.numpy()})["image_features.token_index"]
    assert index[0].tolist() == kept_features(pixels)[1]


def test_prompts_that_a_stock_processor_wrote_are_cut(engines: VisionLanguage) -> None:
    given = pictures(given_for("llava")[1])
    lengths = (1, KEPT, 16)  # as a text has them, as this engine wants them, as the model was made
    made = [engines.prepare([[1, *[IMAGE] * n, 12, *[IMAGE] * n, 4]], [given])[0] for n in lengths]
    assert made[0] == made[1] == made[2] == [[1, *[IMAGE] * KEPT, 12, *[IMAGE] * KEPT, 4]]


@pytest.mark.parametrize("count", [2, 3, 17])
def test_placeholders_that_fit_nothing(engines: VisionLanguage, count: int) -> None:
    with pytest.raises(UsageError, match="do not fit"):
        engines.prepare([[1, *[IMAGE] * count]], [pictures(given_for("llava")[0])])


def _evicting(call: Call) -> Tensor | None:
    """H2O by its formula."""
    fresh = call.grouped.sum(2).mean(1)
    before = call.memory.values.get("score", torch.zeros(call.key.shape[0], 0))
    fresh[:, : before.shape[1]] += before
    keep = best(fresh, SLOTS, recent=RECENT)
    call.memory.values["score"] = fresh if keep is None else fresh[torch.arange(len(fresh))[:, None], keep]
    return keep


def language_model(rows: Tensor) -> nn.Module:
    """The language model by itself, with features as further words of its vocabulary."""
    whole = written_out()
    model = transformers.LlamaForCausalLM._from_config(whole.config.text_config, attn_implementation="eager").eval()
    model.model.load_state_dict(whole.model.language_model.state_dict())
    model.lm_head.load_state_dict(whole.lm_head.state_dict())
    table = nn.Embedding(VOCABULARY + len(rows), rows.shape[1])
    with torch.no_grad():
        table.weight.copy_(torch.cat([whole.get_input_embeddings().weight, rows]))
    model.model.embed_tokens = table
    return model


def test_kept_features_and_an_evicting_decoder(engines: VisionLanguage) -> None:
    """The logits of every call, and so the tokens, of a padded batch."""
    given = given_for("llava")
    steps = engines.stream(PROMPTS, [pictures(row) for row in given], max_new_tokens=24, stop=())
    made = list(zip(*steps, strict=True))
    assert {value.shape[2] for value in steps._past.values()} == {SLOTS}
    for words, own, got in zip(PROMPTS, given, made, strict=True):
        rows = torch.cat([torch.zeros(0, 32), *(kept_features(item.units)[0] for item in own)])
        features = iter(range(VOCABULARY, VOCABULARY + len(rows)))
        prompt = [i for word in words for i in ([next(features) for _ in range(KEPT)] if word == IMAGE else [word])]
        ids = torch.tensor([*prompt, *got])
        alone = run_alone(language_model(rows), ids, [len(prompt), *[1] * (len(got) - 1), 1], _evicting)
        logits = alone.logits[len(prompt) - 1 : -1]
        assert tuple(logits.argmax(-1).tolist()) == got
        assert engines.generate([words], [pictures(own)], max_new_tokens=24, stop=()) == [list(got)]


@pytest.mark.slow
def test_transformers_with_the_kept_features(tmp_path: Path) -> None:
    """Without eviction the tokens are those that transformers generates from the kept features."""
    policy = {"version": 1, "name": "encoder", "steps": POLICY["steps"][:1]}
    engines = VisionLanguage(compiled("llava", tmp_path / "out", policy))
    given = given_for("llava")
    made = engines.generate(PROMPTS, [pictures(row) for row in given], max_new_tokens=NEW, stop=())
    for words, own, got in zip(PROMPTS, given, made, strict=True):
        embeds = embedded(words, own)[None]
        inputs = {"inputs_embeds": embeds, "attention_mask": torch.ones(embeds.shape[:2], dtype=torch.int64)}
        assert got == wanted_tokens(model_of("llava"), inputs)


@pytest.mark.slow
def test_merging_in_the_tower_leaves_the_number_of_tokens(tmp_path: Path) -> None:
    """An output that is given back whole needs no other prompt."""
    bundle = compiled("llava", tmp_path / "out", {"version": 1, "steps": [{"preset": "tome", "r": 2}]})
    media = bundle.manifest.media
    assert media is not None
    assert (media.tokens, media.edits) == (16, ())
    plain = compiled("llava", tmp_path / "plain")
    pixels = given_for("llava")[0][0].units.numpy()
    one, two = (each.part("vision_encoder").run({"pixel_values": pixels})["image_features"] for each in (bundle, plain))
    assert one.shape == two.shape
    assert not np.allclose(one, two, atol=1e-4)


def test_steps_say_which_part_they_are_for(tmp_path: Path) -> None:
    step = {"preset": "h2o", "tokens": SLOTS, "at": {"part": "encoder"}}
    with pytest.raises(PlanError, match="no key-value cache"):
        compiled("llava", tmp_path / "out", {"version": 1, "steps": [step]})
    assert not (tmp_path / "out").exists()


def test_policies_of_the_parts(reduced: Bundle) -> None:
    locks = {name: (reduced.part(name).path / "policy.lock.yaml").read_text() for name in reduced.manifest.parts}
    assert "fastervlm" in locks["vision_encoder"]
    assert "h2o" not in locks["vision_encoder"]
    assert "h2o" in locks["decoder"]
    assert "fastervlm" not in locks["decoder"]
    assert "steps: []" in locks["embed_tokens"]


def test_reports_of_the_parts(reduced: Bundle) -> None:
    assert reduced.part("vision_encoder").report.layers[-1].tokens_out == KEPT + 1  # and the class token
    assert {row.tokens_out for row in reduced.part("decoder").report.layers} == {SLOTS}
    assert verify(reduced).passed
    with pytest.raises(UsageError, match="each of its parts"):
        _ = reduced.report
    with pytest.raises(UsageError, match="each of its parts"):
        reduced.engine("onnx")
    with pytest.raises(UsageError, match="no part"):
        reduced.part("decoders")
    assert json.loads((reduced.path / "manifest.json").read_text())["media"]["tokens"] == KEPT
