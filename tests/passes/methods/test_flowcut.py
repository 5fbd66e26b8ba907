"""FlowCut (arXiv:2505.19536) against a loop over layers in Python."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.passes.oracle import inputs_of, policy, program_of, run_engine
from tests.passes.reference_models import HEADS, WIDTH, Block, Vision, patches, vision
from tokcc.errors import PlanError
from tokcc.passes.methods import library
from tokcc.testing import reduce_program, run_eager, run_program


def scored(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The score of every patch, from one layer's ``[H, n, d]``."""
    attention = torch.stack([(k[h] @ q[h, 0] / q.shape[-1] ** 0.5).softmax(0) for h in range(len(q))]).mean(0)[1:]
    semantic = torch.stack([(v[h] @ v[h, 0]).softmax(0) for h in range(len(v))]).mean(0)[1:]
    magnitude = v.mean(0)[1:].abs().sum(1)
    return (attention / attention.sum() + semantic / semantic.sum()) * magnitude


@torch.no_grad()
def flowcut(model: Vision, x: Tensor, left: dict[int, int], rate: float = 0.5) -> tuple[Tensor, list[int]]:
    """Return the tokens and which of the original ones they are; ``left``: patches behind a layer."""
    x, places = model.embed(x)[0], list(range(x.shape[1] + 1))
    average: Tensor | None = None
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        q, k, v = (
            part.reshape(len(x), HEADS, WIDTH // HEADS).transpose(0, 1)
            for part in block.qkv(block.norm1(x)).split(WIDTH, dim=1)
        )
        own = scored(q, k, v)
        average = own if average is None else (1 - rate) * average + rate * own
        mixed = (q @ k.transpose(1, 2) / (WIDTH // HEADS) ** 0.5).softmax(-1) @ v
        x = x + block.out(mixed.transpose(0, 1).reshape(len(x), WIDTH))
        x = x + block.down(F.gelu(block.up(block.norm2(x))))
        if layer in left:
            kept = sorted(average.topk(min(left[layer], len(average))).indices.tolist())
            average = average[kept]
            rows = [0, *(i + 1 for i in kept)]
            x, places = x[rows], [places[i] for i in rows]
    return model.norm(x), places


def step_of(layers: Sequence[int], counts: Sequence[int], **more: object) -> dict[str, object]:
    return {"preset": "flowcut", "at": {"layers": list(layers)}, "schedule": list(counts), **more}


@pytest.mark.parametrize(
    ("layers", "counts"), [((0, 2), (40, 12)), ((1,), (9,)), ((0, 1, 2), (30, 30, 10)), ((1, 2), (64, 20))]
)
def test_images(layers: Sequence[int], counts: Sequence[int]) -> None:
    """A cut that removes nothing changes nothing: the average goes on."""
    feeds = {"patches": patches(3, 65)}
    program = program_of(vision(), feeds)
    reduced, _ = reduce_program(program, policy(step_of(layers, counts)))
    tokens, pooled, index = run_engine(reduced, feeds)
    left = dict(zip(layers, counts, strict=True))
    for row, sample in enumerate(inputs_of(feeds)):
        wanted, places = flowcut(vision(), sample["patches"], left)
        assert index[row].tolist() == places
        torch.testing.assert_close(tokens[row], wanted, rtol=0, atol=1e-4)
        torch.testing.assert_close(pooled[row], vision().head(wanted[0]), rtol=0, atol=1e-4)


def test_rate_of_one_forgets() -> None:
    feeds = {"patches": patches(2, 50)}
    program = program_of(vision(), feeds)
    kept = []
    for rate in (1.0, 0.5):
        _, plan = run_eager(program, policy(step_of((2,), (12,), rate=rate)), feeds)
        kept.append(plan.made[0].index)
        for row, sample in enumerate(inputs_of(feeds)):
            assert kept[-1][row].tolist() == flowcut(vision(), sample["patches"], {2: 12}, rate)[1]
    assert not torch.equal(*kept)


def test_as_many_tokens_as_there_are() -> None:
    feeds = {"patches": patches(2, 33)}
    program = program_of(vision(), feeds)
    reduced, _ = reduce_program(program, policy(step_of((1, 2), (32, 32))))
    torch.testing.assert_close(run_program(reduced, feeds)[0], run_program(program, feeds)[0], rtol=0, atol=0)


def test_default_schedule_is_the_formula() -> None:
    """Layer l of 24 cuts ``round((n - K) / sqrt(L - 3 - l) * (1 - H^2))`` patches, and the last one the rest."""
    n, final, counts = 576, 128, []
    for layer in range(1, 22, 2):
        left = 24 - 2 - layer - 1
        n = max(final, n - round((n - final) / math.sqrt(left) * (1 - 0.8**2))) if left else final
        counts.append(n)
    assert library()["flowcut"].params["schedule"].default == counts


def test_a_model_of_another_depth_is_refused() -> None:
    feeds = {"patches": patches(1, 50)}
    with pytest.raises(PlanError, match="layer 5 does not exist"):
        run_eager(program_of(vision(), feeds), policy("flowcut"), feeds)
