"""DivPrune (arXiv:2503.02175) against a NumPy greedy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from tests.passes.oracle import (
    Cut,
    Feeds,
    Method,
    Model,
    Result,
    Scene,
    compare,
    drop,
    policy,
    program_of,
    reference,
    run_engine,
)
from tests.passes.reference_models import WIDTH, audio, frames, patches, sentences, text, vision
from tokcc.errors import AxisError
from tokcc.passes.methods import library
from tokcc.testing import reduce_program, run_eager, trace


def distances(features: Tensor) -> np.ndarray:
    z = features.double().numpy()
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    return 1 - z @ z.T


def greedy(distance: np.ndarray, count: int) -> list[int]:
    chosen = [int(np.argmax(np.sort(distance, axis=0)[1]))]
    while len(chosen) < count:
        nearest = distance[chosen].min(axis=0)
        nearest[chosen] = -np.inf
        chosen.append(int(np.argmax(nearest)))
    return chosen


def divprune(model: Model, protected: int, count: int | None, keep: float = 0.098) -> Method:
    def method(scene: Scene) -> Cut | None:
        candidates = model.norm(scene.x)[protected:]
        wanted = max(1, int(keep * len(candidates) + 0.5)) if count is None else min(count, len(candidates))
        chosen = greedy(distances(candidates), wanted)
        return drop(scene, [*range(protected), *sorted(i + protected for i in chosen)])

    return method


def oracle(model: Model, protected: int, count: int | None = None) -> Callable[[Feeds], Result]:
    def run(sample: Feeds) -> Result:
        return reference(model, sample, divprune(model, protected, count), layers=[len(model.blocks) - 1], at_end=True)

    return run


def test_images() -> None:
    """0.098 of 64 patches is 6.27: six are kept."""
    results = compare(vision(), {"patches": patches(3, 65)}, "divprune", oracle(vision(), 1))
    assert results[0].lengths == [7]


def test_without_a_class_token() -> None:
    step = {"preset": "divprune", "budget": {"tokens": 9}}
    compare(audio(), {"frames": frames(2, 31)}, step, oracle(audio(), 0, 9), full=True)


@pytest.mark.parametrize("keep", [0.001, 1.0])
def test_one_token_and_all_tokens(keep: float) -> None:
    feeds = {"patches": patches(1, 17)}
    _, plan = run_eager(program_of(vision(), feeds), policy({"preset": "divprune", "keep": keep}), feeds)
    assert [space.size for space in plan.made] == ([2] if keep < 1 else [])


def test_dynamic_number_of_tokens() -> None:
    shapes = {"frames": {0: Dim("batch", min=1, max=9), 1: Dim("sequence", min=4, max=60)}}
    step = {"preset": "divprune", "budget": {"tokens": 6}}
    for tokens in (25, 6):
        compare(
            audio(2),
            {"frames": frames(3, tokens)},
            step,
            oracle(audio(2), 0, 6),
            dynamic=shapes,
            traced={"frames": frames(2, 16)},
        )


def test_padded_rows_with_a_fixed_number_of_tokens() -> None:
    step = {"preset": "divprune", "budget": {"tokens": 5}}
    compare(text(), sentences([20, 12, 4]), step, oracle(text(), 1, 5))


def test_padded_rows_with_a_share_are_refused() -> None:
    feeds = sentences([20, 12])
    with pytest.raises(AxisError, match="same number of tokens") as caught:
        run_eager(program_of(text(), feeds), policy("divprune"), feeds)
    assert "tokens: K" in (caught.value.help or "")


def test_smallest_distance_falls_with_the_number_of_tokens() -> None:
    feeds = {"frames": frames(1, 40)}
    with torch.no_grad():
        distance = distances(audio()(**feeds)["tokens"][0])
    previous = np.inf
    for count in (2, 4, 8, 16):
        step = {"preset": "divprune", "budget": {"tokens": count}}
        _, plan = run_eager(program_of(audio(), feeds), policy(step), feeds)
        chosen = plan.made[0].index[0].numpy()
        smallest = (distance[np.ix_(chosen, chosen)] + 9 * np.eye(count)).min()
        assert smallest <= previous + 1e-6
        previous = smallest


def test_copies_are_not_picked_twice() -> None:
    """With fewer distinct tokens than are wanted, the rest are copies, each position once."""
    model = audio()
    x = frames(1, 1).repeat(1, 12, 1)
    feeds = {"frames": x}
    _, plan = run_eager(program_of(model, feeds), policy({"preset": "divprune", "budget": {"tokens": 7}}), feeds)
    assert len(set(plan.made[0].index[0].tolist())) == 7


def test_one_selection_over_all_crops_of_an_image() -> None:
    """Crops keep different numbers; the sum is the share of all tokens, rounded."""
    feeds = {"frames": frames(4, 25)}
    model, program = audio(), program_of(audio(), feeds)
    step = policy({"preset": "divprune", "over": "batch", "keep": 0.17})
    reduced, _ = reduce_program(program, step)
    tokens, index, valid = run_engine(reduced, feeds)
    with torch.no_grad():
        dense = model(**feeds)["tokens"]
    chosen = greedy(distances(dense.flatten(0, 1)), 17)
    for crop in range(4):
        wanted = sorted(i - 25 * crop for i in chosen if i // 25 == crop)
        assert index[crop][valid[crop]].tolist() == wanted
        torch.testing.assert_close(tokens[crop][valid[crop]], dense[crop][wanted], rtol=0, atol=1e-4)


class Projected(nn.Module):
    """An encoder behind which a projector squeezes all channels but one."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.projector = vision(), nn.Linear(WIDTH, 6)
        with torch.no_grad():
            self.projector.weight.copy_(torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(5)))

    def forward(self, patches: Tensor) -> dict[str, Tensor]:
        return {"tokens": self.projector(self.encoder(patches)["tokens"][:, 1:])}


@torch.no_grad()
def test_distances_are_those_behind_the_projector() -> None:
    """The class token is cut off in front of it; its rows are not the first picks."""
    model, feeds = Projected().eval(), {"patches": patches(2, 38)}
    reduced, _ = reduce_program(trace(model, feeds), policy({"preset": "divprune", "budget": {"tokens": 8}}))
    tokens = run_engine(reduced, feeds)[0]
    for row, z in enumerate(model(**feeds)["tokens"]):
        chosen = sorted(greedy(distances(z), 8))
        torch.testing.assert_close(tokens[row], z[chosen], rtol=0, atol=1e-4)
        assert chosen != sorted(greedy(distances(vision()(feeds["patches"])["tokens"][row, 1:]), 8))


def test_default() -> None:
    assert library()["divprune"].params["keep"].default == 0.098
