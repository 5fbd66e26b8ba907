"""Our composition of ATP-LLaVA: a grid, and attention from the image and the text."""

from __future__ import annotations

from pathlib import Path

from tests.prompt.engine import compare, visual_policy
from tests.prompt.models import IMAGE
from tests.prompt.oracle import Cut, Rule, Seen
from tests.prompt.rules import behind, best

LAYERS, KEPT = (0, 2), (11, 6)
WIDTH, STRIDE = 4, 2


def rule(kept: int) -> Rule:
    def cut(seen: Seen) -> list[int]:
        probs, image = seen.probs[seen.layer].mean(0), seen.visual(IMAGE)
        scores = probs[behind(seen)].mean(0) / 2
        for place, j in enumerate(image):
            scores[j] += probs[image, j].sum() / (len(image) - place) / 2
        every = [j for j in range(len(seen.ids)) if int(seen.ids[j]) == IMAGE]
        grid = {j for place, j in enumerate(every) if place // WIDTH % STRIDE == 0 and place % WIDTH % STRIDE == 0}
        others = best(scores, [j for j in image if j not in grid], kept - len(grid))
        return [j for j in seen.alive if int(seen.ids[j]) != IMAGE or j in grid or j in others]

    return cut


def test_equals_the_formula(tmp_path: Path) -> None:
    step = {"preset": "atp-llava", "layers": list(LAYERS), "tokens": list(KEPT), "width": WIDTH, "stride": STRIDE}
    cuts = [Cut(layer, rule(kept)) for layer, kept in zip(LAYERS, KEPT, strict=True)]
    compare("llama", visual_policy(step), lambda: cuts, tmp_path)
