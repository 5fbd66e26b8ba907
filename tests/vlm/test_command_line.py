"""A model folder with a processor, through the program: compile, verify, report, run with images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests.vlm import processors
from tests.vlm.bundles import wanted_tokens
from tests.vlm.families import IMAGE, model_of
from tests.vlm.test_reduced import KEPT, kept_features
from tokcc.cli import app


def run(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(part) for part in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def as_json(*arguments: object) -> Any:
    return json.loads(run(*arguments, "--json", "--quiet").stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model_of("llava").save_pretrained(path)
    processors.llava().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "some.png"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def bundle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "out"
    policy = out.with_name("policy.yaml")
    policy.write_text(f"version: 1\nsteps: [{{preset: fastervlm, tokens: {KEPT}}}]\n")
    shown = run("compile", folder, "-p", policy, "-o", out, "--no-calibrate").stdout
    assert f"{KEPT} tokens for each image, of 16" in shown
    assert "processor_config.json: num_additional_image_tokens = 5" in shown
    return out


def test_the_bundle_brings_an_edited_processor(bundle: Path) -> None:
    content = json.loads((bundle / "processor_config.json").read_text())
    assert (content["patch_size"], content["num_additional_image_tokens"]) == (32, KEPT)
    loaded = type(processors.llava()).from_pretrained(bundle)
    picture = Image.new("RGB", (40, 48))
    made = loaded(images=[picture, picture], text=["w3 <image> w4 <image>"], return_tensors="np")
    assert int((np.asarray(made["input_ids"]) == IMAGE).sum()) == 2 * KEPT


def test_verify_and_report(bundle: Path) -> None:
    checks = as_json("verify", bundle)["parity"]["checks"]
    assert {check["engine"] for check in checks} == {
        "vision_encoder (onnx)",
        "embed_tokens (onnx)",
        "decoder (onnx)",
    }
    assert as_json("report", bundle)["media"]["tokens"] == KEPT
    assert "--part" in run("bench", bundle, code=2).output


@pytest.mark.parametrize("text", ["w3 <image> w4 w5", "w4 w5"])
def test_run_with_an_image(folder: Path, bundle: Path, image: Path, text: str) -> None:
    """The tokens of transformers' model on the kept features; without a placeholder the image comes first."""
    got = as_json("run", bundle, "--image", image, "--prompt", text, "-n", 6)["tokens"]
    made = processors.llava()(images=[Image.open(image)], text=["w3 <image> w4"], return_tensors="pt")
    rows, _ = kept_features(made["pixel_values"])
    table = model_of("llava").get_input_embeddings()
    with torch.no_grad():
        words = [rows if word == "<image>" else table(torch.tensor([int(word[1:])])) for word in
                 (text if "<image>" in text else f"<image> {text}").split()]  # fmt: skip
    embeds = torch.cat(words)[None]
    inputs = {"inputs_embeds": embeds, "attention_mask": torch.ones(embeds.shape[:2], dtype=torch.int64)}
    assert got == wanted_tokens(model_of("llava"), inputs, 6)[: len(got)]
    assert len(got) == 6 or got[-1] == 2


def test_run_without_an_image(bundle: Path) -> None:
    got = as_json("run", bundle, "w3 w4", "-n", 6)["tokens"]
    ids = torch.tensor([[3, 4]])
    wanted = wanted_tokens(model_of("llava"), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 6)
    assert got == wanted[: len(got)]


def test_what_is_refused(bundle: Path, image: Path, tmp_path: Path) -> None:
    assert "one prompt" in run("run", bundle, code=2).output
    assert "one prompt" in run("run", bundle, "w3", "--prompt", "w4", code=2).output
    (tmp_path / "text.png").write_text("nothing")
    assert "is not an image" in run("run", bundle, "w3", "--image", tmp_path / "text.png", code=2).output
    assert "is not an image" in run("run", bundle, "w3", "--image", tmp_path / "none.png", code=2).output
    assert "write `<image>` once" in run("run", bundle, "w3 <image> <image>", "--image", image, code=2).output


@pytest.mark.slow
def test_inspect(folder: Path) -> None:
    found = as_json("inspect", folder)
    assert (found["kind"], found["family"]) == ("parts", "LLaVA")
    assert list(found["parts"]) == ["vision_encoder", "decoder", "embed_tokens"]
    fits = {row["preset"] for row in found["parts"]["vision_encoder"]["presets"] if row["fits"]}
    assert "fastervlm" in fits


def test_dry_run(folder: Path) -> None:
    plan = as_json("compile", folder, "-p", "h2o", "--dry-run")
    assert [len(part["layers"]) for part in plan["parts"].values()] == [0, 0, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--task", "audio-text-to-text"), "does not do audio-text-to-text"),
        (("--gate", "cosine>=0.5"), "gates are for one engine"),
        (("--input", "input_ids=int64[2,3]"), "no input `input_ids`"),
        (("--dynamic", "pixel_values:0=1..4"), "not for models that are compiled in parts"),
    ],
)
def test_refused_options(folder: Path, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    result = CliRunner().invoke(app, ["compile", str(folder), "-p", "none", "-o", str(tmp_path / "out"), *options])
    assert result.exit_code in (2, 3)
    assert message in result.output
    assert not (tmp_path / "out").exists()
