"""TokenFLEX's projector (arXiv:2504.03154) against averages over cells and a gated MLP, one token at a time."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.export import Dim

from tests.passes.layers import Weights, random
from tests.passes.oracle import Cut, Feeds, Model, Result, Scene, at_output, compare, policy, program_of
from tests.passes.reference_models import WIDTH, audio, frames, patches, sentences, text, vision
from tokcc.errors import AxisError, PolicyError
from tokcc.passes.reducers.adaptive_pool import averaging
from tokcc.testing import reduce_program, run_program, trace

_HIDDEN = 24


def projector(width: int, *, bias: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(width)
    shapes = {"gate": (_HIDDEN, WIDTH), "up": (_HIDDEN, WIDTH), "down": (width, _HIDDEN)}
    made = {f"projector.{name}.weight": 2 * random(generator, *shape) for name, shape in shapes.items()}
    if bias:
        made |= {f"projector.{name}.bias": torch.randn(shape[0], generator=generator) for name, shape in shapes.items()}
    return made


def saved(folder: Path, weights: Weights) -> str:
    save_file(dict(weights), folder / "projector.safetensors")
    return str(folder / "projector.safetensors")


def cells(x: Tensor, height: int, width: int, rows: int, columns: int) -> list[Tensor]:
    """The mean of each cell, and nothing else: plain loops over the definition."""
    found = []
    for r in range(rows):
        for c in range(columns):
            down = range(math.floor(r * height / rows), math.ceil((r + 1) * height / rows))
            along = range(math.floor(c * width / columns), math.ceil((c + 1) * width / columns))
            members = [x[i * width + j] for i in down for j in along]
            found.append(torch.stack(members).mean(0))
    return found


def gated(x: Tensor, weights: Weights) -> Tensor:
    def linear(name: str, value: Tensor) -> Tensor:
        bias = weights.get(f"projector.{name}.bias")
        return weights[f"projector.{name}.weight"] @ value + (0 if bias is None else bias)

    return linear("down", F.silu(linear("gate", x)) * linear("up", x))


def oracle(model: Model, weights: Weights, grid: tuple[int, int], into: tuple[int, int]) -> Any:
    def method(scene: Scene) -> Cut:
        new = [gated(cell, weights) for cell in cells(scene.x, *grid, *into)]
        return Cut([-1] * len(new), torch.stack(new))

    def run(sample: Feeds) -> Result:
        return at_output(model, method)(sample)

    return run


def step(path: str, **changes: Any) -> dict[str, Any]:
    return {"preset": "tokenflex", "weights": path, **changes}


@pytest.mark.parametrize(
    ("grid", "into", "width"),
    [((6, 6), (3, 3), WIDTH), ((7, 7), (3, 3), 20), ((4, 9), (2, 4), 45), ((5, 5), (5, 5), WIDTH), ((3, 5), (1, 1), 7)],
)
def test_grids(grid: tuple[int, int], into: tuple[int, int], width: int, tmp_path: Path) -> None:
    """Cells that overlap, grids that are not square, as many tokens as there are, one token, other widths."""
    weights = projector(width)
    wanted = step(saved(tmp_path, weights), tokens=into[0] * into[1], grid_rows=grid[0])
    feeds = {"frames": frames(3, grid[0] * grid[1])}
    results = compare(audio(), feeds, wanted, oracle(audio(), weights, grid, into), engine=True)
    assert results[0].tokens.shape == (into[0] * into[1], width)


def test_cells_of_another_shape(tmp_path: Path) -> None:
    weights = projector(WIDTH, bias=False)
    select = {"kind": "cells", "grid_rows": 4, "rows": 4}
    wanted = step(saved(tmp_path, weights), tokens=8, select=select)
    compare(audio(), {"frames": frames(2, 24)}, wanted, oracle(audio(), weights, (4, 6), (4, 2)), engine=True)


def test_any_number_of_images(tmp_path: Path) -> None:
    weights = projector(11)
    wanted = step(saved(tmp_path, weights), tokens=4)
    for batch in (1, 4):
        compare(
            audio(2),
            {"frames": frames(batch, 25)},
            wanted,
            oracle(audio(2), weights, (5, 5), (2, 2)),
            dynamic={"frames": {0: Dim("batch", min=1, max=9)}},
            traced={"frames": frames(2, 25)},
            engine=True,
        )


def test_the_map_and_tokens_given_back(tmp_path: Path) -> None:
    """Every token belongs to the cell ``floor(row n / h)``, and is given its vector where all are asked for."""
    feeds = {"frames": frames(2, 49)}
    path = saved(tmp_path, projector(20))
    short, cell = run_program(reduce_program(program_of(audio(), feeds), policy(step(path, tokens=9)))[0], feeds)
    own = [i // 7 * 3 // 7 * 3 + i % 7 * 3 // 7 for i in range(49)]
    assert cell.tolist() == [own, own]
    whole = policy(step(path, tokens=9), "full")
    (full,) = run_program(reduce_program(program_of(audio(), feeds), whole)[0], feeds)
    torch.testing.assert_close(full, short[:, own], rtol=0, atol=0)


def test_pooling_alone_in_the_middle_of_a_model() -> None:
    """Without its projector it is a reducer like others, with the class token left as it is."""
    pool = {"node": "merge", "at": {"layers": [1], "site": "block_output"}, "select": {"kind": "cells"}}
    pool |= {"reduce": {"kind": "adaptive_pool"}, "budget": {"tokens": 9}}
    feeds = {"patches": patches(3, 50)}
    reduced, _ = reduce_program(program_of(vision(), feeds), policy(pool))
    tokens, pooled, _ = run_program(reduced, feeds)
    model = vision()
    with torch.no_grad():
        x = model.embed(feeds["patches"])
        for layer, block in enumerate(model.blocks):
            x = block(x)
            if layer == 1:
                rows = [torch.stack([row[0], *cells(row[1:], 7, 7, 3, 3)]) for row in x]
                x = torch.stack(rows)
        torch.testing.assert_close(tokens, model.norm(x), rtol=0, atol=1e-5)
        torch.testing.assert_close(pooled, model.head(model.norm(x)[:, 0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("into", "of"), [(1, 5), (3, 7), (7, 7), (4, 6)])
def test_averages(into: int, of: int) -> None:
    matrix = averaging(into, of)
    torch.testing.assert_close(matrix.sum(1), torch.ones(into))
    if into == of:
        assert torch.equal(matrix, torch.eye(of))
    x = torch.randn(of, generator=torch.Generator().manual_seed(of))
    torch.testing.assert_close(matrix @ x, F.adaptive_avg_pool1d(x[None], into)[0])


def test_half_precision(tmp_path: Path) -> None:
    feeds = {"frames": frames(2, 25)}
    wanted = policy(step(saved(tmp_path, projector(20)), tokens=4))
    half = {"frames": feeds["frames"].half()}
    reduced, _ = reduce_program(trace(copy.deepcopy(audio()).half(), half), wanted)
    tokens = run_program(reduced, half)[0]
    assert tokens.dtype == torch.float16
    exact = run_program(reduce_program(program_of(audio(), feeds), wanted)[0], feeds)[0]
    assert (tokens.float() - exact).abs().max() < 0.05 * exact.abs().max()


class TestRefusals:
    def test_weights_are_needed(self) -> None:
        with pytest.raises(PolicyError, match="`projected` is trained, and no weights are given"):
            reduce_program(program_of(audio(), {"frames": frames(1, 25)}), policy(step("", weights=None)))

    def test_a_class_token_has_no_place(self, tmp_path: Path) -> None:
        wanted = policy(step(saved(tmp_path, projector(WIDTH)), tokens=9, protect={"first": "auto"}))
        with pytest.raises(AxisError, match="protected tokens would not go through the projector"):
            reduce_program(program_of(vision(), {"patches": patches(1, 50)}), wanted)

    @pytest.mark.parametrize(
        ("tokens", "changes", "message"),
        [
            (24, {"tokens": 4}, "24 tokens are no grid of equal sides"),
            (24, {"tokens": 4, "grid_rows": 5}, "24 tokens are no grid of 5 rows"),
            (25, {"tokens": 7}, "a grid of 5 x 5 tokens cannot become one of 7"),
            (25, {"tokens": 6, "select": {"kind": "cells", "rows": 4}}, "cannot become one of 6 in 4 rows"),
        ],
    )
    def test_no_grid(self, tokens: int, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
        wanted = policy(step(saved(tmp_path, projector(WIDTH)), **changes))
        with pytest.raises(AxisError, match=message):
            reduce_program(program_of(audio(), {"frames": frames(1, tokens)}), wanted)

    def test_padding(self, tmp_path: Path) -> None:
        feeds = sentences([25, 12])
        wanted = policy(step(saved(tmp_path, projector(WIDTH)), tokens=4))
        with pytest.raises(AxisError, match="no grid of fixed size"):
            reduce_program(program_of(text(pooled=False), feeds), wanted)

    def test_another_width_before_layers(self, tmp_path: Path) -> None:
        wanted = policy(step(saved(tmp_path, projector(20)), tokens=4, at={"layers": [1], "site": "block_output"}))
        with pytest.raises(AxisError, match="makes tokens of width 20, and what follows counts on 32"):
            reduce_program(program_of(audio(), {"frames": frames(1, 25)}), wanted)

    def test_what_the_inner_reducer_cannot_take(self, tmp_path: Path) -> None:
        wanted = policy(step(saved(tmp_path, projector(20)), tokens=4, score={"kind": "norm"}, select={"kind": "topk"}))
        with pytest.raises(AxisError, match="`adaptive_pool` cannot take what is selected"):
            reduce_program(program_of(audio(), {"frames": frames(1, 25)}), wanted)

    @pytest.mark.parametrize(
        "of", [{"kind": "bypass"}, {"kind": "mark", "name": "m"}, {"kind": "projected", "of": {"kind": "drop"}}]
    )
    def test_a_reducer_that_leaves_no_tokens_to_project(self, of: dict[str, Any], tmp_path: Path) -> None:
        reduce = {"kind": "projected", "of": of, "weights": saved(tmp_path, projector(20))}
        choice = {"score": {"kind": "norm"}, "select": {"kind": "topk"}, "budget": {"tokens": 4}}
        wanted = policy({"preset": "tokenflex", **choice, "reduce": reduce})
        with pytest.raises(PolicyError, match=f"`{of['kind']}` makes no tokens of the model's width"):
            reduce_program(program_of(audio(), {"frames": frames(1, 25)}), wanted)
