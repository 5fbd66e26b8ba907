"""RazorAttention: what a head drops stays as one entry in front, the mean, with its number as weight."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.decoders.masked import Seen, assert_equals_masked
from tests.decoders.methods.cuts import cut_of
from tokcc.kernels.cached_attention import cached_attention
from tokcc.passes.cache.cut import Retained
from tokcc.passes.cache.reducers.fuse_front import FuseFront

SINKS, RECENT = 2, 6


def policy(folder: Path, table: list[list[float]], **given: object) -> dict[str, object]:
    path = folder / "profile.json"
    path.write_text(json.dumps({"echo": table, "induction": [[0.0] * len(table[0])] * len(table)}))
    step = {"preset": "razor-attention", "profile": str(path), "sinks": SINKS, "recent": RECENT, "induction": 0.0}
    return {"version": 1, "name": "razor", "steps": [{**step, **given}]}


def rule(streaming: dict[int, list[int]]) -> object:
    def fuse(seen: Seen) -> None:
        total = seen.key.shape[1]
        for head in streaming.get(seen.layer, []):
            for j in range(SINKS, total - RECENT):
                if seen.weight[head, j] == 0:
                    continue
                count = float(seen.front_weight[head]) + 1
                seen.front_key[head] += (seen.key[head, j] - seen.front_key[head]) / count
                seen.front_value[head] += (seen.value[head, j] - seen.front_value[head]) / count
                seen.front_weight[head], seen.weight[head, j] = count, 0

    return fuse


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_equals_the_running_mean(family: str, tmp_path: Path) -> None:
    """Query head 3 of layer 1 echoes: its key head keeps everything, the five others do not."""
    echo = [[0.0] * 4, [0, 0, 0, 1.0], [0.0] * 4]
    streaming = {0: [0, 1], 1: [0], 2: [0, 1]}
    given = policy(tmp_path, echo, echo=1 / 12)
    _, last = assert_equals_masked(family, given, rule(streaming), tmp_path)
    assert last["present.0.key"].shape[1:3] == (2, SINKS + RECENT)
    assert last["present.1.key"].shape[1:3] == (1, 80)
    assert last["present.1.key_front_1"].shape == (3, 1, 1, 16)
    # 80 tokens, but for the padding of each row.
    dropped = torch.tensor([80.0, 77.0, 75.0]) - SINKS - RECENT
    torch.testing.assert_close(torch.from_numpy(last["present.0.key_front_weight"][:, 0, 0, 0]), dropped)


def test_equal_entries_lose_nothing() -> None:
    """What was dropped was all the same: the entry in front stands for it exactly."""
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(1, 2, 12, 8, generator=generator)
    key[:, :, 3:9] = key[:, :, 3:4]
    cut = cut_of(torch.cat([torch.zeros(1, 2, 1, 8), key], 2))
    cut.real[:, 0] = False
    cut.weight = torch.cat([torch.zeros(1, 2, 1), torch.ones(1, 2, 12)], 2)
    kept = torch.tensor([0, 1, 2, 9, 10, 11]).expand(1, 2, -1)
    made = FuseFront().reduce(cut, Retained(kept))
    assert made.front is not None
    assert made.front.weight[0, :, 0].tolist() == [6.0, 6.0]
    query = torch.randn(1, 4, 1, 8, generator=generator)
    fresh = torch.randn(1, 2, 1, 8, generator=generator)
    whole = torch.cat([key, fresh], 2)
    real = torch.ones(1, 13, dtype=torch.bool)
    wanted, _ = cached_attention(query, whole, whole, real, 0, 0.3, 0.0)
    small = torch.cat([made.front.key, made.key, fresh], 2)
    bias = torch.cat([made.front.weight, torch.ones(1, 2, 7)], 2).log()
    got, _ = cached_attention(query, small, small, real[:, :8], 0, 0.3, 0.0, bias)
    torch.testing.assert_close(got, wanted)
