"""QTSplus (arXiv:2511.11910) against its layers written out, with random weights in a file."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from tests.passes.guided import texts, words_of
from tests.passes.layers import Weights, attention, layer_weights, linear, mlp, mlp_weights, random, rms
from tests.passes.oracle import Cut, Feeds, Model, Result, Scene, at_output, compare, policy, program_of, share_of, top
from tests.passes.reference_models import WIDTH, audio, frames, patches, sentences, text, vision
from tokcc.errors import AxisError
from tokcc.testing import run_eager

_HEADS, _KV, _TEXT = 4, 2, 20


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Weights]:
    generator = torch.Generator().manual_seed(31)
    weights = {
        "text_norm.weight": 1 + 0.3 * torch.randn(_TEXT, generator=generator),
        "token_norm.weight": 1 + 0.3 * torch.randn(WIDTH, generator=generator),
        "cross_attn.q_proj.weight": 3 * random(generator, _HEADS * 8, _TEXT),
        "cross_attn.k_proj.weight": 3 * random(generator, _KV * 8, WIDTH),
        "cross_attn.k_proj.bias": random(generator, _KV * 8),
        **layer_weights(generator, "reencode", WIDTH, _HEADS, _KV, wide=4 * WIDTH),
        **mlp_weights(generator, "budget", [_TEXT + 3, 16, 1]),
    }
    path = tmp_path_factory.mktemp("qts") / "scorer.safetensors"
    save_file(weights, path)
    return str(path), weights


def step(path: str, **changes: object) -> dict[str, object]:
    return {"preset": "qts-plus", "weights": path, "query_heads": _HEADS, "kv_heads": _KV, **changes}


def reencoded(x: Tensor, weights: Weights) -> Tensor:
    y = rms(x, weights["reencode.input_layernorm.weight"])
    gathered, _ = attention(y, y, weights, "reencode.self_attn", _HEADS, _KV)
    assert gathered is not None
    x = x + gathered
    y = rms(x, weights["reencode.post_attention_layernorm.weight"])
    return x + linear(F.gelu(linear(y, weights, "reencode.mlp.up_proj")), weights, "reencode.mlp.down_proj")


def rated(z: Tensor, words: Tensor, weights: Weights) -> list[float]:
    asked, seen = rms(words, weights["text_norm.weight"]), rms(z, weights["token_norm.weight"])
    _, maps = attention(asked, seen, weights, "cross_attn", _HEADS, _KV)
    return [max(float(head[t, i]) for head in maps for t in range(len(words))) for i in range(len(z))]


def share_by_head(r: list[float], words: Tensor, weights: Weights) -> float:
    p = [value / sum(r) for value in r]
    entropy = -sum(value * math.log(value + 1e-8) for value in p)
    facts = torch.cat([words.mean(0), torch.tensor([math.log(len(r)), max(r), entropy])])
    return 0.05 + 0.45 * float(torch.sigmoid(mlp(facts[None], weights, "budget", 2, "gelu")))


def oracle(
    model: Model, protected: int, weights: Weights, count: Callable[[list[float], Tensor], int]
) -> Callable[[Feeds], Result]:
    def run(sample: Feeds) -> Result:
        def method(scene: Scene) -> Cut:
            z, words = scene.x[protected:], words_of(sample)
            r = rated(z, words, weights)
            chosen = sorted(top(r, range(len(z)), count(r, words)))
            kept = [*range(protected), *[i + protected for i in chosen]]
            return Cut(kept, torch.cat([scene.x[:protected], reencoded(z[chosen], weights)]))

        return at_output(model, method)(sample)

    return run


def test_images(scorer: tuple[str, Weights]) -> None:
    path, weights = scorer
    feeds = {"patches": patches(3, 50), **texts([3, 1, 2], width=_TEXT)}
    run = oracle(vision(), 1, weights, lambda r, _: share_of(len(r), 0.25))
    results = compare(vision(), feeds, step(path), run, traced={"patches": patches(3, 50)}, engine=True)
    assert results[0].lengths == [14]


def test_padded_rows_are_what_they_are_alone(scorer: tuple[str, Weights]) -> None:
    path, weights = scorer
    given = sentences([20, 12, 4])
    run = oracle(text(), 1, weights, lambda r, _: share_of(len(r), 0.5))
    compare(text(), {**given, **texts([2, 1, 3], width=_TEXT)}, step(path, keep=0.5), run, traced=given)


def test_the_head_decides_how_many(scorer: tuple[str, Weights]) -> None:
    """Samples fill different numbers of slots, and empty ones change nothing."""
    path, weights = scorer
    feeds = {"frames": frames(4, 40), **texts([3, 1, 2, 4], width=_TEXT, seed=3)}
    select = {"kind": "counted_by_text", "weights": path}

    def count(r: list[float], words: Tensor) -> int:
        return min(max(1, math.ceil(share_by_head(r, words, weights) * len(r))), 14)

    results = compare(
        audio(),
        feeds,
        step(path, select=select, budget={"tokens": 14}),
        oracle(audio(), 0, weights, count),
        traced={"frames": frames(4, 40)},
    )
    assert len({result.lengths[0] for result in results}) > 1


def test_the_head_counts_no_padding(scorer: tuple[str, Weights]) -> None:
    feeds = {**sentences([20, 12]), **texts([1, 1], width=_TEXT)}
    select = {"kind": "counted_by_text", "weights": scorer[0]}
    with pytest.raises(AxisError, match="padding"):
        run_eager(program_of(text(), sentences([20, 12])), policy(step(scorer[0], select=select)), feeds)
