"""VFlowOpt in the language model: the encoder's map decides, at every cut the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.prompt.engine import PADDING, PROMPT, TOKENS, build, visual_policy
from tests.prompt.models import model_of, prompts
from tests.prompt.oracle import Cut, Rule, Seen, run
from tests.prompt.rules import keep


@pytest.mark.parametrize(
    ("step", "name"),
    [
        ({"preset": "vflowopt-llm", "layers": [0, 2]}, "importance"),
        pytest.param(
            {
                "preset": "vflowopt-llm",
                "layers": [0, 2],
                "select": {"kind": "topk"},
                "score": {"kind": "given", "name": "weight"},
            },
            "weight",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_equals_the_rule(step: dict[str, object], name: str, tmp_path: Path) -> None:
    engine = build("llama", visual_policy(step), tmp_path)
    ids, mask = prompts(PADDING, PROMPT, PROMPT + 8, TOKENS)
    important = torch.randn(len(ids), PROMPT, generator=torch.Generator().manual_seed(1))
    nothing = np.zeros((len(ids), 1), np.float32)
    given = {0: {name: important.numpy()}, **{call: {name: nothing} for call in range(1, 9)}}
    logits, _ = engine.run(ids, mask, (PROMPT, *[1] * 8), given)
    for row, count in enumerate(PADDING):
        own = important[row, count:]

        def rule(share: float, own: torch.Tensor = own) -> Rule:
            def cut(seen: Seen) -> list[int]:
                return keep(seen, own, TOKENS - round(TOKENS * (1 - share)))

            return cut

        cuts = [Cut(0, rule(0.749)), Cut(2, rule(0.487))]
        alone = run(model_of("llama"), ids[row, count:], PROMPT - count, cuts).logits.numpy()
        np.testing.assert_allclose(logits[row, count:], alone, rtol=0, atol=2e-4 * np.abs(alone).max())
