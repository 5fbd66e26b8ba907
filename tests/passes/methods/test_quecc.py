"""QueCC's projector (arXiv:2411.03312) against its windows taken one by one and attention written out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.export import Dim

from tests.passes.layers import Weights, attention, linear, random
from tests.passes.oracle import Cut, Feeds, Result, Scene, at_output, compare, policy, program_of
from tests.passes.reference_models import WIDTH, audio, frames, sentences, text
from tokcc.errors import AxisError, PolicyError
from tokcc.testing import reduce_program, run_program, trace

_HEADS, _TEXT = 4, 20


def module(window: tuple[int, int], out: int = WIDTH, levels: int = 1, *, bias: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(out)
    wide = levels * WIDTH
    shapes = {
        "text": (WIDTH, _TEXT),
        **{f"{name}.0": (24, WIDTH if name == "query" else wide) for name in ("query", "key", "value")},
        **{f"{name}.1": (WIDTH, 24) for name in ("query", "key", "value")},
        **{f"attn.{part}_proj": (WIDTH, WIDTH) for part in "qkvo"},
        "projector.0": (40, WIDTH),
        "projector.1": (out, 40),
    }
    made = {f"{name}.weight": 2 * random(generator, *shape) for name, shape in shapes.items()}
    made["conv.weight"] = torch.randn(WIDTH, 1, *window, generator=generator)
    for norm in ("text", "query", "key", "value"):
        made[f"{norm}_norm.weight"] = 1 + 0.3 * torch.randn(WIDTH, generator=generator)
    if bias:
        made |= {f"{name}.bias": torch.randn(shape[0], generator=generator) for name, shape in shapes.items()}
        made["conv.bias"] = torch.randn(WIDTH, generator=generator)
        made |= {f"{n}_norm.bias": torch.randn(WIDTH, generator=generator) for n in ("text", "query", "key", "value")}
    return made


def saved(folder: Path, weights: Weights) -> str:
    save_file(dict(weights), folder / "quecc.safetensors")
    return str(folder / "quecc.safetensors")


def vectors(batch: int, seed: int = 7) -> dict[str, Tensor]:
    return {"text_vector": torch.randn(batch, _TEXT, generator=torch.Generator().manual_seed(seed))}


def encoded(x: Tensor, weights: Weights, name: str) -> Tensor:
    y = linear(F.gelu(linear(x, weights, f"{name}.0")), weights, f"{name}.1")
    return F.layer_norm(y, (WIDTH,), weights[f"{name}_norm.weight"], weights.get(f"{name}_norm.bias"))


def made_of(x: Tensor, many: Tensor, vector: Tensor, weights: Weights, grid: Any, into: Any) -> Tensor:
    (height, width), (rows, columns) = grid, into
    tall, wide = height // rows, width // columns
    said = linear(vector[None], weights, "text")
    said = F.layer_norm(said, (WIDTH,), weights["text_norm.weight"], weights.get("text_norm.bias"))
    # The convolution is torch's own, over the image.
    image = encoded(x + said, weights, "query").T.reshape(1, WIDTH, height, width)
    image = F.conv2d(image, weights["conv.weight"], weights.get("conv.bias"), (tall, wide), groups=WIDTH)[0]
    key, value = encoded(many, weights, "key"), encoded(many, weights, "value")
    found = []
    for r in range(rows):
        for c in range(columns):
            inside = [(r * tall + i) * width + c * wide + j for i in range(tall) for j in range(wide)]
            _, maps = attention(image[:, r, c][None], key[inside], keys_only(weights), "attn", _HEADS, _HEADS)
            own = linear(value[inside], weights, "attn.v_proj")
            parts = [maps[h] @ own[:, h * WIDTH // _HEADS : (h + 1) * WIDTH // _HEADS] for h in range(_HEADS)]
            found.append(linear(torch.cat(parts, 1), weights, "attn.o_proj")[0])
    return linear(F.gelu(linear(torch.stack(found), weights, "projector.0")), weights, "projector.1")


def keys_only(weights: Weights) -> Weights:
    """Without values, of which the attention of the helper would have keys and values be the same."""
    return {name: tensor for name, tensor in weights.items() if ".v_proj" not in name}


def oracle(weights: Weights, grid: Any, into: Any, levels: Sequence[int] = ()) -> Callable[[Feeds], Result]:
    def run(sample: Feeds) -> Result:
        outputs: list[Tensor] = []

        def method(scene: Scene) -> Cut:
            many = torch.cat([outputs[level] for level in levels], 1) if levels else scene.x
            new = made_of(scene.x, many, sample["text_vector"][0], weights, grid, into)
            return Cut([-1] * len(new), new)

        with torch.no_grad():
            x = audio().embed(sample["frames"])
            for block in audio().blocks:
                x = block(x)
                outputs.append(x[0])
            return at_output(audio(), method)(sample)

    return run


def step(path: str, **changes: Any) -> dict[str, Any]:
    return {"preset": "quecc", "weights": path, "query_heads": _HEADS, **changes}


@pytest.mark.parametrize(
    ("grid", "into", "out", "levels", "bias"),
    [
        ((6, 6), (3, 3), WIDTH, None, True),
        ((5, 5), (1, 1), 20, None, False),
        ((4, 9), (2, 3), 45, [0, 2, -1], True),
        ((3, 3), (3, 3), WIDTH, [1], False),
    ],
)
def test_grids(grid: Any, into: Any, out: int, levels: list[int] | None, bias: bool, tmp_path: Path) -> None:
    """Windows of several sizes and shapes, one window, one token in each; several layers side by side."""
    weights = module((grid[0] // into[0], grid[1] // into[1]), out, len(levels or [0]), bias=bias)
    select = {"kind": "cells", "grid_rows": grid[0], "rows": into[0]}
    wanted = step(saved(tmp_path, weights), tokens=into[0] * into[1], levels=levels, select=select)
    given = {"frames": frames(3, grid[0] * grid[1])}
    run = oracle(weights, grid, into, [level % 4 for level in levels or ()])
    results = compare(audio(), {**given, **vectors(3)}, wanted, run, traced=given, engine=True)
    assert results[0].tokens.shape == (into[0] * into[1], out)


def test_any_number_of_images(tmp_path: Path) -> None:
    weights = module((2, 2))
    wanted = step(saved(tmp_path, weights), tokens=4)
    for batch in (1, 4):
        compare(
            audio(),
            {"frames": frames(batch, 16), **vectors(batch)},
            wanted,
            oracle(weights, (4, 4), (2, 2)),
            dynamic={"frames": {0: Dim("batch", min=1, max=9)}},
            traced={"frames": frames(2, 16)},
            engine=True,
        )


def test_a_query_sees_its_own_window_only(tmp_path: Path) -> None:
    """Another token in the last window changes the last new token, and no other; so does no other text."""
    path = saved(tmp_path, module((3, 3)))
    feeds = {"x": torch.randn(1, 36, WIDTH, generator=torch.Generator().manual_seed(3))}
    reduced, _ = reduce_program(
        trace(PatchWise().eval(), feeds), {"version": 1, "steps": [step(path, tokens=4)], "outputs": {"*": "reduced"}}
    )
    before = run_program(reduced, {**feeds, **vectors(1)})[0]
    changed = feeds["x"].clone()
    changed[0, 35] += 1
    after = run_program(reduced, {"x": changed, **vectors(1)})[0]
    torch.testing.assert_close(after[:, :3], before[:, :3], rtol=0, atol=0)
    assert (after[:, 3] - before[:, 3]).abs().max() > 1e-3
    other = run_program(reduced, {**feeds, **vectors(1, seed=8)})[0]
    assert ((other - before).abs().amax(2) > 1e-3).all()


class PatchWise(torch.nn.Module):
    """One layer whose attention is to oneself alone, so that a token changes no other."""

    def __init__(self) -> None:
        super().__init__()
        self.block = copy.deepcopy(audio().blocks[0])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        mask = torch.eye(x.shape[1], dtype=torch.bool)[None, None]
        return {"tokens": self.block(x, mask)}


def test_half_precision(tmp_path: Path) -> None:
    given, extra = {"frames": frames(2, 36)}, vectors(2)
    wanted = policy(step(saved(tmp_path, module((2, 2))), tokens=9))
    half = {"frames": given["frames"].half()}
    reduced, _ = reduce_program(trace(copy.deepcopy(audio()).half(), half), wanted)
    tokens = run_program(reduced, {**half, **extra})[0]
    assert tokens.dtype == torch.float16
    exact = run_program(reduce_program(program_of(audio(), given), wanted)[0], {**given, **extra})[0]
    assert (tokens.float() - exact).abs().max() < 0.05 * exact.abs().max()


class TestRefusals:
    def test_weights_are_needed(self) -> None:
        with pytest.raises(PolicyError, match=r"is trained, and no weights are given"):
            reduce_program(program_of(audio(), {"frames": frames(1, 36)}), policy(step("", weights=None)))

    def test_a_tensor_that_is_missing(self, tmp_path: Path) -> None:
        weights = module((2, 2))
        del weights["value_norm.weight"]
        with pytest.raises(PolicyError, match=r"the weights have no tensor `value_norm\.weight`"):
            reduce_program(program_of(audio(), {"frames": frames(1, 36)}), policy(step(saved(tmp_path, weights))))

    @pytest.mark.parametrize(
        ("tokens", "message"),
        [
            (16, "a grid of 6 x 6 tokens does not divide into 4 x 4 windows"),
            (4, "the weights are for windows of 2 x 2 tokens, and the budget makes windows of 3 x 3"),
        ],
    )
    def test_windows(self, tokens: int, message: str, tmp_path: Path) -> None:
        wanted = policy(step(saved(tmp_path, module((2, 2))), tokens=tokens))
        with pytest.raises(AxisError, match=message):
            reduce_program(program_of(audio(), {"frames": frames(1, 36)}), wanted)

    def test_the_text_is_missing(self, tmp_path: Path) -> None:
        given = {"frames": frames(2, 36)}
        reduced, _ = reduce_program(program_of(audio(), given), policy(step(saved(tmp_path, module((2, 2))), tokens=9)))
        assert "text_vector" in {reduced.public_name(node) for node in reduced.user_inputs}
        with pytest.raises(ValueError, match="text_vector"):
            run_program(reduced, given)

    def test_padding(self, tmp_path: Path) -> None:
        with pytest.raises(AxisError, match="no grid of fixed size"):
            reduce_program(
                program_of(text(pooled=False), sentences([36, 12])), policy(step(saved(tmp_path, module((2, 2)))))
            )
