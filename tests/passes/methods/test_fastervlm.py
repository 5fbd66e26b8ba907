"""FasterVLM (arXiv:2412.01818) against a brute-force reading."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from tests.passes.oracle import Cut, Feeds, Method, Result, Scene, compare, drop, policy, program_of, reference, top
from tests.passes.reference_models import HEADS, WIDTH, Block, patches, sentences, text, vision
from tokcc.passes.methods import library
from tokcc.testing import reduce_program, run_eager, run_program


def fastervlm(count: int) -> Method:
    def method(scene: Scene) -> Cut | None:
        row = scene.rows[-1]
        score = [sum(float(row[h, j]) for h in range(len(row))) for j in range(scene.n)]
        return drop(scene, [0, *sorted(top(score, range(1, scene.n), min(count, scene.n - 1)))])

    return method


def oracle(count: int) -> Callable[[Feeds], Result]:
    def run(sample: Feeds) -> Result:
        return reference(vision(), sample, fastervlm(count), layers=(3,), at_end=True)

    return run


def test_images() -> None:
    results = compare(vision(), {"patches": patches(3, 65)}, {"preset": "fastervlm", "tokens": 16}, oracle(16))
    assert results[0].lengths == [17]


def test_one_token() -> None:
    compare(vision(), {"patches": patches(1, 50)}, {"preset": "fastervlm", "tokens": 1}, oracle(1))


def test_more_tokens_than_there_are_is_the_identity() -> None:
    feeds = {"patches": patches(2, 50)}
    program = program_of(vision(), feeds)
    reduced, _ = reduce_program(program, "fastervlm")  # 144 tokens
    tokens, _, index = run_program(reduced, feeds)[:3]
    torch.testing.assert_close(tokens, run_program(program, feeds)[0], rtol=0, atol=1e-5)
    assert index.tolist() == [list(range(50))] * 2


def test_index_output_names_the_kept_tokens() -> None:
    feeds = {"patches": patches(2, 50)}
    program = program_of(vision(), feeds)
    reduced, _ = reduce_program(program, policy({"preset": "fastervlm", "tokens": 9}))
    tokens, _, index = run_program(reduced, feeds)
    dense = run_program(program, feeds)[0]
    assert "tokens.token_index" in reduced.output_names
    torch.testing.assert_close(tokens, dense[torch.arange(2)[:, None], index], rtol=0, atol=1e-5)


def test_the_order_of_heads_does_not_matter() -> None:
    """Swapping two heads of every layer leaves the kept set as it is."""
    feeds = {"patches": patches(2, 50)}
    swapped = copy.deepcopy(vision())
    order = torch.arange(WIDTH).reshape(HEADS, -1)[[1, 0, *range(2, HEADS)]].flatten()
    for block in swapped.blocks:
        assert isinstance(block, Block)
        rows = torch.cat([order + part * WIDTH for part in range(3)])
        block.qkv.weight.data = block.qkv.weight.data[rows]
        block.qkv.bias.data = block.qkv.bias.data[rows]
        block.out.weight.data = block.out.weight.data[:, order]
    step = policy({"preset": "fastervlm", "tokens": 12})
    plans = [run_eager(program_of(model, feeds), step, feeds)[1] for model in (vision(), swapped)]
    assert torch.equal(plans[0].made[0].index, plans[1].made[0].index)


def test_padded_rows_are_what_they_are_alone() -> None:
    def run(sample: Feeds) -> Result:
        return reference(text(), sample, fastervlm(8), layers=(3,), at_end=True)

    compare(text(), sentences([20, 12, 5]), {"preset": "fastervlm", "tokens": 8}, run)


def test_default() -> None:
    assert library()["fastervlm"].params["tokens"].default == 144
