"""ToMe against a brute-force reading of arXiv:2210.09461."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch.export import Dim

from tests.passes.oracle import Cut, Feeds, Method, Model, Result, Scene, compare, cosine, merge, policy, reference
from tests.passes.reference_models import Block, audio, frames, patches, sentences, text, vision
from tokcc.testing import reduce_program, run_eager, run_program, trace

LAYERS = range(4)


def tome(r: int, protected: int) -> Method:
    def method(scene: Scene) -> Cut | None:
        mean_keys = [sum(scene.keys[h, i] for h in range(len(scene.keys))) / len(scene.keys) for i in range(scene.n)]
        count = min(r, (scene.n - protected) // 2)
        evens = [i for i in range(0, scene.n, 2) if i >= protected]
        odds = [i for i in range(1, scene.n, 2) if i >= protected]
        best = {a: max(odds, key=lambda b: (cosine(mean_keys[a], mean_keys[b]), -b)) for a in evens if odds}
        value = {a: cosine(mean_keys[a], mean_keys[b]) for a, b in best.items()}
        sources = sorted(best, key=lambda a: (-value[a], a))[:count]
        unmerged = [a for a in evens if a not in sources]
        return merge(scene, [*range(protected), *unmerged, *odds], [(a, best[a]) for a in sources])

    return method


def check(model: Model, feeds: Feeds, step: Mapping[str, Any], protected: int, **kwargs: Any) -> list[Result]:
    prop = bool(step.get("prop_attn", True))

    def oracle(sample: Feeds) -> Result:
        return reference(model, sample, tome(step["r"], protected), layers=range(len(model.blocks)), prop_attn=prop)

    return compare(model, feeds, {"preset": "tome", **step}, oracle, **kwargs)


@pytest.mark.parametrize(("tokens", "r"), [(65, 13), (50, 16)])
def test_images(tokens: int, r: int) -> None:
    feeds = {"patches": patches(3, tokens)}
    results = check(vision(), feeds, {"r": r}, 1, full=tokens == 50)
    # Table 1.1 of the method notes: the last layers are capped at half of what is left.
    expected, n = [], tokens
    for _ in LAYERS:
        n -= min(r, (n - 1) // 2)
        expected.append(n)
    for row, result in enumerate(results):
        assert result.lengths == expected
        for cut in result.cuts:
            assert cut.sizes is not None
            assert float(cut.sizes.sum()) == tokens
        assert 0 in result.cuts[-1].kept, row


def test_without_proportional_attention() -> None:
    check(vision(), {"patches": patches(2, 50)}, {"r": 9, "prop_attn": False}, 1)


def test_no_class_token_down_to_one_token() -> None:
    results = check(audio(), {"frames": frames(2, 9)}, {"r": 8}, 0)
    assert results[0].lengths == [5, 3, 2, 1]


@pytest.mark.parametrize("lengths", [[20, 13, 6], [16, 15, 3]])
@pytest.mark.parametrize("pooled", [True, False])
def test_padded_rows_are_what_they_are_alone(pooled: bool, lengths: list[int]) -> None:
    check(text(pooled=pooled), sentences(lengths), {"r": 4}, 1 if pooled else 0, full=lengths[0] == 16)


def test_padding_with_a_share_as_budget() -> None:
    """A share merges a different number of pairs in every row."""
    model = text(pooled=False)

    def oracle(sample: Feeds) -> Result:
        def method(scene: Scene) -> Cut | None:
            return tome(scene.n - -(-3 * scene.n // 5), 0)(scene)

        return reference(model, sample, method, layers=LAYERS)

    compare(model, sentences([10, 9, 5, 4]), {"preset": "tome", "budget": {"keep": 0.6}}, oracle)


def test_dynamic_batch_and_sequence() -> None:
    shapes = {name: {0: Dim("batch", min=1, max=9), 1: Dim("sequence", min=4, max=40)} for name in ("ids", "mask")}
    traced = sentences([12, 7])
    for lengths in ([17, 8, 16], [5, 4]):
        check(text(2), sentences(lengths), {"r": 3}, 1, dynamic=shapes, traced=traced)


@torch.no_grad()
def test_size_weighted_sum_is_preserved() -> None:
    """In a model whose blocks add nothing, the size-weighted sum over merged tokens is the sum over all tokens."""
    model = copy.deepcopy(vision())
    for block in model.blocks:
        assert isinstance(block, Block)
        block.down.weight.zero_()
        block.down.bias.zero_()
        block.out.weight.zero_()
        block.out.bias.zero_()
    model.norm = torch.nn.Identity()
    feeds = {"patches": patches(2, 33)}
    outputs, plan = run_eager(trace(model, feeds), policy({"preset": "tome", "r": 5}), feeds)
    total = (plan.made[-1].weight[..., None] * outputs[0]).sum(1)
    torch.testing.assert_close(total, model.embed(feeds["patches"]).sum(1), rtol=0, atol=1e-4)


@torch.no_grad()
def test_duplicates_merge_without_a_trace() -> None:
    """Merging exact copies with proportional attention changes nothing: every output equals the dense model's."""
    model = copy.deepcopy(vision())
    model.positions.data.zero_()
    pairs = patches(2, 17)  # class token and 16 patches
    feeds = {"patches": pairs.repeat_interleave(2, dim=1)}  # token 2k + 1 equals token 2k + 2
    program = trace(model, feeds)
    step = {"preset": "tome", "budget": {"remove": 16}, "at": {"layers": [0]}}
    reduced, _ = reduce_program(program, policy(step, "full"))
    dense = model(**feeds)
    tokens, pooled = run_program(reduced, feeds)[:2]
    torch.testing.assert_close(tokens, dense["tokens"], rtol=0, atol=1e-5)
    torch.testing.assert_close(pooled, dense["pooled"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, feeds = copy.deepcopy(vision()).to(dtype), {"patches": patches(2, 50).to(dtype)}
    reduced, _ = reduce_program(trace(model, feeds), policy({"preset": "tome", "r": 8}))
    pooled = run_program(reduced, feeds)[1]
    assert pooled.dtype == dtype
    with torch.no_grad():
        exact = reference(vision(), {"patches": patches(2, 50)[:1]}, tome(8, 1), layers=LAYERS).pooled
    assert exact is not None
    assert (pooled[0].float() - exact).abs().max() < 0.15
