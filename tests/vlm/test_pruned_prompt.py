"""Image tokens that go inside the language model: FastV in the decoder part, fed by the own loop."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.prompt.oracle import Cut, Seen, run
from tests.vlm.bundles import compiled, given_for, pictures, theirs
from tests.vlm.families import IMAGE, VOCABULARY, Given, model_of
from tests.vlm.test_reduced import language_model, written_out
from tokcc.backends.vlm import VisionLanguage

TOKENS, NEW = 16, 6
POLICY = {
    "version": 1,
    "name": "fastv",
    "steps": [{"preset": "fastv", "layer": 0}],
    "segments": {"image": {"input_ids": IMAGE, "tokens": TOKENS}},
}
PROMPTS = [[1, 5, IMAGE, 7, 8], [1, 9, 3, IMAGE, 12, 4]]


def _halved(seen: Seen) -> list[int]:
    """FastV: half of the image stays, what the last token attends to most."""
    score = seen.probs[0][:, -1].mean(0)
    image = [j for j in seen.alive if int(seen.ids[j]) >= VOCABULARY]
    gone = sorted(image, key=lambda j: (-float(score[j]), j))[len(image) // 2 :]
    return [j for j in seen.alive if j not in gone]


def rows_of(words: list[int], own: Given) -> torch.Tensor:
    """The features that transformers puts into a prompt."""
    found: dict[str, torch.Tensor] = {}
    model = model_of("llava")
    hook = model.get_decoder().register_forward_pre_hook(lambda _, __, kwargs: found.update(kwargs), with_kwargs=True)
    try:
        inputs = theirs("llava", words, [own])
        with torch.no_grad():
            model(**inputs)
    finally:
        hook.remove()
    return found["inputs_embeds"][0][inputs["input_ids"][0] == IMAGE]


def test_half_of_the_image_goes(tmp_path: Path) -> None:
    bundle = compiled("llava", tmp_path / "out", POLICY)
    media = bundle.manifest.media
    assert media is not None
    assert (media.tokens, media.masks) == (TOKENS, ("image_mask",))
    engines = VisionLanguage(bundle)
    given = [row[0] for row in given_for("llava")[:2]]
    steps = engines.stream(PROMPTS, [pictures([own]) for own in given], max_new_tokens=NEW, stop=())
    made = list(zip(*steps, strict=True))
    lengths = [value.shape[2] for name, value in sorted(steps._past.items()) if name.endswith(".key")]
    assert lengths[0] - lengths[1] == TOKENS // 2
    for words, own, got in zip(PROMPTS, given, made, strict=True):
        rows = rows_of(words, own)
        prompt = [j for word in words for j in (range(VOCABULARY, VOCABULARY + TOKENS) if word == IMAGE else [word])]
        alone = run(language_model(rows), torch.tensor([*prompt, *got]), len(prompt), [Cut(0, _halved)])
        assert tuple(alone.logits[len(prompt) - 1 : -1].argmax(-1).tolist()) == got


KEYS = 4
MARKED = {
    "version": 1,
    "name": "marked",
    "steps": [
        {
            "node": "prune", "at": {"layers": [-1], "site": "block_output"},
            "score": {"kind": "attention_rows", "rows": "cls"}, "select": {"kind": "topk"},
            "reduce": {"kind": "mark", "name": "key_tokens"}, "budget": {"tokens": KEYS},
        },
        {"preset": "mustdrop-llm", "layers": [0], "keys": True, "budget": {"tokens": KEYS}, "positions": "keep"},
    ],
    "segments": {"image": {"input_ids": IMAGE, "tokens": TOKENS}},
}  # fmt: skip


def _keys(pixels: torch.Tensor) -> list[int]:
    """The patches that the class token attends to most, in the layer whose output is taken."""
    model = written_out()
    with torch.no_grad():
        seen = model.model.vision_tower(pixels, output_hidden_states=True, output_attentions=True)
    received = seen.attentions[model.config.vision_feature_layer][0, :, 0, 1:].mean(0)
    return sorted(range(len(received)), key=lambda j: (-float(received[j]), j))[:KEYS]


def test_the_encoder_tells_the_decoder_what_stays(tmp_path: Path) -> None:
    """A step in the tower marks tokens, and one in the language model leaves no others of the image."""
    engines = VisionLanguage(compiled("llava", tmp_path / "out", MARKED))
    given = [row[0] for row in given_for("llava")[:2]]
    rows, media = engines.prepare(PROMPTS, [pictures([own]) for own in given])
    longest = max(map(len, rows))
    for number, (row, own) in enumerate(zip(rows, given, strict=True)):
        first = longest - len(row) + row.index(IMAGE)
        wanted = sorted(first + j for j in _keys(own.units))
        assert media.beside["key_tokens"][number].nonzero()[0].tolist() == wanted
    made = list(zip(*engines.stream(PROMPTS, [pictures([o]) for o in given], max_new_tokens=NEW, stop=()), strict=True))
    for words, own, got in zip(PROMPTS, given, made, strict=True):
        prompt = [j for word in words for j in (range(VOCABULARY, VOCABULARY + TOKENS) if word == IMAGE else [word])]
        keys = {words.index(IMAGE) + j for j in _keys(own.units)}

        def stays(seen: Seen, keys: set[int] = keys) -> list[int]:
            return [j for j in seen.alive if int(seen.ids[j]) < VOCABULARY or j in keys]

        ids = torch.tensor([*prompt, *got])
        alone = run(language_model(rows_of(words, own)), ids, len(prompt), [Cut(0, stays)])
        assert tuple(alone.logits[len(prompt) - 1 : -1].argmax(-1).tolist()) == got
