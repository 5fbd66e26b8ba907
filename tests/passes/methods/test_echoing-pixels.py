"""EchoingPixels (arXiv:2512.10324), its visual part, against layers written out, with random weights in a file."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from safetensors.torch import save_file

from tests.passes.guided import texts, words_of
from tests.passes.layers import Weights, layer, layer_weights, mlp, mlp_weights, rms
from tests.passes.oracle import Cut, Feeds, Model, Result, Scene, at_output, compare, policy, program_of, share_of, top
from tests.passes.reference_models import WIDTH, audio, frames, patches, vision
from tokcc.testing import reduce_program

_HEADS, _KV, _THETA = 4, 2, 1e4


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Weights]:
    generator = torch.Generator().manual_seed(61)
    weights = {
        **layer_weights(generator, "layers.0", WIDTH, _HEADS, _KV),
        **layer_weights(generator, "layers.1", WIDTH, _HEADS, _KV),
        "norm.weight": 1 + 0.3 * torch.randn(WIDTH, generator=generator),
        **mlp_weights(generator, "head", [WIDTH, WIDTH, 1]),
    }
    path = tmp_path_factory.mktemp("echo") / "scorer.safetensors"
    save_file(weights, path)
    return str(path), weights


def step(path: str, **changes: object) -> dict[str, object]:
    own = {"weights": path, "query_heads": _HEADS, "kv_heads": _KV, "rope_theta": _THETA}
    return {"preset": "echoing-pixels", **own, **changes}


def oracle(model: Model, protected: int, weights: Weights, share: float, depth: int) -> Callable[[Feeds], Result]:
    def run(sample: Feeds) -> Result:
        def method(scene: Scene) -> Cut:
            states = torch.cat([scene.x[protected:], words_of(sample)])
            for i in range(depth):
                states = layer(states, weights, f"layers.{i}", _HEADS, _KV, _THETA)
            states = states[: scene.n - protected]
            rating = mlp(rms(states, weights["norm.weight"]), weights, "head", 2)[:, 0].tolist()
            chosen = sorted(top(rating, range(len(states)), share_of(len(states), share)))
            kept = [*range(protected), *[i + protected for i in chosen]]
            return Cut(kept, torch.cat([scene.x[:protected], states[chosen]]))

        return at_output(model, method)(sample)

    return run


@pytest.mark.parametrize("depth", [1, 2])
def test_images(scorer: tuple[str, Weights], depth: int) -> None:
    path, weights = scorer
    feeds = {"patches": patches(3, 50), **texts([3, 1, 2])}
    run = oracle(vision(), 1, weights, 0.2, depth)
    results = compare(vision(), feeds, step(path, depth=depth), run, traced={"patches": patches(3, 50)}, engine=True)
    assert results[0].lengths == [11]


def test_other_shares(scorer: tuple[str, Weights]) -> None:
    path, weights = scorer
    feeds = {"frames": frames(2, 30), **texts([2, 2])}
    run = oracle(audio(), 0, weights, 0.05, 1)
    compare(audio(), feeds, step(path, keep=0.05), run, traced={"frames": frames(2, 30)})


def test_the_layers_are_computed_once(scorer: tuple[str, Weights]) -> None:
    """What rates the tokens is what they are replaced by: one softmax of a trained attention, not two."""
    feeds = {"frames": frames(2, 30)}
    reduced, _ = reduce_program(program_of(audio(), feeds), policy(step(scorer[0])))
    softmaxes = [node for node in reduced.graph.nodes if "softmax" in str(node.target) and "tokcc" in node.meta]
    assert len(softmaxes) == 1
