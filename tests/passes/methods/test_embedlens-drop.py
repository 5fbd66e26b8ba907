"""EmbedLens (arXiv:2603.00510) against the nearest entries of a vocabulary, one token at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.passes.guided import choosing
from tests.passes.oracle import Feeds, Scene, compare, cosine, policy, program_of, share_of, top
from tests.passes.reference_models import WIDTH, audio, frames, patches, vision
from tokcc.errors import AxisError
from tokcc.testing import run_eager

_TARGETS = (3, 17, 40)


@pytest.fixture
def table(tmp_path: Path) -> tuple[str, Tensor]:
    """A vocabulary of which targets lie near many tokens, as sinks do."""
    vocabulary = torch.randn(60, WIDTH, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        typical = vision()(patches(3, 50))["tokens"][:, 1:].reshape(-1, WIDTH)
    vocabulary[list(_TARGETS)] = 0.5 * typical[[1, 40, 90]] + 0.7 * vocabulary[list(_TARGETS)]
    path = tmp_path / "table.safetensors"
    save_file({"vocabulary": vocabulary}, path)
    return str(path), vocabulary


def margins(z: Tensor, vocabulary: Tensor, nearest: int) -> list[float]:
    result = []
    for token in z:
        every = [cosine(token, entry) for entry in vocabulary]
        margin = max(every[target] for target in _TARGETS)
        result.append(margin - (sorted(every, reverse=True)[nearest - 1] if nearest else 0.0))
    return result


@pytest.mark.parametrize("nearest", [3, 1, 0])
def test_images(table: tuple[str, Tensor], nearest: int) -> None:
    path, vocabulary = table

    def choose(z: Tensor, scene: Scene, sample: Feeds) -> list[int]:
        del scene, sample
        low = [-margin for margin in margins(z, vocabulary, nearest)]
        return top(low, range(len(z)), share_of(len(z), 0.6, "round"))

    step = {"preset": "embedlens-drop", "weights": path, "targets": list(_TARGETS), "nearest": nearest}
    results = compare(vision(), {"patches": patches(3, 50)}, step, choosing(vision(), 1, choose), engine=True)
    assert results[0].lengths == [1 + share_of(49, 0.6, "round")]


def test_as_many_as_are_alive_is_the_published_rule(table: tuple[str, Tensor]) -> None:
    """Removed are exactly the tokens with a target among their three nearest entries."""
    path, vocabulary = table
    feeds = {"patches": patches(1, 50)}
    with torch.no_grad():
        z = vision()(**feeds)["tokens"][0, 1:]
    alive = []
    for place, token in enumerate(z):
        every = [cosine(token, entry) for entry in vocabulary]
        if not {*_TARGETS} & {*top(every, range(len(every)), 3)}:
            alive.append(place)
    assert 5 < len(alive) < 45
    step = {"preset": "embedlens-drop", "weights": path, "targets": list(_TARGETS), "budget": {"tokens": len(alive)}}
    _, plan = run_eager(program_of(vision(), feeds), policy(step), feeds)
    assert plan.made[0].index[0].tolist() == [0, *[place + 1 for place in alive]]


def test_tokens_brought_to_the_tables_space(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(8)
    vocabulary, weight = torch.randn(50, 12, generator=generator), torch.randn(12, WIDTH, generator=generator)
    save_file({"vocabulary": vocabulary, "projection.weight": weight}, tmp_path / "w.safetensors")

    def choose(z: Tensor, scene: Scene, sample: Feeds) -> list[int]:
        del scene, sample
        low = [-margin for margin in margins(z @ weight.T, vocabulary, 3)]
        return top(low, range(len(z)), share_of(len(z), 0.5, "round"))

    step = {
        "preset": "embedlens-drop",
        "weights": str(tmp_path / "w.safetensors"),
        "targets": list(_TARGETS),
        "projection": True,
        "keep": 0.5,
    }
    compare(audio(), {"frames": frames(2, 25)}, step, choosing(audio(), 0, choose))


def test_a_target_beyond_the_vocabulary(table: tuple[str, Tensor]) -> None:
    feeds = {"patches": patches(1, 17)}
    with pytest.raises(AxisError, match="vocabulary of 60"):
        run_eager(program_of(vision(), feeds), policy({"preset": "embedlens-drop", "weights": table[0]}), feeds)
