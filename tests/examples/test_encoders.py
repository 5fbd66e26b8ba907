from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image

from examples import image_encoder, photos, text_encoder, transformer_classifier
from examples.assets import IMAGE_ENCODER, SKIMAGE_PHOTOS, TEXT_ENCODER, Asset, available, locate


def needs(*assets: Asset) -> pytest.MarkDecorator:
    missing = [asset.pin for asset in assets if not available(asset)]
    return pytest.mark.skipif(
        bool(missing), reason=f"{', '.join(missing)} not here (python examples/assets.py fetches it)"
    )


def test_preprocess_resizes_crops_and_normalises() -> None:
    wide = np.zeros((20, 60, 3), dtype=np.uint8)
    wide[:, 20:40] = 255  # exactly the centre square
    batch = image_encoder.preprocess([wide, np.full((28, 28), 255, dtype=np.uint8)], size=14)
    assert batch.shape == (2, 3, 14, 14)
    assert batch.dtype == np.float32
    white = (1 - np.array(image_encoder.MEAN)) / np.array(image_encoder.STD)
    np.testing.assert_allclose(batch[0, :, 7, 7], white, rtol=1e-5)
    np.testing.assert_allclose(batch[1], np.broadcast_to(white[:, None, None], (3, 14, 14)), rtol=1e-5)


def test_resample_to_the_same_grid_changes_nothing() -> None:
    table = torch.randn(1, 1 + 25, 8)
    torch.testing.assert_close(image_encoder._resample(table, 5), table)
    assert image_encoder._resample(table, 3).shape == (1, 10, 8)


def test_classifier_exports_with_dynamic_batch() -> None:
    model, args = transformer_classifier.classifier()
    program = torch.export.export(model, args, dynamic_shapes={"ids": {0: torch.export.Dim("batch")}})
    ids = torch.randint(0, 1000, (3, 96))
    torch.testing.assert_close(program.module()(ids), model(ids))


@needs(IMAGE_ENCODER, SKIMAGE_PHOTOS)
@pytest.mark.slow
def test_image_encoder_agrees_with_the_original_onnx(tmp_path: Path) -> None:
    """All tokens after the final norm, on real photos, against onnxruntime running the file the weights came from."""
    final_norm = "/backbone/layernorm/Add_1_output_0"
    original = onnx.load(locate(IMAGE_ENCODER)[0])
    original.graph.output.append(helper.make_tensor_value_info(final_norm, TensorProto.FLOAT, None))
    session = ort.InferenceSession(original.SerializeToString(), providers=["CPUExecutionProvider"])
    images = [np.asarray(Image.open(path).convert("RGB")) for path in photos.write_photos(tmp_path)[:2]]
    pixels = image_encoder.preprocess(images)
    (expected,) = session.run([final_norm], {"input_image": pixels})

    encoder, _ = image_encoder.build(tokens=True)
    with torch.no_grad():
        found = encoder(torch.from_numpy(pixels))
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found["last_hidden_state"].numpy(), expected, atol=1e-4)
    np.testing.assert_allclose(found["features"].numpy(), expected[:, 0], atol=1e-4)


@needs(IMAGE_ENCODER)
@pytest.mark.slow
def test_saved_image_encoder_has_a_dynamic_batch(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    image_encoder.save(path, image_size=56)
    with path.open("rb") as file:
        program = torch.export.load(file)
    encoder, _ = image_encoder.build(image_size=56)
    pixels = torch.randn(3, 3, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(pixels)["features"], encoder(pixels)["features"])
    assert (tmp_path / "preprocessor_config.json").is_file()


@needs(TEXT_ENCODER)
@pytest.mark.slow
def test_saved_text_encoder_ranks_sentences_and_ignores_padding(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    text_encoder.save(path)
    with path.open("rb") as file:
        program = torch.export.load(file)
    sentences = ["A cat sits on the mat.", "A kitten is sitting on a rug, somewhere in the house.", "Stocks fell."]
    feeds = text_encoder.tokenize(tmp_path / "tokenizer.json", sentences)
    with torch.no_grad():
        together = program.module()(*(torch.from_numpy(value) for value in feeds.values()))["sentence_embedding"]
        single = text_encoder.tokenize(tmp_path / "tokenizer.json", sentences[2:])
        alone = program.module()(*(torch.from_numpy(value) for value in single.values()))["sentence_embedding"]
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(together[2:], alone, atol=1e-5, rtol=1e-4)
    similarity = together @ together.T
    assert similarity[0, 1] > 0.5
    assert similarity[0, 2] < 0.3


@needs(SKIMAGE_PHOTOS)
def test_photos_are_readable(tmp_path: Path) -> None:
    for path in photos.write_photos(tmp_path):
        with Image.open(path) as image:
            assert min(image.size) >= 300
