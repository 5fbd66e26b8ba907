"""MustDrop in the language model: what is below both thresholds is below 1 in the score, and goes first."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.prompt.engine import PROMPT, TOKENS, build, compare, visual_policy
from tests.prompt.models import IMAGE, model_of, prompts
from tests.prompt.oracle import Cut, Rule, Seen, run
from tests.prompt.rules import behind, keep

SHARE, MOST = 0.05, 0.2
LAYERS, KEPT = (0, 1, 2), (10, 7, 4)


def test_key_tokens_stay(tmp_path: Path) -> None:
    step = {"preset": "mustdrop-llm", "layers": [1], "keys": True, "budget": {"tokens": 3}, "positions": "keep"}
    engine = build("llama", visual_policy(step), tmp_path)
    ids, mask = prompts((0,), PROMPT, PROMPT + 2, TOKENS)
    image = [j for j in range(PROMPT) if int(ids[0, j]) == IMAGE]
    keys = [image[5], image[9], image[15]]
    given = np.zeros((1, PROMPT), np.int64)
    given[0, keys] = 1
    logits, _ = engine.run(ids, mask, (PROMPT, 1, 1), {0: {"key_tokens": given}})
    text = [j for j in range(PROMPT) if j not in image]
    alone = run(model_of("llama"), ids[0], PROMPT, [Cut(1, lambda seen: sorted(text + keys))]).logits.numpy()
    np.testing.assert_allclose(logits[0], alone, rtol=0, atol=2e-4 * np.abs(alone).max())


def rule(kept: int) -> Rule:
    def cut(seen: Seen) -> list[int]:
        rows = seen.probs[seen.layer][:, behind(seen)].mean(0)  # [T, N]
        image = seen.visual(IMAGE)
        total = rows[:, image].sum()
        below = {j for j in image if rows[:, j].sum() < SHARE * total and rows[:, j].max() < MOST}
        scores = (rows.sum(0) / (SHARE * total)).maximum(rows.max(0).values / MOST)
        assert below == {j for j in image if scores[j] < 1}
        return keep(seen, scores, kept)

    return cut


def test_equals_the_formula(tmp_path: Path) -> None:
    step = {
        "preset": "mustdrop-llm",
        "layers": list(LAYERS),
        "share": SHARE,
        "most": MOST,
        "budget": {"schedule": list(KEPT)},
    }
    cuts = [Cut(layer, rule(kept)) for layer, kept in zip(LAYERS, KEPT, strict=True)]
    compare("llama", visual_policy(step), lambda: cuts, tmp_path, compact=True)
