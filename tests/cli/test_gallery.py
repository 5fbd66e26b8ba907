"""``tokcc gallery``: what each method keeps of a photo, on a tiny model; and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from tests.cli.tiny_vit import PATCH, SIDE, build, pixels
from tokcc import pipeline
from tokcc.backends import atomic
from tokcc.cli import app, gallery
from tokcc.passes.methods import library

HERE = Path(__file__)
TINY = f"{HERE.with_name('tiny_vit.py')}:model"
ALONE = f"{HERE}:one_photo_at_a_time"
PATCHES = SIDE * SIDE
POLICY = """version: 1
name: nine-longest
steps:
  - node: prune
    at: {layers: [0]}
    score: {kind: norm}
    budget: {tokens: 9}
"""


def one_photo_at_a_time() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A model whose batch is fixed at one."""
    return build(), (pixels(1),)


def run(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["gallery", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.stderr
    assert "Traceback" not in result.output
    return result


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "noise.png"
    values = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


@pytest.fixture(scope="module")
def whole(photo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A page with the whole library, and what ``--json`` says of it."""
    out = tmp_path_factory.mktemp("gallery") / "new" / "page.html"
    return out, json.loads(run(TINY, "--image", photo, "-o", out, "--json").stdout)


class TestWholeLibrary:
    def test_every_preset_is_shown_or_refused_with_a_reason(self, whole: tuple[Path, dict[str, Any]]) -> None:
        _, said = whole
        shown = [row["preset"] for row in said["presets"]]
        refused = {row["preset"]: row["why"] for row in said["refused"]}
        assert sorted([*shown, *refused]) == sorted(library())
        assert all(refused.values())
        assert {"tome", "evit", "random"} <= set(shown)
        assert "key-value cache" in refused["h2o"]
        assert "decoder's prompt" in refused["fastv"]
        assert "`text`" in refused["cdpruner"]
        assert "no weights are given" in refused["idpruner"]

    def test_counts_are_of_patches_and_fall(self, whole: tuple[Path, dict[str, Any]]) -> None:
        for row in whole[1]["presets"]:
            counts = [stage["kept"] for stage in row["reductions"]]
            assert row["total"] == PATCHES
            assert counts == sorted(counts, reverse=True)
            assert row["kept"] == counts[-1] < PATCHES

    def test_the_page_names_all_and_loads_nothing(self, whole: tuple[Path, dict[str, Any]]) -> None:
        out, said = whole
        page = out.read_text(encoding="utf-8")
        assert page.count("data:image/jpeg;base64,") == 1 + len(said["presets"])
        assert all(name in page for name in library())
        for row in said["presets"]:
            assert f"{row['kept']} of {row['total']} tokens" in page
        assert "http" not in page.replace("http-equiv", "")
        assert [path.name for path in out.parent.iterdir()] == ["page.html"]


class TestNamed:
    def test_a_preset_a_policy_file_and_one_that_does_not_fit(self, photo: Path, tmp_path: Path) -> None:
        policy, out = tmp_path / "mine.yaml", tmp_path / "page.png"
        policy.write_text(POLICY, encoding="utf-8")
        done = run(TINY, "-i", photo, "-p", "evit", "-p", policy, "-p", "h2o", "-o", out, "--json")
        said = json.loads(done.stdout)
        assert [row["preset"] for row in said["presets"]] == ["evit", "nine-longest"]
        assert said["presets"][1]["kept"] == 9
        assert [row["preset"] for row in said["refused"]] == ["h2o"]
        with Image.open(out) as picture:
            assert picture.format == "PNG"
            assert picture.width > picture.height

    def test_the_patches_in_the_picture_are_those_of_the_rule(self, photo: Path, tmp_path: Path) -> None:
        policy = tmp_path / "mine.yaml"
        policy.write_text(POLICY, encoding="utf-8")
        made = pipeline.gallery(TINY, photo, presets=[str(policy)])
        side = SIDE * PATCH
        assert made.pixels.shape == (side, side, 3)
        model = build()
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        scaled = (torch.from_numpy(made.pixels).float() / 255 - mean) / std
        seen: list[torch.Tensor] = []
        model.blocks[0].norm2.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
        with torch.no_grad():
            model(scaled.permute(2, 0, 1)[None])
        longest = seen[0][0, 1:].norm(dim=-1).topk(9).indices
        alive, groups = made.pictures[0].last.patches(0)
        assert groups is None
        assert set(np.flatnonzero(alive).tolist()) == set(longest.tolist())

    def test_the_table_and_quiet(self, photo: Path, tmp_path: Path) -> None:
        out = tmp_path / "page.html"
        said = run(TINY, "-i", photo, "-p", "tome", "-p", "h2o", "-o", out, "-v").stdout
        assert "Token Merging (ToMe)" in said
        assert "h2o: the model has no key-value cache" in said
        assert run(TINY, "-i", photo, "-p", "tome", "-o", out, "-q").stdout.strip() == str(out)

    def test_a_fixed_batch_of_one_keeps_the_same(self, photo: Path, tmp_path: Path) -> None:
        said = [
            json.loads(run(model, "-i", photo, "-p", "evit", "-o", tmp_path / "page.html", "--json").stdout)["presets"]
            for model in (TINY, ALONE)
        ]
        assert said[0] == said[1]


class TestRefused:
    @pytest.mark.parametrize(
        ("arguments", "code", "words"),
        [
            (["--image", "missing.jpg", TINY], 2, "there is no image `missing.jpg`"),
            (["--image", ".", TINY], 2, "a folder"),
            (["--image", "words.jpg", TINY], 2, "cannot read the image words.jpg"),
            (["--image", "photo.png", TINY, "-p", "tomme"], 2, "did you mean `tome`?"),
            (["--image", "photo.png", TINY, "-p", "missing.yaml"], 2, "there is no policy file `missing.yaml`"),
            (["--image", "photo.png", TINY, "-o", "page.gif"], 2, ".html or .png"),
            (["--image", "photo.png", TINY, "-o", "folder.html"], 2, "is a folder"),
            (["--image", "photo.png", "missing.pt"], 3, "missing.pt"),
            (["--image", "photo.png", TINY, "-p", "h2o"], 4, "no key-value cache"),
            ([TINY], 2, "--image"),
        ],
    )
    def test_with_its_code_and_nothing_is_written(
        self,
        arguments: list[str],
        code: int,
        words: str,
        photo: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("words.jpg").write_text("not a picture", encoding="utf-8")
        Path("folder.html").mkdir()
        shutil.copy(photo, "photo.png")
        before = sorted(tmp_path.rglob("*"))
        assert words in run(*arguments, code=code).stderr
        assert sorted(tmp_path.rglob("*")) == before

    def test_a_preset_that_removes_nothing(self, photo: Path, tmp_path: Path) -> None:
        policy = tmp_path / "all.yaml"
        policy.write_text(POLICY.replace("tokens: 9", "keep: 1.0"), encoding="utf-8")
        failed = run(TINY, "-i", photo, "-p", policy, "-o", tmp_path / "page.html", code=4)
        assert "removes nothing" in failed.stderr

    def test_without_a_model_outside_of_a_checkout(
        self, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gallery, "_EXAMPLE", Path("examples", "nothing_here.py"))
        failed = run("-i", photo, "-o", tmp_path / "page.html", code=2)
        assert "MODEL is missing" in failed.stderr
        assert "tokcc gallery model.pt --image photo.jpg" in failed.stderr

    def test_a_failed_write_leaves_the_earlier_page(
        self, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "page.html"
        out.write_text("earlier", encoding="utf-8")

        def full(self: Path, content: bytes) -> int:
            with self.open("wb") as file:
                file.write(content[:10])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(atomic.Path, "write_bytes", full)
        failed = run(TINY, "-i", photo, "-p", "tome", "-o", out, code=5)
        assert "No space left on device" in failed.stderr
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"page.html": "earlier"}


def test_the_model_of_a_checkout_is_that_of_the_demo() -> None:
    name, factory = gallery._example().rsplit(":", 1)
    assert f"def {factory}(" in Path(name).read_text(encoding="utf-8")
