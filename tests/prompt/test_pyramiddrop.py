"""PyramidDrop against its formula: what the last token would attend to in the next layer; floors of shares of all."""

from __future__ import annotations

from pathlib import Path

from tests.prompt.engine import TOKENS, compare, visual_policy
from tests.prompt.oracle import Cut, Rule, Seen
from tests.prompt.rules import attended, keep

LAYERS = (0, 1, 3)


def rule(share: float) -> Rule:
    def cut(seen: Seen) -> list[int]:
        row = attended(seen, [seen.alive[-1]], seen.alive)[:, 0].mean(0)
        return keep(seen, row, int(TOKENS * share))

    return cut


def test_equals_the_formula(tmp_path: Path) -> None:
    step = {"preset": "pyramiddrop", "layers": list(LAYERS), "keep": [0.7, 0.5, 0.2]}
    compare(
        "llama",
        visual_policy(step),
        lambda: [Cut(layer, rule(share)) for layer, share in zip(LAYERS, (0.7, 0.5, 0.2), strict=True)],
        tmp_path,
        compact=True,
    )


def test_positions_kept_share_the_projection_of_keys(tmp_path: Path) -> None:
    step = {"preset": "pyramiddrop", "layers": [1], "keep": [0.5], "positions": "keep"}
    engine = compare("llama", visual_policy(step), lambda: [Cut(1, rule(0.5))], tmp_path)
    weights = [str(node.args[1]) for node in engine.program.graph.nodes if "linear" in str(node.target)]
    assert sum("layers_2_self_attn_k_proj" in name for name in weights) == 1
