"""LLaVA-PruMerge and its plus variant (arXiv:2403.15388) against loops in Python."""

from __future__ import annotations

import pytest
import torch

from tests.passes.oracle import Cut, Method, Scene, at_output, compare, cosine, policy, program_of, top
from tests.passes.reference_models import WIDTH, patches, sentences, text, vision
from tokcc.errors import AxisError
from tokcc.passes.methods import library
from tokcc.testing import reduce_program, run_eager, run_program


def weights_of(scene: Scene) -> list[float]:
    """One softmax over the whole width, of the class token's row, its own column left out behind it."""
    query = torch.cat([head[0] for head in scene.queries])
    keys = torch.cat(list(scene.keys), 1)
    return ((keys @ query) / WIDTH**0.5).softmax(0)[1:].tolist()


def merged(scene: Scene, order: list[int], neighbours: int) -> Cut:
    """``order``: the kept patches, counted without the class token."""
    x, keys, w = scene.x[1:], torch.cat(list(scene.keys), 1)[1:], weights_of(scene)
    n = len(x)
    made = [scene.x[0]]
    for i in order:
        near = top([cosine(keys[i], keys[j]) if j != i else -9 for j in range(n)], range(n), neighbours)
        made.append(x[i] + sum((w[j] * x[j] for j in near), torch.zeros(WIDTH)))
    gone = [j for j in range(n) if j not in order]
    if gone:
        made.append(sum((w[j] * x[j] for j in gone), torch.zeros(WIDTH)))
    return Cut([0, *(i + 1 for i in order), *[-1] * bool(gone)], torch.stack(made))


def prumerge(count: int, neighbours: int = 32) -> Method:
    return lambda scene: merged(scene, top(weights_of(scene), range(scene.n - 1), count), neighbours)


def prumerge_plus(count: int, stride: int, neighbours: int = 32) -> Method:
    """The published union, with as many tokens by attention as make ``count``."""

    def method(scene: Scene) -> Cut:
        w, n = weights_of(scene), scene.n - 1
        strided = list(range(0, n - 1, stride))
        for by_attention in range(n + 1):
            best = top(w, range(n), by_attention)
            union = [*best, *(i for i in strided if i not in best)]
            # The smallest number that gives the size: the last one that attention adds is not on the grid.
            if len(union) == count:
                return merged(scene, union, neighbours)
        raise AssertionError

    return method


@pytest.mark.parametrize(("tokens", "neighbours"), [(9, 32), (20, 5), (1, 32)])
def test_images(tokens: int, neighbours: int) -> None:
    step = {"preset": "prumerge", "tokens": tokens, "neighbours": neighbours}
    results = compare(
        vision(), {"patches": patches(3, 65)}, step, at_output(vision(), prumerge(tokens, neighbours)), engine=True
    )
    assert results[0].lengths == [tokens + 2]


@pytest.mark.parametrize(("tokens", "stride"), [(20, 6), (16, 4), (40, 5), (12, 6)])
def test_images_with_strided_tokens(tokens: int, stride: int) -> None:
    """64 patches with a stride of 4: 16 strided tokens, and none by attention."""
    step = {"preset": "prumerge-plus", "tokens": tokens, "stride": stride, "neighbours": 8}
    method = prumerge_plus(tokens, stride, 8)
    results = compare(vision(), {"patches": patches(3, 65)}, step, at_output(vision(), method), engine=True)
    assert results[0].lengths == [tokens + 2]
    for result in results:
        assert set(range(1, 64, stride)) <= set(result.cuts[0].kept)


def test_fewer_tokens_than_neighbours() -> None:
    """Every other token is a neighbour then."""
    step = {"preset": "prumerge", "tokens": 4}
    compare(vision(), {"patches": patches(2, 21)}, step, at_output(vision(), prumerge(4, 19)))


def test_as_many_tokens_as_there_are() -> None:
    """Every token is kept and nothing is fused: as a budget that removes nothing, it leaves the model alone."""
    feeds = {"patches": patches(2, 33)}
    program = program_of(vision(), feeds)
    reduced, _ = reduce_program(program, policy({"preset": "prumerge", "tokens": 32}))
    torch.testing.assert_close(run_program(reduced, feeds)[0], run_program(program, feeds)[0], rtol=0, atol=0)


def test_mass_of_the_fused_token() -> None:
    """With constant tokens behind the encoder the fused one holds the attention that the dropped ones received."""
    feeds = {"patches": patches(2, 50)}
    _, plan = run_eager(program_of(vision(), feeds), policy({"preset": "prumerge", "tokens": 9}), feeds)
    found: list[Scene] = []

    def seen(scene: Scene) -> Cut:
        found.append(scene)
        return prumerge(9)(scene)

    for row in range(2):
        at_output(vision(), seen)({"patches": feeds["patches"][row : row + 1]})
        w = weights_of(found[row])
        kept = [i - 1 for i in plan.made[0].index[row].tolist()[1:-1]]
        assert kept == top(w, range(49), 9)
        assert sum(w) < 1  # the class token's own share is left out


def test_refusals() -> None:
    feeds = {"patches": patches(1, 65)}
    step = {"preset": "prumerge-plus", "tokens": 10, "stride": 4}
    with pytest.raises(AxisError, match="16 of 64 tokens stand 4 apart, and 10"):
        run_eager(program_of(vision(), feeds), policy(step), feeds)
    padded = sentences([20, 12])
    with pytest.raises(AxisError, match="padded"):
        run_eager(program_of(text(), padded), policy({"preset": "prumerge", "tokens": 5}), padded)


def test_defaults() -> None:
    assert library()["prumerge"].params["tokens"].default == 32
    assert library()["prumerge-plus"].params["tokens"].default == 144
