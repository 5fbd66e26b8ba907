"""MustDrop in the vision encoder (arXiv:2411.10803): windows rated pair by pair, keys by class attention."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim

from tests.passes.oracle import (
    Cut,
    Feeds,
    Result,
    Scene,
    compare,
    cosine,
    inputs_of,
    merge,
    policy,
    program_of,
    reference,
    run_engine,
    top,
)
from tests.passes.reference_models import audio, frames, patches, sentences, text, vision
from tokcc.errors import AxisError, PlanError
from tokcc.testing import reduce_program, run_eager, run_program, trace


def window_merge(scene: Scene, remove: int, side: int, rows: int) -> Cut:
    width = (scene.n - 1) // rows
    inside = [
        [1 + (r + i) * width + c + j for i in range(side) for j in range(side)]
        for r in range(0, rows, side)
        for c in range(0, width, side)
    ]
    rating = [
        sum(cosine(scene.x[i], scene.x[j]) for i in window for j in window if i != j) / len(window) / (len(window) - 1)
        for window in inside
    ]
    count = min(remove // (side * side - 1), len(inside))
    merged = [inside[w] for w in sorted(top(rating, range(len(inside)), count))]
    gone = {i for window in merged for i in window}
    kept = [0, *(window[0] for window in merged), *(i for i in range(1, scene.n) if i not in gone)]
    return merge(scene, kept, [(i, window[0]) for window in merged for i in window[1:]])


def mustdrop(
    remove: int, share: float, side: int = 3, rows: int = 6, found: list[list[int]] | None = None
) -> Callable[[Feeds], Result]:
    def run(sample: Feeds) -> Result:
        def method(scene: Scene) -> Cut:
            if scene.layer == 0:
                return window_merge(scene, remove, side, rows)
            attention = scene.probs[:, 0].mean(0).tolist()
            keys = top(attention, range(1, scene.n), math.ceil(share * (scene.n - 1)))
            if found is not None:
                found.append([int(i in keys) for i in range(scene.n)])
            return Cut(list(range(scene.n)), scene.x, sizes=scene.sizes)

        return reference(vision(), sample, method, layers=[0, 3], prop_attn=False, at_end=True)

    return run


@pytest.mark.parametrize(
    ("tokens", "rows", "side", "remove", "length"),
    [(36, 6, 3, 17, 20), (36, 6, 2, 12, 24), (54, 6, 3, 32, 22), (36, 6, 3, 100, 4), (36, 6, 3, 7, 36)],
)
def test_images(tokens: int, rows: int, side: int, remove: int, length: int) -> None:
    """Some windows, windows of four, a grid that is not square, all windows, none."""
    step = {"preset": "mustdrop", "remove": remove, "keys": 0.2, "side": side, "grid_rows": rows}
    feeds = {"patches": patches(3, tokens + 1)}
    keys: list[list[int]] = []
    compare(vision(), feeds, step, mustdrop(remove, 0.2, side, rows, keys), engine=True)
    reduced, _ = reduce_program(program_of(vision(), feeds), policy(step))
    outputs = dict(zip(reduced.output_names, run_engine(reduced, feeds), strict=True))
    assert outputs["tokens"].shape[1] == length + 1
    assert outputs["tokens.key_tokens"].tolist() == keys
    assert outputs["tokens.key_tokens"].dtype == torch.int64


def test_any_number_of_images() -> None:
    step = {"preset": "mustdrop", "remove": 16}
    for batch in (1, 4):
        compare(
            vision(),
            {"patches": patches(batch, 37)},
            step,
            mustdrop(16, 0.08),
            dynamic={"patches": {0: Dim("batch", min=1, max=9)}},
            traced={"patches": patches(2, 37)},
        )


def test_keys_of_all_tokens() -> None:
    """Where tokens are given back, all patches of a merged window are keys, or none."""
    step = {"preset": "mustdrop", "remove": 16, "keys": 0.3}
    feeds = {"patches": patches(3, 37)}
    program = program_of(vision(), feeds)
    short, _ = reduce_program(program, policy(step))
    names = dict(zip(short.output_names, run_program(short, feeds), strict=True))
    whole, _ = reduce_program(program, policy(step, "full"))
    full = dict(zip(whole.output_names, run_program(whole, feeds), strict=True))["tokens.key_tokens"]
    assert torch.equal(full, names["tokens.key_tokens"].gather(1, names["tokens.token_assign"]))


def marked(step: dict[str, Any], later: dict[str, Any] | None = None) -> dict[str, Any]:
    steps = [{"node": "prune", "select": {"kind": "topk"}, "score": {"kind": "norm"}, **step}]
    return {"version": 1, "steps": steps + [later] * bool(later), "outputs": {"tokens": "reduced"}}


class TestMarks:
    """The reducer by itself."""

    def test_nothing_else_changes(self) -> None:
        feeds = {"patches": patches(2, 26)}
        step = {"at": {"layers": [1], "site": "block_output"}, "budget": {"tokens": 4}}
        wanted = marked({**step, "reduce": {"kind": "mark", "name": "best"}})
        program = program_of(vision(), feeds)
        reduced, plan = reduce_program(program, wanted)
        outputs = dict(zip(reduced.output_names, run_program(reduced, feeds), strict=True))
        torch.testing.assert_close(outputs["tokens"], vision()(**feeds)["tokens"], rtol=0, atol=1e-5)
        assert outputs["tokens.best"].sum(1).tolist() == [4, 4]
        assert not outputs["tokens.best"][:, 0].any()
        assert outputs["tokens.token_index"].tolist() == [list(range(26))] * 2
        assert len(plan.made) == 1

    @torch.no_grad()
    def test_marks_go_with_their_tokens(self) -> None:
        """Scores noted before a cut are those of the tokens that are left; padding has none."""
        feeds = sentences([20, 12, 5])
        step = {"at": {"layers": [0], "site": "block_output"}, "budget": {"keep": 1.0}, "protect": {"first": 1}}
        drop = {"node": "prune", "at": {"layers": [2]}, "score": {"kind": "attention_received"}}
        drop |= {"budget": {"keep": 0.5}, "protect": {"first": 1}}
        wanted = marked({**step, "reduce": {"kind": "mark", "name": "length", "value": "score"}}, drop)
        reduced, _ = reduce_program(program_of(text(), feeds), wanted)
        outputs = dict(zip(reduced.output_names, run_engine(reduced, feeds), strict=True))
        for row, sample in enumerate(inputs_of(feeds)):
            x = text().embed(sample["ids"])
            lengths = text().blocks[0](x, None)[0].norm(dim=1)
            count = 1 + math.ceil((len(lengths) - 1) / 2)
            index = outputs["tokens.token_index"][row, :count]
            torch.testing.assert_close(outputs["tokens.length"][row, :count], lengths[index], rtol=0, atol=1e-4)
            assert not outputs["tokens.length"][row, count:].any()

    def test_two_marks_of_one_name(self) -> None:
        feeds = {"patches": patches(1, 26)}
        step = {"at": {"layers": [0, 1], "site": "block_output"}, "budget": {"tokens": 4}}
        with pytest.raises(AxisError, match="two steps mark tokens as `best`"):
            run_eager(program_of(vision(), feeds), marked({**step, "reduce": {"kind": "mark", "name": "best"}}), feeds)

    def test_a_score_that_is_not_there(self) -> None:
        feeds = {"patches": patches(1, 26)}
        step = {"at": {"layers": [0], "site": "block_output"}, "budget": {"tokens": 4}, "select": {"kind": "uniform"}}
        reduce = {"kind": "mark", "name": "best", "value": "score"}
        with pytest.raises(AxisError, match="not made by a score"):
            run_eager(program_of(vision(), feeds), marked({**step, "reduce": reduce}), feeds)


def test_half_precision() -> None:
    step = policy({"preset": "mustdrop", "remove": 16})
    half = {"patches": patches(2, 37).half()}
    reduced, _ = reduce_program(trace(copy.deepcopy(vision()).half(), half), step)
    outputs: dict[str, Tensor] = dict(zip(reduced.output_names, run_program(reduced, half), strict=True))
    assert outputs["tokens"].dtype == torch.float16
    assert outputs["tokens"].isfinite().all()
    assert outputs["tokens.key_tokens"].sum(1).tolist() == [2, 2]  # of 20 patches


def test_a_grid_that_does_not_divide() -> None:
    with pytest.raises(AxisError, match="a grid of 5 x 5 tokens does not divide into windows of 3 x 3"):
        reduce_program(program_of(vision(), {"patches": patches(1, 26)}), policy("mustdrop"))


def test_padding() -> None:
    with pytest.raises(AxisError, match="no grid of fixed size"):
        reduce_program(program_of(text(), sentences([37, 12])), policy("mustdrop"))


def test_no_class_token() -> None:
    with pytest.raises(PlanError, match="class token"):
        reduce_program(program_of(audio(), {"frames": frames(1, 36)}), policy("mustdrop"))
