"""SeerAttention (arXiv:2410.13276): a gate on what queries and keys are before rotation rates blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.decoders.engine import build
from tests.decoders.queries import heard_queries, rotated
from tests.decoders.tiny import model_of
from tests.sparse.eager import cut_of, look_alike
from tests.sparse.engine import assert_equals_rule, policy
from tests.sparse.oracle import Look, blocks_to_tokens, run_sparse
from tokcc.errors import PolicyError
from tokcc.passes.sparse.scores.gate import Gate

BLOCK = 4
Array = npt.NDArray[Any]


def gates(folder: Path, layers: int = 3, heads: int = 4, kv_heads: int = 2, width: int = 16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for layer in range(layers):
        tensors[f"layers.{layer}.query.weight"] = torch.randn(heads, width, width, generator=generator) / width**0.5
        tensors[f"layers.{layer}.key.weight"] = (
            torch.randn(kv_heads, 3 * width, width, generator=generator) / width**0.5
        )
    save_file(tensors, folder / "gates.safetensors")
    return tensors


def unturned(model: Any, x: Tensor, first: int) -> Tensor:
    """``[heads, N, D]`` from position ``first`` on, turned back."""
    return torch.stack([rotated(model, x[:, i], -(first + i)) for i in range(x.shape[1])], 1)


def probabilities(model: Any, tensors: dict[str, Tensor], look: Look) -> Array:
    """The gate of one layer, ``[H, MQ, M]``; 0 for blocks that begin behind the row."""
    past, groups = look.total - look.new, look.query.shape[0] // look.key.shape[0]
    query, key = unturned(model, look.query, past).double(), unturned(model, look.key, 0).double()
    wq, wk = (tensors[f"layers.{look.layer}.{name}.weight"].double() for name in ("query", "key"))
    rows, blocks = -(-look.new // BLOCK), -(-look.total // BLOCK)
    made = np.zeros((len(query), rows, blocks))
    for head in range(len(query)):
        keys = []
        for m in range(blocks):
            own = key[head // groups, m * BLOCK : (m + 1) * BLOCK]
            pooled = torch.cat([own.amax(0), own.amin(0), own.mean(0)])
            keys.append(rotated(model, pooled @ wk[head // groups], m * BLOCK).double())
        for row in range(rows):
            mean = query[head, row * BLOCK : (row + 1) * BLOCK].mean(0)
            asked = rotated(model, mean @ wq[head], past + row * BLOCK).double()
            last = past + min((row + 1) * BLOCK, look.new) - 1
            logits = np.array([float(asked @ k) / 16**0.5 for k in keys[: last // BLOCK + 1]])
            weights = np.exp(logits - logits.max())
            made[head, row, : len(weights)] = weights / weights.sum()
    return made


def rule(family: str, tensors: dict[str, Tensor], above: float) -> Any:
    def reads(look: Look) -> Tensor | None:
        if look.new == 1:
            return None
        table = torch.from_numpy(probabilities(model_of(family), tensors, look) > above)
        for row in range(table.shape[1]):
            first = look.total - look.new + row * BLOCK
            last = min(first + BLOCK, look.total) - 1
            table[:, row, first // BLOCK : last // BLOCK + 1] = True
        return blocks_to_tokens(table, BLOCK, BLOCK, look.new, look.total)

    return reads


def own(folder: Path, **arguments: Any) -> Any:
    return policy("seer-attention", block=BLOCK, length=0, weights=str(folder / "gates.safetensors"), **arguments)


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_equals_the_formula(family: str, tmp_path: Path) -> None:
    tensors = gates(tmp_path)
    assert_equals_rule(family, own(tmp_path, above=0.06), rule(family, tensors, 0.06), tmp_path)


def test_the_oracle_turns_back_to_the_projections() -> None:
    """What the oracle takes for queries before rotation is what the model's projection gave."""
    model, looks = model_of("llama"), []
    ids = torch.arange(3, 23)
    with heard_queries(model) as heard:
        run_sparse(model, ids, [20], lambda look: looks.append(look))
    for look in looks:
        torch.testing.assert_close(unturned(model, look.query, 0), heard[look.layer], atol=1e-5, rtol=1e-4)


def test_a_stretched_rotation_is_taken_back() -> None:
    """A rotation that also multiplies by 1.7 (YaRN), and a part that it leaves as it is."""
    query, key = look_alike(4, 2, 12, 21)

    def turn(x: Tensor, positions: Tensor) -> Tensor:
        angle = positions[:, None, :, None] * torch.tensor([0.3, 0.01])
        one, two, rest = x[..., :2], x[..., 2:4], x[..., 4:]
        cos, sin = 1.7 * angle.cos(), 1.7 * angle.sin()
        return torch.cat([one * cos - two * sin, one * sin + two * cos, rest], -1)

    positions = (torch.arange(21) - 5).clamp(min=0)[None]
    cut = cut_of(query, turn(key, positions), BLOCK, BLOCK, padding=5, unturned=query, turns=(turn, turn))
    torch.testing.assert_close(cut.unturned_key, key, atol=1e-5, rtol=1e-4)


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="no weights are given"):
        build("llama", policy("seer-attention", block=BLOCK), tmp_path)
    gates(tmp_path, heads=3)
    with pytest.raises(PolicyError, match="does not fit"):
        build("llama", own(tmp_path), tmp_path)


def test_the_tensors_that_are_asked_for() -> None:
    specs = Gate(pools=("max", "mean")).tensors({"layers": 2, "head_width": 8})
    assert [str(spec) for spec in specs[2:]] == [
        "layers.1.query.weight float[query_heads, head_width, head_width]",
        "layers.1.key.weight float[heads, 16, head_width]",
    ]
