"""FastV in a vision-language model: the encoder as it is, image tokens dropped inside the decoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.prompt.oracle import Cut, Rule, Seen, run
from tests.prompt.rules import best
from tests.vlm.bundles import NEW, compiled, pictures
from tests.vlm.families import FAMILIES, IMAGE, VOCABULARY
from tests.vlm.test_reduced import language_model, written_out
from tokcc.backends.vlm import VisionLanguage
from tokcc.errors import LoweringError

COUNT, KEPT = 16, 6
POLICY = {
    "version": 1,
    "name": "fastv",
    "steps": [{"preset": "fastv", "layer": 0, "budget": {"tokens": KEPT}}],
    "segments": {"image": {"input_ids": IMAGE, "tokens": COUNT}},
}


def features(pixels: Tensor) -> Tensor:
    model = written_out()
    with torch.no_grad():
        seen = model.model.vision_tower(pixels, output_hidden_states=True)
        rows: Tensor = model.model.multi_modal_projector(seen.hidden_states[model.config.vision_feature_layer][:, 1:])
    return rows[0]


def rule(seen: Seen) -> list[int]:
    row = seen.probs[seen.layer][:, -1].mean(0)
    image = [j for j in seen.alive if int(seen.ids[j]) >= VOCABULARY]
    return sorted(set(seen.alive) - set(image) | set(best(row, image, KEPT)))


def greedy(model: nn.Module, prompt: list[int], cut: Rule) -> list[int]:
    ids = list(prompt)
    for _ in range(NEW):
        ids.append(int(run(model, torch.tensor(ids), len(prompt), [Cut(0, cut)]).logits[-1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.slow
def test_generates_what_the_model_does_with_hidden_keys(tmp_path: Path) -> None:
    engines = VisionLanguage(compiled("llava", tmp_path / "out", POLICY))
    given = [FAMILIES["llava"].picture(i) for i in range(2)]
    prompts = [[1, 5, IMAGE, 7, 8], [IMAGE, 12, 4]]
    made = engines.generate(prompts, [pictures([item]) for item in given], max_new_tokens=NEW, stop=())
    for words, item, got in zip(prompts, given, made, strict=True):
        rows = features(item.units)
        assert len(rows) == COUNT
        own = [i for word in words for i in (range(VOCABULARY, VOCABULARY + COUNT) if word == IMAGE else [word])]
        assert got == greedy(language_model(rows), own, rule)
    with pytest.raises(LoweringError, match="image tokens that the policy takes some of"):
        engines.generate([[1, 9, 3, 4]], [[]], max_new_tokens=2)
