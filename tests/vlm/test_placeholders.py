"""How many placeholders a prompt has, where its tokens stand, how tiles are packed: against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_processing_utils import select_best_resolution

from tests.vlm import processors
from tests.vlm.families import FAMILIES, IMAGE, model_of
from tokcc.backends.manifest import FieldEntry
from tokcc.backends.packing import best_resolution, packed
from tokcc.backends.placeholders import Chunk, expand, grid_positions
from tokcc.backends.runtime_files import edit_fields
from tokcc.capture.vlm.families import families
from tokcc.errors import UsageError


class TestStockProcessors:
    """With the fields that a compile writes, the processor itself gives the wanted number."""

    @pytest.mark.parametrize("count", [1, 3, 20])
    @pytest.mark.parametrize(
        ("name", "stock", "text", "units"),
        [
            ("llava", 16, "w3 <image> w4", 1),
            ("gemma3", 4, "w3 <start> w4", 1),
            ("idefics3", 4, "w3 <image> w4", 5),  # 2 x 2 tiles and the whole
        ],
    )
    def test_it_writes_that_many(
        self, name: str, stock: int, text: str, units: int, count: int, tmp_path: Path
    ) -> None:
        made = getattr(processors, name)()
        assert written(made, text) == stock * units
        made.save_pretrained(tmp_path)
        found = families()[name].placeholders(FAMILIES[name].config(), stock, count)
        assert found.refusal is None
        edit_fields(tmp_path, [FieldEntry(file=e.file, field=e.field, value=e.value) for e in found.edits])
        assert written(type(made).from_pretrained(tmp_path), text) == count * units

    def test_transformers_js_counts_otherwise(self) -> None:
        """(h / patch) (w / patch) + additional tokens, whatever the strategy."""
        found = families()["llava"].placeholders(FAMILIES["llava"].config(), 16, 5)
        fields = {edit.field: int(edit.value) for edit in found.javascript}
        assert (32 // fields["patch_size"]) ** 2 + fields["num_additional_image_tokens"] == 5

    @pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "llava_next", "qwen2_audio"])
    def test_those_that_count_from_the_image_are_refused(self, name: str) -> None:
        found = families()[name].placeholders(None, 16, 5)
        assert found.refusal is not None
        assert found.edits == ()

    def test_a_file_that_was_not_there(self, tmp_path: Path) -> None:
        edit_fields(tmp_path, [FieldEntry(file="processor_config.json", field="image_seq_len", value=5)])
        assert json.loads((tmp_path / "processor_config.json").read_text()) == {"image_seq_len": 5}


def written(processor: Any, text: str) -> int:
    image = Image.new("RGB", (40, 40), (10, 200, 30))
    ids = processor(images=[image], text=[text], return_tensors="np")["input_ids"]
    return int((np.asarray(ids) == IMAGE).sum())


class TestExpand:
    # Two tiles of one image, and one of another; 6 tokens each as the model was made, 2 now.
    CHUNKS = (Chunk(6, 2, last=False), Chunk(6, 2), Chunk(6, 2))

    @pytest.mark.parametrize(
        ("prompt", "wanted"),
        [
            ("aIbI", "aIIIIbII"),  # one for each image
            ("aIbIcI", "aIIbIIcII"),  # one for each tile
            ("aIIIIIIbIIIIIIcIIIIIId", "aIIbIIcIId"),  # as the processor of the model writes them
            ("aIIIIIIIIIIIIcIIIIII", "aIIIIcII"),  # tiles side by side
            ("aIIIIcII", "aIIIIcII"),  # as they are wanted
        ],
    )
    def test_forms(self, prompt: str, wanted: str) -> None:
        ids = [IMAGE if letter == "I" else ord(letter) for letter in prompt]
        got = expand(ids, IMAGE, self.CHUNKS)
        assert "".join("I" if token == IMAGE else chr(token) for token in got) == wanted

    @pytest.mark.parametrize("count", [0, 1, 4, 17])
    def test_what_fits_nothing(self, count: int) -> None:
        with pytest.raises(UsageError, match="do not fit") as caught:
            expand([7, *[IMAGE] * count], IMAGE, self.CHUNKS)
        assert "2 (one for each image), 18 (as the model's processor writes them) or 6" in str(caught.value)

    def test_no_images(self) -> None:
        assert expand([7, 8], IMAGE, ()) == [7, 8]


class TestGridPositions:
    GRID = (1, 3, 2)

    @pytest.mark.parametrize("words", ["ab", "aIb", "Ia", "aIbIc"])
    def test_as_transformers_counts(self, words: str) -> None:
        model = model_of("qwen2-vl").model
        prompt = [token for letter in words for token in ([IMAGE] * 6 if letter == "I" else [ord(letter) % 80 + 3])]
        images = words.count("I")
        ids = torch.tensor([prompt])
        grids = torch.tensor([[1, 6, 4]] * images) if images else None
        wanted, _ = model.get_rope_index(ids, (ids == IMAGE).int(), image_grid_thw=grids)
        got = grid_positions(prompt, IMAGE, [Chunk(6, 6, self.GRID)] * images)
        assert got.tolist() == wanted[:, 0].tolist()

    def test_kept_tokens_keep_their_place(self) -> None:
        whole = grid_positions([5, *[IMAGE] * 6, 7, 8], IMAGE, [Chunk(6, 6, self.GRID)])
        kept = np.array([0, 3, 5])
        got = grid_positions([5, *[IMAGE] * 3, 7, 8], IMAGE, [Chunk(6, 3, self.GRID, kept)])
        assert got.tolist() == whole[:, [0, 1, 4, 6, 7, 8]].tolist()


class TestPacking:
    PINPOINTS = ((32, 64), (64, 32), (64, 64), (32, 96))

    def test_the_resolution_that_transformers_chooses(self) -> None:
        random = np.random.default_rng(0)
        for size in random.integers(1, 300, (200, 2)).tolist():
            assert best_resolution(tuple(size), self.PINPOINTS) == select_best_resolution(size, list(self.PINPOINTS))

    @pytest.mark.parametrize("size", [(32, 48), (50, 30), (64, 64), (20, 90), (10, 300), (31, 33)])
    def test_as_transformers_packs(self, size: tuple[int, int]) -> None:
        model = model_of("llava-next").model
        pinpoints = tuple(tuple(row) for row in model.config.image_grid_pinpoints)
        height, width = best_resolution(size, pinpoints)
        features = torch.randn(1 + (height // 32) * (width // 32), 16, 8, generator=torch.Generator().manual_seed(0))
        end = torch.arange(8.0)
        (wanted,), _ = model.pack_image_features([features], torch.tensor([size]), "default", image_newline=end)
        got = packed(features.numpy(), size, pinpoints, 32, end.numpy())
        np.testing.assert_array_equal(got, wanted.numpy())

    def test_one_tile(self) -> None:
        got = packed(np.ones((1, 4, 2)), None, self.PINPOINTS, 32, np.zeros(2))
        assert got.tolist() == [[1, 1]] * 4 + [[0, 0]]

    def test_wrong_numbers_of_tiles(self) -> None:
        with pytest.raises(UsageError, match="cut in another way"):
            packed(np.ones((3, 4, 2)), (64, 64), self.PINPOINTS, 32, None)
        with pytest.raises(UsageError, match="size is not known"):
            packed(np.ones((3, 4, 2)), None, self.PINPOINTS, 32, None)
