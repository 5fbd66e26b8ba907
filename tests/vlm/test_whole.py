"""Images and text to tokens through the engines, equal to transformers; batches of prompts equal to each alone."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch

from tests.vlm.bundles import NEW, PROMPTS, compiled, given_for, pictures, theirs, wanted_tokens
from tests.vlm.families import FAMILIES, IMAGE, model_of, prompt_of
from tokcc.backends.bundle import Bundle
from tokcc.backends.vlm import VisionLanguage
from tokcc.pipeline import verify

TOLERANCE = 2e-4


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def bundle(family: str, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return compiled(family, tmp_path_factory.mktemp("vlm") / "out")


@pytest.fixture(scope="module")
def engines(bundle: Bundle) -> VisionLanguage:
    return VisionLanguage(bundle)


def test_features_and_embeddings(family: str, engines: VisionLanguage) -> None:
    """What stands in the prompts' places is what transformers puts there: taken from the language model's own input."""
    model = model_of(family)
    given = given_for(family)
    _, media = engines.prepare(PROMPTS, [pictures(row) for row in given])
    for row, (words, own) in enumerate(zip(PROMPTS, given, strict=True)):
        seen: list[torch.Tensor] = []

        def keep(
            _module: object, _args: object, kwargs: dict[str, torch.Tensor], seen: list[torch.Tensor] = seen
        ) -> None:
            seen.append(kwargs["inputs_embeds"])

        hook = model.get_decoder().register_forward_pre_hook(keep, with_kwargs=True)
        try:
            with torch.no_grad():
                model(**theirs(family, words, own))
        finally:
            hook.remove()
        got = media.embeds[row, media.embeds.shape[1] - seen[0].shape[1] :]
        np.testing.assert_allclose(got, seen[0][0].numpy(), rtol=0, atol=TOLERANCE * float(seen[0].abs().max()))


def test_logits(family: str, engines: VisionLanguage) -> None:
    """Of all tokens of a padded batch."""
    given = given_for(family)
    rows, media = engines.prepare(PROMPTS, [pictures(row) for row in given])
    assert rows == [prompt_of(words, own) for words, own in zip(PROMPTS, given, strict=True)]
    length = max(map(len, rows))
    ids = np.array([[0] * (length - len(row)) + row for row in rows])
    mask = np.array([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    positions = media.positions if media.positions is not None else np.maximum(mask.cumsum(1) - 1, 0)
    engine = engines.engine
    logits, _ = engine.read(ids, mask, positions, engine.empty_past(3), {"inputs_embeds": media.embeds})
    for row, (words, own) in enumerate(zip(PROMPTS, given, strict=True)):
        with torch.no_grad():
            wanted = model_of(family)(**theirs(family, words, own)).logits[0].numpy()
        got = logits[row, length - len(wanted) :]
        np.testing.assert_allclose(got, wanted, rtol=0, atol=TOLERANCE * float(np.abs(wanted).max()))


def test_tokens(family: str, engines: VisionLanguage) -> None:
    """A padded batch with one, two and no pictures: what transformers gives for each, and what each gives alone."""
    given = given_for(family)
    made = engines.generate(PROMPTS, [pictures(row) for row in given], max_new_tokens=NEW, stop=())
    for words, own, got in zip(PROMPTS, given, made, strict=True):
        assert got == wanted_tokens(model_of(family), theirs(family, words, own))
        assert engines.generate([words], [pictures(own)], max_new_tokens=NEW, stop=()) == [got]


def test_placeholders_as_processors_write_them(family: str, engines: VisionLanguage) -> None:
    given = given_for(family)[1]
    few, many = PROMPTS[1], prompt_of(PROMPTS[1], given)
    one, two = (engines.generate([words], [pictures(given)], max_new_tokens=3, stop=()) for words in (few, many))
    assert one == two
    assert many.count(IMAGE) > few.count(IMAGE)


def test_the_bundle(family: str, bundle: Bundle) -> None:
    media = bundle.manifest.media
    assert media is not None
    assert list(bundle.manifest.parts) == [media.part, "embed_tokens", "decoder"]
    assert (media.tokens, media.edits, media.refusal) == (media.stock_tokens, (), None)
    assert verify(bundle).passed
    names = {path.name for path in (bundle.path / "onnx").iterdir()}
    assert names == {f"{media.part}.onnx", "embed_tokens.onnx", "decoder_model_merged.onnx"}
    session = onnxruntime.InferenceSession(str(bundle.part("decoder").engine("onnx")))
    inputs = {item.name: item.shape for item in session.get_inputs()}
    assert list(inputs)[:4] == ["inputs_embeds", "attention_mask", "position_ids", "past_key_values.0.key"]
    # transformers.js makes the empty cache from the names of sizes, and knows this one.
    assert all(shape[0] == "batch_size" for name, shape in inputs.items() if name.startswith("past_key_values."))
    bundle.verify()
