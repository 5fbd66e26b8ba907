"""Double Sparsity: the tokens with the largest products in a few channels, and how those channels are measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.decoders.engine import build
from tests.sparse.engine import assert_equals_rule, policy
from tests.sparse.oracle import Look, Rule
from tokcc.analysis.channel_numbers import ChannelSums
from tokcc.analysis.head_numbers import Heard
from tokcc.errors import PlanError, PolicyError

TOKENS, COUNT, WIDTH = 9, 5, 16
LAYERS = (1, 2)
SLOTS = {"kv": {"layout": "slots", "tokens": 64}}


def table(heads: int, seed: int = 0) -> list[list[list[int]]]:
    """Channels of three layers, the most important first."""
    rng = np.random.default_rng(seed)
    return [[rng.permutation(WIDTH).tolist() for _ in range(heads)] for _ in range(3)]


def label_rule(channels: list[list[list[int]]], count: int, tokens: int, share: str) -> Rule:
    def rule(look: Look) -> Tensor | None:
        if look.new > 1 or look.layer not in LAYERS:
            return None
        heads, kv_heads = look.query.shape[0], look.key.shape[0]
        own = channels[look.layer]
        score = torch.zeros(heads, look.total, dtype=torch.float64)
        for head in range(heads):
            chosen = own[head * len(own) // heads][:count]
            for token in range(look.total):
                for c in chosen:
                    score[head, token] += float(look.query[head, 0, c]) * float(
                        look.key[head * kv_heads // heads, token, c]
                    )
        read = torch.zeros(heads, 1, look.total, dtype=torch.bool)
        for head in range(heads):
            group = [h for h in range(heads) if h * kv_heads // heads == head * kv_heads // heads]
            mine = score[group].amax(0) if share == "group_max" else score[head]
            order = sorted(range(look.total - 1), key=lambda t: -float(mine[t]))
            read[head, 0, [look.total - 1, *order[: tokens - 1]]] = True
        return read

    return rule


def wanted(folder: Path, measured: dict[str, Any], layout: bool, **changes: Any) -> dict[str, Any]:
    path = folder / "profile.json"
    path.write_text(json.dumps(measured))
    given = {"tokens": TOKENS, "channels": COUNT, "profile": str(path), "length": 0, "at": {"layers": list(LAYERS)}}
    return {**policy("double-sparsity", **{**given, **changes}), **(SLOTS if layout else {})}


@pytest.mark.parametrize(
    ("family", "kv_heads", "slots"),
    [
        ("llama", 2, True),
        pytest.param("llama", 2, False, marks=pytest.mark.slow),
        pytest.param("llama-mqa", 1, True, marks=pytest.mark.slow),
    ],
)
def test_every_row_reads_the_best_tokens(family: str, kv_heads: int, slots: bool, tmp_path: Path) -> None:
    channels = table(kv_heads)
    given = wanted(tmp_path, {"key_channels": channels}, slots)
    engine = assert_equals_rule(
        family, given, label_rule(channels, COUNT, TOKENS, "group_max"), tmp_path, padding=(0, 3, 5)
    )
    inputs = {item.name: item.shape for item in engine.session.get_inputs()}
    labels = inputs["past_key_values.1.key_labels"]
    assert labels[1:] == [kv_heads, 64, COUNT] if slots else labels[2] == inputs["past_key_values.1.key"][2]
    score = engine.plan.to_dict()["steps"][0]["score"]
    assert "profile" not in score
    assert [len(row) for row in score["channels"][0]] == [COUNT] * kv_heads


@pytest.mark.slow
@pytest.mark.parametrize("slots", [True, False])
def test_channels_and_lists_of_every_query_head(slots: bool, tmp_path: Path) -> None:
    channels = table(4, 1)
    given = wanted(tmp_path, {"query_channels": channels}, slots, of="query", share="each")
    assert_equals_rule("llama", given, label_rule(channels, COUNT, TOKENS, "each"), tmp_path, padding=(0, 3, 5))


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="name a `profile`"):
        build("llama", policy("double-sparsity"), tmp_path)
    with pytest.raises(PolicyError, match="heads have 16 channels"):
        build("llama", wanted(tmp_path, {"key_channels": table(2)}, True, channels=17), tmp_path)
    with pytest.raises(PlanError, match="of which the table has 3"):
        build("llama", wanted(tmp_path, {"key_channels": table(3)}, True), tmp_path)
    with pytest.raises(PlanError, match="channels of 4 key heads"):
        build("llama", wanted(tmp_path, {"key_channels": table(4)}, True), tmp_path)
    doubled = [[[0, 0, 1, 2, 3, 4]] * 2] * 3
    with pytest.raises(PolicyError, match="each once"):
        build("llama", wanted(tmp_path, {"key_channels": doubled}, True), tmp_path)


def test_channels_are_those_with_the_largest_products() -> None:
    """By the mean of |q * k| over the tokens of two texts, written out; key heads by the sum over their query heads."""
    generator, found = torch.Generator().manual_seed(0), ChannelSums()
    texts = [[torch.randn(heads, 20, 6, generator=generator) for heads in (4, 2, 2)] for _ in range(2)]
    for query, key, value in texts:
        found.hear(Heard(0, query, key, value, 0, 1.0, 0.0))
    means = np.zeros((4, 6))
    for query, key, _ in texts:
        for head in range(4):
            for token in range(20):
                means[head] += np.abs(query[head, token].double().numpy() * key[head // 2, token].double().numpy()) / 40
    wanted = [np.argsort(-row, kind="stable").tolist() for row in means]
    assert [list(row) for row in found.of_query_heads()[0]] == wanted
    both = [np.argsort(-(means[2 * head] + means[2 * head + 1]), kind="stable").tolist() for head in range(2)]
    assert [list(row) for row in found.of_key_heads()[0]] == both
