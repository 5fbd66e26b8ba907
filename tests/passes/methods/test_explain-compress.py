"""Compression from explanations (arXiv:2506.01097) against its composition, with random weights in a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.export import Dim

from tests.passes.guided import choosing, texts, words_of
from tests.passes.layers import Weights, linear, random, rms, turned
from tests.passes.oracle import Feeds, Scene, compare, policy, program_of, share_of, top
from tests.passes.reference_models import WIDTH, audio, frames, patches, vision
from tokcc.errors import AxisError
from tokcc.testing import run_eager

_HEADS, _KV, _THETA, _WIDTH = 4, 2, 1e3, 8


def layer_zero(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "input_layernorm.weight": 1 + 0.3 * torch.randn(WIDTH, generator=generator),
        "self_attn.q_proj.weight": 3 * random(generator, _HEADS * _WIDTH, WIDTH),
        "self_attn.k_proj.weight": 3 * random(generator, _KV * _WIDTH, WIDTH),
        "self_attn.k_proj.bias": random(generator, _KV * _WIDTH),
    }


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Weights]:
    generator = torch.Generator().manual_seed(51)
    weights = {
        **layer_zero(generator),
        "conv.layers.0.weight": 3 * torch.randn(6, _HEADS, 3, 3, generator=generator),
        "conv.layers.0.bias": torch.randn(6, generator=generator),
        "conv.layers.1.weight": torch.randn(5, 6, 3, 3, generator=generator),
        "conv.head.weight": torch.randn(1, 5, 1, 1, generator=generator),
        "conv.head.bias": torch.randn(1, generator=generator),
    }
    path = tmp_path_factory.mktemp("explain") / "scorer.safetensors"
    save_file(weights, path)
    return str(path), weights


def step(path: str, **changes: object) -> dict[str, object]:
    own = {"weights": path, "query_heads": _HEADS, "kv_heads": _KV, "rope_theta": _THETA, "convolutions": 2}
    return {"preset": "explain-compress", **own, **changes}


def text_attention(z: Tensor, words: Tensor, weights: Weights) -> Tensor:
    """Mean attention of the words to each token, ``[H, M]``: causal, one word after the other."""
    states = rms(torch.cat([z, words]), weights["input_layernorm.weight"])
    q, k = linear(states, weights, "self_attn.q_proj"), linear(states, weights, "self_attn.k_proj")
    maps = []
    for head in range(_HEADS):
        own = head * _KV // _HEADS
        one = turned(q[:, head * _WIDTH : (head + 1) * _WIDTH], _THETA)
        other = turned(k[:, own * _WIDTH : (own + 1) * _WIDTH], _THETA)
        rows = [
            torch.softmax(one[i] @ other[: i + 1].T / _WIDTH**0.5, dim=0)[: len(z)] for i in range(len(z), len(states))
        ]
        maps.append(torch.stack(rows).mean(0))
    return torch.stack(maps)


def correlated(image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution with zeros around the image, one place at a time."""
    out, _, side, _ = weight.shape
    wide = F.pad(image, (side // 2,) * 4)
    result = torch.zeros(out, *image.shape[1:])
    for row in range(image.shape[1]):
        for column in range(image.shape[2]):
            patch = wide[:, row : row + side, column : column + side]
            result[:, row, column] = (weight * patch).sum((1, 2, 3))
    return result if bias is None else result + bias[:, None, None]


def explained(weights: Weights, rows: int, share: float) -> Callable[[Tensor, Scene, Feeds], list[int]]:
    def choose(z: Tensor, scene: Scene, sample: Feeds) -> list[int]:
        del scene
        image = text_attention(z, words_of(sample), weights).reshape(_HEADS, rows, -1)
        for i in range(2):
            if f"conv.layers.{i}.weight" in weights:
                kernel = weights[f"conv.layers.{i}.weight"]
                image = F.gelu(correlated(image, kernel, weights.get(f"conv.layers.{i}.bias")))
        rating = correlated(image, weights["conv.head.weight"], weights.get("conv.head.bias"))
        return top(rating.flatten().tolist(), range(len(z)), share_of(len(z), share, "round"))

    return choose


def test_images(scorer: tuple[str, Weights]) -> None:
    path, weights = scorer
    feeds = {"patches": patches(3, 37), **texts([3, 1, 4])}
    run = choosing(vision(), 1, explained(weights, 6, 0.5))
    results = compare(vision(), feeds, step(path), run, traced={"patches": patches(3, 37)}, engine=True)
    assert results[0].lengths == [19]


def test_a_grid_that_is_not_square(scorer: tuple[str, Weights]) -> None:
    path, weights = scorer
    feeds = {"frames": frames(2, 24), **texts([2, 2])}
    run = choosing(audio(), 0, explained(weights, 3, 0.25))
    compare(audio(), feeds, step(path, keep=0.25, grid_rows=3), run, traced={"frames": frames(2, 24)})


def test_without_convolutions_the_attention_itself_decides(tmp_path: Path) -> None:
    """An even head over all heads is the mean attention of the prompt, as in pruning at the model's input."""
    weights = layer_zero(torch.Generator().manual_seed(52)) | {
        "conv.head.weight": torch.full((1, _HEADS, 1, 1), 1 / _HEADS)
    }
    save_file(weights, tmp_path / "w.safetensors")
    feeds = {"frames": frames(1, 25), **texts([3])}
    wanted = policy(step(str(tmp_path / "w.safetensors"), convolutions=0))
    _, plan = run_eager(program_of(audio(), {"frames": frames(1, 25)}), wanted, feeds)
    with torch.no_grad():
        z = audio()(feeds["frames"])["tokens"][0]
    rating = text_attention(z, words_of(feeds), weights).mean(0).tolist()
    assert plan.made[0].index[0].tolist() == sorted(top(rating, range(25), 13))


def test_tokens_that_are_no_grid(scorer: tuple[str, Weights]) -> None:
    feeds = {"frames": frames(1, 24), **texts([1])}
    with pytest.raises(AxisError, match="no grid"):
        run_eager(program_of(audio(), {"frames": frames(1, 24)}), policy(step(scorer[0])), feeds)


def test_any_number_of_images(scorer: tuple[str, Weights]) -> None:
    path, weights = scorer
    run = choosing(audio(2), 0, explained(weights, 5, 0.4))
    for batch in (1, 4):
        compare(
            audio(2),
            {"frames": frames(batch, 25), **texts([2] * batch)},
            step(path, keep=0.4),
            run,
            dynamic={"frames": {0: Dim("batch", min=1, max=9)}},
            traced={"frames": frames(2, 25)},
        )
