"""SeerAttention-R (arXiv:2506.08889): a gate for single tokens, shared by the queries of a key head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.decoders.engine import build, tokens
from tests.decoders.queries import rotated
from tests.decoders.tiny import model_of
from tests.sparse.engine import CALLS, assert_equals_rule, policy
from tests.sparse.methods.test_seer_attention import unturned
from tests.sparse.oracle import Look, Rule
from tokcc.errors import PlanError, PolicyError

BLOCK = 4
SLOTS = {"kv": {"layout": "slots", "tokens": 64}}


def gates(folder: Path, *, heads: int = 2, group: int = 2, width: int = 16, norms: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(6)
    tensors = {}
    for layer in range(3):
        query = torch.randn(heads, group, width, width, generator=generator)
        key = torch.randn(heads, 3 * width, width, generator=generator)
        tensors[f"layers.{layer}.query.weight"] = 3 * query / width**0.5
        tensors[f"layers.{layer}.key.weight"] = 3 * key / width**0.5
        for name in ("query_norm", "key_norm") if norms else ():
            tensors[f"layers.{layer}.{name}.weight"] = 1 + torch.rand(width, generator=generator)
    save_file(tensors, folder / "gates.safetensors")
    return tensors


def block_vector(model: Any, tensors: dict[str, Tensor], layer: int, head: int, key: Tensor, first: int) -> Tensor:
    """Of the keys ``[block, D]`` before rotation, whose first one stands at a position."""
    parts = torch.cat([key.amax(0), key.amin(0), key.mean(0)])
    made = parts @ tensors[f"layers.{layer}.key.weight"][head].double()
    return rotated(model, normed(made, tensors.get(f"layers.{layer}.key_norm.weight")), first).double()


def normed(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x / (x.pow(2).mean() + 1e-6).sqrt() * scale.double()


def shares(model: Any, tensors: dict[str, Tensor], look: Look) -> Tensor:
    """The gate of a single token, ``[Hkv, M]``."""
    own, kv_heads = look.total - 1, len(look.key)
    query, key = unturned(model, look.query, own).double(), unturned(model, look.key, 0).double()
    by_group = query[:, 0].unflatten(0, (kv_heads, -1))  # [Hkv, G, D]
    made = []
    for head in range(kv_heads):
        weight = tensors[f"layers.{look.layer}.query.weight"][head].double()
        merged = sum(by_group[head, g] @ weight[g] for g in range(weight.shape[0]))
        assert isinstance(merged, Tensor)
        merged = normed(merged, tensors.get(f"layers.{look.layer}.query_norm.weight"))
        asked = rotated(model, merged, own).double()
        logits = []
        for first in range(0, look.total, BLOCK):
            block = key[head, first : first + BLOCK]
            whole = len(block) == BLOCK
            vector = block_vector(model, tensors, look.layer, head, block, first)
            logits.append(float(asked @ vector) / len(asked) ** 0.5 if whole else 0.0)
        made.append(torch.softmax(torch.tensor(logits, dtype=torch.float64), 0))
    return torch.stack(made)


def gate_rule(family: str, tensors: dict[str, Tensor], blocks: int, above: float = 0.0) -> Rule:
    """A single token reads so many blocks, the newest among them, and only those that have more than ``above``."""

    def reads(look: Look) -> Tensor | None:
        if look.new > 1:
            return None
        groups = len(look.query) // len(look.key)
        read = torch.zeros(len(look.query), 1, look.total, dtype=torch.bool)
        for head, row in enumerate(shares(model_of(family), tensors, look).repeat_interleave(groups, 0)):
            newest = len(row) - 1
            rest = sorted((i for i in range(newest) if float(row[i]) > above), key=lambda i: -float(row[i]))
            for i in [newest, *rest][:blocks]:
                read[head, 0, i * BLOCK : (i + 1) * BLOCK] = True
        return read

    return reads


def own(folder: Path, layout: dict[str, Any] | None = SLOTS, **arguments: Any) -> dict[str, Any]:
    given = {"block": BLOCK, "length": 0, "weights": str(folder / "gates.safetensors"), **arguments}
    return {**policy("seer-attention-r", **given), **(layout or {})}


@pytest.mark.parametrize("layout", [SLOTS, pytest.param(None, marks=pytest.mark.slow)], ids=["slots", "merged"])
@pytest.mark.parametrize(
    ("family", "heads", "group"),
    [("llama", 2, 2), pytest.param("llama-mqa", 1, 4, marks=pytest.mark.slow),
     pytest.param("qwen3", 2, 2, marks=pytest.mark.slow)],
)  # fmt: skip
def test_the_best_blocks(family: str, heads: int, group: int, layout: dict[str, Any] | None, tmp_path: Path) -> None:
    tensors = gates(tmp_path, heads=heads, group=group)
    assert_equals_rule(family, own(tmp_path, layout, tokens=4 * BLOCK), gate_rule(family, tensors, 4), tmp_path)


@pytest.mark.slow
def test_a_threshold_and_norms(tmp_path: Path) -> None:
    tensors = gates(tmp_path, norms=True)
    wanted = own(tmp_path, tokens=4096, above=0.08)
    assert_equals_rule("llama", wanted, gate_rule("llama", tensors, 1000, 0.08), tmp_path)
    assert_equals_rule("llama", wanted, gate_rule("llama", tensors, 1000, 0.08), tmp_path, padding=(0,))


@pytest.mark.slow
def test_all_blocks_are_the_whole_cache(tmp_path: Path) -> None:
    gates(tmp_path)
    assert_equals_rule("llama", own(tmp_path, tokens=4096), lambda look: None, tmp_path)


def test_vectors_of_whole_blocks_are_remembered(tmp_path: Path) -> None:
    """In the first layer; those of padding count nothing, and the newest block has none until it is full."""
    tensors = gates(tmp_path)
    engine = build("llama", own(tmp_path), tmp_path)
    padding, calls = (0, 8), CALLS[:-1]
    ids, mask = tokens(2, sum(calls), padding)
    _, last = engine.run(ids, mask, calls)
    state, keys, model = last["present.0.key_gate"], torch.from_numpy(last["present.0.key"]), model_of("llama")
    whole, rest = divmod(sum(calls), BLOCK)
    assert state.shape == (2, 2, 16, 16)
    assert rest
    assert not state[:, :, whole].any()
    for row, count in enumerate(padding):
        for head in range(2):
            key = unturned(model, keys[row, head : head + 1, count : sum(calls)], 0)[0].double()
            for page in range(count // BLOCK, whole):
                first = page * BLOCK - count
                wanted = block_vector(model, tensors, 0, head, key[first : first + BLOCK], first)
                np.testing.assert_allclose(state[row, head, page], wanted.numpy(), rtol=0, atol=2e-4)


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="no weights are given"):
        build("llama", policy("seer-attention-r", block=BLOCK), tmp_path)
    gates(tmp_path, group=3)
    with pytest.raises(PolicyError, match="does not fit"):
        build("llama", own(tmp_path), tmp_path)
    gates(tmp_path)
    wanted = own(tmp_path, None)
    wanted["steps"].append({"preset": "snapkv", "tokens": 16, "window": 3})
    with pytest.raises(PlanError, match="turns keys back by their places"):
        build("llama", wanted, tmp_path)
