"""CaCoVID (arXiv:2602.01649) against its steps in Python, with random weights in a file."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.passes.guided import choosing, texts, words_of
from tests.passes.layers import Weights, layer, layer_weights, mlp, mlp_weights, rms
from tests.passes.oracle import Feeds, Scene, compare, policy, program_of, top
from tests.passes.reference_models import WIDTH, audio, frames, patches, sentences, text, vision
from tokcc.errors import AxisError
from tokcc.testing import run_eager

_HEADS, _KV, _THETA = 4, 2, 1e4


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Weights]:
    generator = torch.Generator().manual_seed(21)
    widths = [WIDTH, 16, 8, 4, 16, 2]
    weights = {
        **layer_weights(generator, "layers.0", WIDTH, _HEADS, _KV),
        "norm.weight": 1 + 0.3 * torch.randn(WIDTH, generator=generator),
        **mlp_weights(generator, "token_head", widths),
        **mlp_weights(generator, "frame_head", widths),
    }
    path = tmp_path_factory.mktemp("cacovid") / "scorer.safetensors"
    save_file(weights, path)
    return str(path), weights


def quotas(y: list[float], size: int, kappa: Fraction, rho: Fraction, most: Fraction) -> list[int]:
    t = len(y)
    scaled = [3 * value / max(abs(v) for v in y) for value in y]
    total = sum(math.exp(s) for s in scaled)
    pi = [min(max(math.exp(s) / total, 1 / (2 * t)), float(most / (t * kappa))) for s in scaled]
    pi = [p / sum(pi) for p in pi]
    goal = math.floor(rho * kappa * t * size + Fraction(1, 2))
    cap = max(1, math.floor(rho * size * most))
    n = [min(max(math.floor(p * goal + 0.5), 1), cap) for p in pi]
    wanted = math.floor(rho * kappa * t * size)
    while sum(n) > wanted:
        n[n.index(max(n))] -= 1
    while sum(n) < wanted:
        n[n.index(min(n))] += 1
    return n


def evenly(left: list[int], count: int) -> list[int]:
    last = len(left) - 1
    return [left[math.floor(Fraction(i * last, max(count - 1, 1)) + Fraction(1, 2))] for i in range(count)]


def cacovid(
    weights: Weights, t: int, keep: str, rho: str = "0.5", most: str = "0.5"
) -> Callable[[Tensor, Scene, Feeds], list[int]]:
    def choose(z: Tensor, scene: Scene, sample: Feeds) -> list[int]:
        del scene
        size, kappa, share = len(z) // t, Fraction(keep), Fraction(rho)
        states = layer(torch.cat([z, words_of(sample)]), weights, "layers.0", _HEADS, _KV, _THETA)
        states = rms(states, weights["norm.weight"])[: len(z)]
        tokens = mlp(states, weights, "token_head", 5)
        of_frames = mlp(states.reshape(t, size, WIDTH).mean(1), weights, "frame_head", 5)
        rating = (tokens[:, 1] - tokens[:, 0]).tolist()
        n = quotas((of_frames[:, 1] - of_frames[:, 0]).tolist(), size, kappa, share, Fraction(most))
        kept = [i for f in range(t) for i in top(rating, range(f * size, (f + 1) * size), n[f])]
        left = [i for i in range(len(z)) if i not in kept]
        return [*kept, *evenly(left, math.floor(kappa * len(z)) - len(kept))]

    return choose


def step(path: str, **changes: object) -> dict[str, object]:
    return {
        "preset": "cacovid",
        "weights": path,
        "query_heads": _HEADS,
        "kv_heads": _KV,
        "rope_theta": _THETA,
        **changes,
    }


@pytest.mark.parametrize(("frames_", "keep", "rho"), [(4, "0.25", "0.5"), (4, "0.5", "0.3"), (6, "0.4", "0.8")])
def test_videos(scorer: tuple[str, Weights], frames_: int, keep: str, rho: str) -> None:
    path, weights = scorer
    feeds = {"frames": frames(3, 72), **texts([3, 1, 5])}
    changes = {"frames": frames_, "keep": float(keep), "important": float(rho)}
    choice = cacovid(weights, frames_, keep, rho)
    results = compare(
        audio(),
        feeds,
        step(path, **changes),
        choosing(audio(), 0, choice),
        traced={"frames": frames(3, 72)},
        engine=True,
    )
    assert results[0].lengths == [math.floor(Fraction(keep) * 72)]


def test_special_tokens_stay(scorer: tuple[str, Weights]) -> None:
    path, weights = scorer
    feeds = {"patches": patches(2, 49), **texts([2, 2])}
    choice = cacovid(weights, 3, "0.5")
    compare(
        vision(),
        feeds,
        step(path, frames=3, keep=0.5),
        choosing(vision(), 1, choice),
        traced={"patches": patches(2, 49)},
    )


def test_nothing_important_is_uniform(scorer: tuple[str, Weights]) -> None:
    path, _ = scorer
    feeds = {"frames": frames(1, 40), **texts([2])}
    program = program_of(audio(), {"frames": frames(1, 40)})
    _, plan = run_eager(program, policy(step(path, frames=4, keep=0.25, important=0.0)), feeds)
    assert plan.made[0].index[0].tolist() == evenly(list(range(40)), 10)


def test_the_text_matters_up_to_its_count(scorer: tuple[str, Weights]) -> None:
    path, _ = scorer
    program = program_of(audio(), {"frames": frames(1, 40)})
    wanted = policy(step(path, frames=4, keep=0.25, important=1.0))
    feeds = {"frames": frames(1, 40), **texts([2], rows=4)}
    kept = run_eager(program, wanted, feeds)[1].made[0].index
    behind = {**feeds, "text": torch.cat([feeds["text"][:, :2], 9 * feeds["text"][:, 2:]], 1)}
    assert torch.equal(kept, run_eager(program, wanted, behind)[1].made[0].index)
    assert not torch.equal(kept, run_eager(program, wanted, {**feeds, "text": -feeds["text"]})[1].made[0].index)


def test_padding_is_refused(scorer: tuple[str, Weights]) -> None:
    feeds = {**sentences([21, 13]), **texts([1, 1])}
    with pytest.raises(AxisError, match="padding"):
        run_eager(program_of(text(), sentences([21, 13])), policy(step(scorer[0], frames=4)), feeds)
