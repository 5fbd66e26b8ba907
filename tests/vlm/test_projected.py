"""Fewer tokens behind a projector that regroups them: every family against transformers on rows chosen by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.vlm.bundles import PROMPTS, compiled, given_for, pictures, theirs
from tests.vlm.families import IMAGE, Given, model_of
from tokcc.backends.vlm import VisionLanguage
from tokcc.config import load_policy
from tokcc.errors import PlanError, TokccError
from tokcc.passes.methods import library

KEPT, NEW = 2, 6
STEP: dict[str, Any] = {
    "node": "prune",
    "at": {"site": "projector_output"},
    "score": {"kind": "norm", "of": "features"},
    "budget": {"tokens": KEPT},
}
POLICY = {"version": 1, "name": "norms", "steps": [STEP], "outputs": {"*": "reduced"}}


def whole_prompt(family: str, words: list[int], given: list[Given]) -> tuple[Tensor, Tensor, list[int]]:
    """What transformers' language model reads: embeddings ``[S, H]``, positions ``[1 or 3, S]``, and the ids."""
    model = model_of(family)
    inputs = theirs(family, words, given)
    seen: dict[str, Any] = {}
    hook = model.get_decoder().register_forward_pre_hook(lambda _, __, kwargs: seen.update(kwargs), with_kwargs=True)
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        hook.remove()
    ids = inputs["input_ids"][0].tolist()
    places = torch.arange(len(ids))[None]
    if hasattr(model.model, "get_rope_index"):
        kinds = (inputs["input_ids"] == IMAGE).int()
        places = model.model.get_rope_index(inputs["input_ids"], kinds, inputs.get("image_grid_thw"))[0][:, 0]
    return seen["inputs_embeds"][0], places, ids


def chosen(embeds: Tensor, ids: list[int], units: int) -> list[int]:
    """The places that stay: all text, and of each unit the rows with the largest norms."""
    images = [place for place, token in enumerate(ids) if token == IMAGE]
    kept = [place for place, token in enumerate(ids) if token != IMAGE]
    size = len(images) // units if units else 0
    for unit in range(units):
        own = images[unit * size : (unit + 1) * size]
        kept += sorted(own, key=lambda place: (-float(embeds[place].norm()), place))[:KEPT]
    return sorted(kept)


def greedy(family: str, embeds: Tensor, places: Tensor) -> list[int]:
    """Decode without a cache, each step from the beginning."""
    model: Any = model_of(family)
    made: list[int] = []
    for _ in range(NEW):
        positions = places[:, None] if len(places) > 1 else places
        with torch.no_grad():
            hidden = model.get_decoder()(inputs_embeds=embeds[None], position_ids=positions, use_cache=False)[0]
            made.append(int(model.lm_head(hidden[0, -1]).argmax()))
            row = model.get_input_embeddings()(torch.tensor(made[-1:]))
        embeds = torch.cat([embeds, row])
        places = torch.cat([places, torch.full((len(places), 1), int(places.max()) + 1)], 1)
    return made


@pytest.mark.parametrize(
    "family",
    ["internvl", "idefics3", "gemma3", "qwen2-vl", "qwen2.5-vl", pytest.param("llava", marks=pytest.mark.slow)],
)
def test_the_rows_with_the_largest_norms(family: str, tmp_path: Any) -> None:
    bundle = compiled(family, tmp_path / "out", POLICY)
    media = bundle.manifest.media
    assert media is not None
    assert media.tokens == KEPT
    assert (media.refusal is None) == (family in ("internvl", "idefics3", "gemma3", "llava"))
    engines = VisionLanguage(bundle)
    given = given_for(family)
    rows, made = engines.prepare(PROMPTS, [pictures(row) for row in given])
    tokens = engines.generate(PROMPTS, [pictures(row) for row in given], max_new_tokens=NEW, stop=())
    for row, (words, own, got) in enumerate(zip(PROMPTS, given, tokens, strict=True)):
        embeds, places, ids = whole_prompt(family, words, own)
        units = sum(item.tokens for item in own) // media.stock_tokens
        kept = chosen(embeds, ids, units)
        assert rows[row].count(IMAGE) == units * KEPT
        np.testing.assert_allclose(
            made.embeds[row, made.embeds.shape[1] - len(kept) :],
            embeds[kept].numpy(),
            rtol=0,
            atol=2e-4 * float(embeds.abs().max()),
        )
        grid = len(places) > 1
        if grid:
            assert made.positions is not None
            assert made.positions[:, row, -len(kept) :].tolist() == places[:, kept].tolist()
        assert got == greedy(family, embeds[kept], places[:, kept] if grid else torch.arange(len(kept))[None])
        assert engines.generate([words], [pictures(own)], max_new_tokens=NEW, stop=()) == [got]


@pytest.mark.slow
def test_tiles_of_fewer_tokens_follow_each_other(tmp_path: Any) -> None:
    """LLaVA-NeXT: what a stock processor writes for the packed image is replaced as a whole."""
    engines = VisionLanguage(compiled("llava-next", tmp_path / "out", POLICY))
    (own,) = given_for("llava-next")[0]
    inner: Any = model_of("llava-next").model
    with torch.no_grad():
        states = inner.vision_tower(own.units, output_hidden_states=True).hidden_states[-2][:, 1:]
        rows = inner.multi_modal_projector(states)
    kept = rows.norm(dim=-1).topk(KEPT).indices.sort().values
    wanted = torch.cat([tile[places] for tile, places in zip(rows, kept, strict=True)]).numpy()
    for count in (1, own.tokens):
        prompts, made = engines.prepare([[1, *[IMAGE] * count, 7]], [pictures([own])])
        assert prompts == [[1, *[IMAGE] * (3 * KEPT), 7]]
        np.testing.assert_allclose(made.embeds[0, 1:-1], wanted, rtol=0, atol=2e-4 * float(np.abs(wanted).max()))


@pytest.mark.parametrize(
    ("family", "step", "message"),
    [
        ("internvl", {"score": {"kind": "attention_received"}}, "not those that the tower's attention is about"),
        ("internvl", {"score": {"kind": "attention_rows", "rows": "cls"}}, "reads the class token"),
        ("qwen2-audio", {}, "sounds are padded"),
        (
            "qwen2-vl",
            {"node": "merge", "score": None, "select": {"kind": "bipartite", "of": "features"}},
            "merged tokens have no frame",
        ),
    ],
)
def test_what_is_refused(family: str, step: dict[str, Any], message: str, tmp_path: Any) -> None:
    own = {key: value for key, value in {**STEP, **step}.items() if value is not None}
    with pytest.raises(TokccError, match=message):
        compiled(family, tmp_path / "out", {**POLICY, "steps": [own]})
    assert not (tmp_path / "out").exists()


def test_steps_on_both_sides_of_the_projector(tmp_path: Any) -> None:
    steps = [STEP, {"preset": "fastervlm", "tokens": 3}]
    with pytest.raises(PlanError, match="behind the projector"):
        compiled("llava", tmp_path / "out", {**POLICY, "steps": steps})
    policy = load_policy({**POLICY, "steps": [STEP]}, presets=library()).policy
    assert policy.steps[0].at.site == "projector_output"
