"""TidalDecode: one layer chooses, those behind it read the same places of their own caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.decoders.engine import build
from tests.sparse.engine import assert_equals_rule, policy
from tests.sparse.oracle import Look, Rule
from tokcc.errors import PlanError

TOKENS = 9
SLOTS = {"kv": {"layout": "slots", "tokens": 64}}


def tidal_rule(chosen_in: tuple[int, ...], tokens: int, share: str) -> Rule:
    """Every head remembers a set from layer to layer."""

    def rule(look: Look) -> Tensor | None:
        if look.new > 1 or look.layer < chosen_in[0]:
            return None
        heads = look.query.shape[0]
        if look.layer in chosen_in:
            score = look.logits[:, 0]
            if share == "group_max":
                groups = heads // look.key.shape[0]
                score = score.unflatten(0, (-1, groups)).amax(1).repeat_interleave(groups, 0)
            look.memory["sets"] = [
                {look.total - 1, *sorted(range(look.total - 1), key=lambda t: -float(score[h, t]))[: tokens - 1]}
                for h in range(heads)
            ]
            return None
        read = torch.zeros(heads, 1, look.total, dtype=torch.bool)
        for head, places in enumerate(look.memory["sets"]):
            read[head, 0, sorted(places)] = True
        return read

    return rule


def wanted(chosen_in: list[int], layers: str = "0:", slots: bool = True, **changes: Any) -> dict[str, Any]:
    given = {"tokens": TOKENS, "chosen_in": chosen_in, "layers": layers, "length": 0, **changes}
    return {**policy("tidal-decode", **given), **(SLOTS if slots else {})}


@pytest.mark.parametrize(
    ("family", "chosen_in", "slots", "share"),
    [
        ("llama", (0,), True, "group_max"),
        pytest.param("llama", (0,), False, "each", marks=pytest.mark.slow),
        pytest.param("llama", (0,), True, "each", marks=pytest.mark.slow),
        pytest.param("llama-mqa", (0, 1), False, "group_max", marks=pytest.mark.slow),
        pytest.param("llama", (1,), True, "group_max", marks=pytest.mark.slow),
    ],
)
def test_layers_read_what_was_chosen(
    family: str, chosen_in: tuple[int, ...], slots: bool, share: str, tmp_path: Path
) -> None:
    given = wanted(list(chosen_in), f"{chosen_in[0]}:", slots, share=share)
    assert_equals_rule(family, given, tidal_rule(chosen_in, TOKENS, share), tmp_path, padding=(0, 3, 5))


def test_what_is_refused(tmp_path: Path) -> None:
    for chosen_in, layers in (([1], "0:"), ([0, 5], "0:"), ([0], "1:")):
        with pytest.raises(PlanError, match="among the layers of the step"):
            build("llama", wanted(chosen_in, layers), tmp_path)
    evicting = wanted([0], slots=False)
    evicting["steps"].append({"preset": "tova", "tokens": 16})
    with pytest.raises(PlanError, match="another step makes them differ"):
        build("llama", evicting, tmp_path)
