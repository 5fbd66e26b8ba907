"""VQToken's clusters (arXiv:2503.16980) against k-means in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.passes.oracle import Scene, inputs_of, policy, program_of, reference, run_engine
from tests.passes.reference_models import audio, frames, patches, sentences, text, vision
from tests.passes.test_pieces import make_cut
from tokcc.errors import AxisError
from tokcc.passes.selectors.kmeans import KMeans
from tokcc.testing import reduce_program, run_eager, run_program

Array = npt.NDArray[np.float64]


def kmeans(x: Array, first: list[int], rounds: int) -> tuple[Array, list[int]]:
    """Return the means of unit vectors and each token's cluster."""
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    centres, member = unit[first].copy(), [0] * len(unit)
    for _ in range(rounds):
        scaled = centres / np.linalg.norm(centres, axis=1, keepdims=True)
        member = (unit @ scaled.T).argmax(axis=1).tolist()
        for c in range(len(centres)):
            own = [i for i, to in enumerate(member) if to == c]
            if own:
                centres[c] = unit[own].mean(axis=0)
    return centres, member


def farthest(x: Array, count: int) -> list[int]:
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    chosen = [0]
    while len(chosen) < count:
        distance = (1 - unit @ unit[chosen].T).min(axis=1)
        distance[chosen] = -1
        chosen.append(int(distance.argmax()))
    return sorted(chosen)


def normed(model: Any, sample: Any) -> Array:
    found: list[Scene] = []
    reference(model, sample, found.append, layers=(3,), at_end=True)
    made: Array = model.norm(found[0].x).detach().double().numpy()
    return made


@pytest.mark.parametrize("start", ["uniform", "far"])
@pytest.mark.parametrize("rounds", [1, 8])
def test_images(start: str, rounds: int) -> None:
    feeds = {"patches": patches(3, 65)}
    step = policy({"preset": "vqtoken", "tokens": 7, "rounds": rounds, "start": start})
    reduced, _ = reduce_program(program_of(vision(), feeds), step)
    outputs = dict(zip(reduced.output_names, run_engine(reduced, feeds), strict=True))
    for row, sample in enumerate(inputs_of(feeds)):
        x = normed(vision(), sample)
        first = [i * 64 // 7 for i in range(7)] if start == "uniform" else farthest(x[1:], 7)
        centres, member = kmeans(x[1:], first, rounds)
        wanted = torch.from_numpy(np.concatenate([x[:1], centres])).float()
        torch.testing.assert_close(outputs["tokens"][row], wanted, rtol=0, atol=1e-4)
        assert outputs["tokens.token_assign"][row].tolist() == [0, *(c + 1 for c in member)]


def test_without_a_class_token() -> None:
    feeds = {"frames": frames(2, 31)}
    reduced, _ = reduce_program(program_of(audio(), feeds), policy({"preset": "vqtoken", "tokens": 5}))
    tokens = run_program(reduced, feeds)[0]
    for row, sample in enumerate(inputs_of(feeds)):
        centres, _ = kmeans(normed(audio(), sample), [i * 31 // 5 for i in range(5)], 10)
        torch.testing.assert_close(tokens[row], torch.from_numpy(centres).float(), rtol=0, atol=1e-4)


def test_distinct_repeated_vectors_are_found_again() -> None:
    """Three vectors five times each, at any length: the means are their directions, the sizes five."""
    directions = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    lengths = torch.rand(2, 15, 1, generator=torch.Generator().manual_seed(3)) + 0.5
    x = directions.repeat_interleave(5, 0)[None] * lengths
    chosen = KMeans().select(make_cut(3, x=x), None)
    unit = directions / directions.norm(dim=1, keepdim=True)
    torch.testing.assert_close(chosen.matrix @ x, unit.expand(2, -1, -1))
    assert (chosen.matrix > 0).sum(2).tolist() == [[5, 5, 5]] * 2


def test_an_empty_cluster_keeps_its_centre() -> None:
    """Of two equal first centres the second one is never the first of largest cosine."""
    x = torch.randn(2, 15, 8, generator=torch.Generator().manual_seed(4))
    x[:, 5] = x[:, 0]
    made = KMeans(rounds=4).select(make_cut(3, x=x), None).matrix @ x
    for row in range(2):
        centres, member = kmeans(x[row].double().numpy(), [0, 5, 10], 4)
        torch.testing.assert_close(made[row].double(), torch.from_numpy(centres), rtol=0, atol=1e-5)
        assert member.count(0) > 0


def test_padded_batches_are_refused() -> None:
    feeds = sentences([20, 12])
    with pytest.raises(AxisError, match="padding would be clustered"):
        run_eager(program_of(text(), feeds), policy("vqtoken"), feeds)
