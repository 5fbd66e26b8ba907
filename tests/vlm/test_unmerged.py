"""Tokens that the tower merges and the language model attends to one by one: LLaVA, from pictures to text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.prompt.test_dymu_llm import run
from tests.vlm.bundles import PROMPTS, compiled, given_for, pictures
from tests.vlm.families import IMAGE, Given
from tests.vlm.test_reduced import language_model, written_out
from tokcc.backends.bundle import Bundle
from tokcc.backends.vlm import VisionLanguage
from tokcc.errors import PlanError, UsageError

STOCK, NEW = 16, 6
POLICY = {
    "version": 1,
    "name": "dymu",
    "steps": [{"preset": "dymu", "r": 2, "thresholds": [0.6]}, {"preset": "dymu-llm"}],
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return compiled("llava", tmp_path_factory.mktemp("unmerged") / "out", POLICY)


@pytest.fixture(scope="module")
def engines(bundle: Bundle) -> VisionLanguage:
    return VisionLanguage(bundle)


def merged(bundle: Bundle, own: Given) -> tuple[Tensor, list[int]]:
    """What the tower left of one picture ``[K, H]``, and which of it each token became."""
    found = bundle.part("vision_encoder").run({"pixel_values": own.units.numpy()})
    assign = found["image_features.token_assign"][0].tolist()
    assert len(assign) == STOCK
    filled = found["image_features.token_valid"][0].nonzero()[0].tolist()
    assert sorted(set(assign)) == filled
    return torch.from_numpy(found["image_features"][0][filled]), [filled.index(slot) for slot in assign]


def shared(bundle: Bundle, words: list[int], given: list[Given]) -> tuple[Tensor, list[int]]:
    """A prompt's rows ``[U, H]``, one feature after the other where a picture is, and the row of each token."""
    table: Any = language_model(torch.zeros(0, 32)).get_input_embeddings()
    parts, rows, left = [], [], iter(given)
    for word in words:
        start = sum(map(len, parts))
        if word == IMAGE:
            features, assign = merged(bundle, next(left))
            parts.append(features)
            rows += [start + slot for slot in assign]
        else:
            parts.append(table(torch.tensor([word])).detach())
            rows.append(start)
    return torch.cat(parts), rows


def test_the_map_names_the_features_that_patches_became(tmp_path: Path) -> None:
    """One merge of the tower's last tokens, the class token among them: means of the patches that transformers has."""
    merge: dict[str, Any] = {
        "node": "merge", "at": {"site": "encoder_output", "layers": [-1]}, "budget": {"remove": 6},
        "select": {"kind": "bipartite", "of": "features"}, "reduce": {"kind": "weighted_mean"}, "protect": {"first": 1},
    }  # fmt: skip
    bundle = compiled("llava", tmp_path / "out", {"version": 1, "steps": [merge], "outputs": {"*": "reduced"}})
    pixels = given_for("llava")[0][0].units
    found = bundle.part("vision_encoder").run({"pixel_values": pixels.numpy()})
    assign = found["image_features.token_assign"][0]
    assert len(set(assign.tolist())) == STOCK - 6
    model = written_out()
    with torch.no_grad():
        seen = model.model.vision_tower(pixels, output_hidden_states=True)
        patches = seen.hidden_states[model.config.vision_feature_layer][0, 1:]
        means = torch.stack([patches[assign == slot].mean(0) for slot in range(STOCK - 6)])
        wanted = model.model.multi_modal_projector(means[None])[0].numpy()
    np.testing.assert_allclose(found["image_features"][0], wanted, rtol=0, atol=2e-4 * float(np.abs(wanted).max()))


def test_pictures_leave_different_numbers_of_rows(bundle: Bundle, engines: VisionLanguage) -> None:
    media = bundle.manifest.media
    assert media is not None
    assert (media.stock_tokens, media.assign, media.edits) == (STOCK, "image_features.token_assign", ())
    assert media.tokens < STOCK
    given = given_for("llava")
    rows, made = engines.prepare(PROMPTS, [pictures(row) for row in given])
    assert [row.count(IMAGE) for row in rows] == [STOCK, 2 * STOCK, 0]
    counts = [len(set(merged(bundle, own)[1])) for row in given for own in row]
    assert len(set(counts)) > 1
    assert made.embeds.shape[1] == max(4 + counts[0], 3 + counts[1] + counts[2], 3)
    assert made.beside["token_assign"].shape == (3, max(map(len, rows)))
    for row, (words, own) in enumerate(zip(PROMPTS, given, strict=True)):
        embeds, read = shared(bundle, words, own)
        got = made.embeds[row][made.beside["token_assign"][row, -len(read) :]]
        np.testing.assert_allclose(got, embeds[read].numpy(), rtol=0, atol=1e-6)


def test_a_batch_says_what_the_formula_says_of_each_row(bundle: Bundle, engines: VisionLanguage) -> None:
    """One picture, two, and none: the tokens of a padded batch, and the logits that chose them."""
    given = given_for("llava")
    steps = engines.stream(PROMPTS, [pictures(row) for row in given], max_new_tokens=NEW, stop=())
    made = list(zip(*steps, strict=True))
    longest = len(PROMPTS[1]) - 2 + 2 * STOCK
    assert {v.shape[2] for k, v in steps._past.items() if k.endswith(".key")} == {longest + NEW - 1}
    model = language_model(torch.zeros(0, 32))
    for words, own, got in zip(PROMPTS, given, made, strict=True):
        embeds, rows = shared(bundle, words, own)
        following = model.get_input_embeddings()(torch.tensor(got)).detach()  # type: ignore[operator]
        whole = torch.cat([embeds, following])
        logits = run(model, whole, [*rows, *range(len(embeds), len(whole))])[len(rows) - 1 : -1]
        assert tuple(logits.argmax(-1).tolist()) == got
        assert engines.generate([words], [pictures(own)], max_new_tokens=NEW, stop=()) == [list(got)]


def test_prompts_keep_all_placeholders(engines: VisionLanguage) -> None:
    given = pictures(given_for("llava")[0])
    made = [engines.prepare([[1, *[IMAGE] * count, 4]], [given])[0] for count in (1, STOCK)]
    assert made[0] == made[1] == [[1, *[IMAGE] * STOCK, 4]]
    with pytest.raises(UsageError, match="do not fit"):
        engines.prepare([[1, *[IMAGE] * 5, 4]], [given])


def test_an_encoder_cannot_unmerge(tmp_path: Path) -> None:
    step = {"preset": "dymu-llm", "at": {"part": "encoder"}}
    with pytest.raises(PlanError, match="no key-value cache") as error:
        compiled("llava", tmp_path / "out", {"version": 1, "steps": [step]})
    assert error.value.help


@pytest.mark.slow
def test_tiles_that_lie_side_by_side_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="side by side"):
        compiled("llava-next", tmp_path / "out", POLICY)
