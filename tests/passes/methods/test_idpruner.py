"""IDPruner (arXiv:2602.13315) against a NumPy greedy, with random weights of the scorer in a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from tests.passes.oracle import Cut, Feeds, Method, Result, Scene, compare, drop, policy, program_of, reference, top
from tests.passes.reference_models import WIDTH, audio, frames, patches, vision
from tokcc.errors import PolicyError
from tokcc.passes.methods import library
from tokcc.testing import run_eager


@pytest.fixture
def scorer(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    tensors = {
        "layers.0.weight": torch.randn(12, WIDTH, generator=generator) / WIDTH**0.5,
        "layers.0.bias": torch.randn(12, generator=generator),
        "layers.1.weight": torch.randn(1, 12, generator=generator),
        "layers.1.bias": torch.randn(1, generator=generator),
    }
    path = tmp_path / "scorer.safetensors"
    save_file(tensors, path)
    return path, tensors


def importance(z: Tensor, weights: dict[str, Tensor]) -> np.ndarray:
    hidden = F.gelu(z @ weights["layers.0.weight"].T + weights["layers.0.bias"])
    q = (hidden @ weights["layers.1.weight"].T + weights["layers.1.bias"])[:, 0].double().numpy()
    scaled: np.ndarray = (q - q.min()) / (q.max() - q.min() + 1e-6)
    return scaled


def idpruner(model: Any, protected: int, weights: dict[str, Tensor], share: float, lam: float) -> Method:
    def method(scene: Scene) -> Cut | None:
        z = model.norm(scene.x)[protected:]
        rated = importance(z, weights)
        unit = z.double().numpy()
        unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
        cosine = unit @ unit.T
        wanted = max(1, int(share * len(z) + 0.5))
        chosen = [int(np.argmax(rated))]
        while len(chosen) < wanted:
            margin = lam * rated - (1 - lam) * cosine[chosen].max(axis=0)
            margin[chosen] = -np.inf
            chosen.append(int(np.argmax(margin)))
        return drop(scene, [*range(protected), *sorted(i + protected for i in chosen)])

    return method


def oracle(
    model: Any, protected: int, weights: dict[str, Tensor], share: float = 0.25, lam: float = 0.5
) -> Callable[[Feeds], Result]:
    def run(sample: Feeds) -> Result:
        return reference(
            model, sample, idpruner(model, protected, weights, share, lam), layers=[len(model.blocks) - 1], at_end=True
        )

    return run


def test_images(scorer: tuple[Path, dict[str, Tensor]]) -> None:
    path, weights = scorer
    step = {"preset": "idpruner", "weights": str(path)}
    results = compare(vision(), {"patches": patches(3, 65)}, step, oracle(vision(), 1, weights), engine=True)
    assert results[0].lengths == [17]


def test_without_a_class_token_and_other_weights(scorer: tuple[Path, dict[str, Tensor]]) -> None:
    path, weights = scorer
    step = {"preset": "idpruner", "weights": str(path), "keep": 0.4, "relevance": 0.8}
    compare(audio(), {"frames": frames(2, 31)}, step, oracle(audio(), 0, weights, 0.4, 0.8))


def test_importance_alone_is_topk(scorer: tuple[Path, dict[str, Tensor]]) -> None:
    path, weights = scorer
    feeds = {"frames": frames(1, 31)}
    step = {"preset": "idpruner", "weights": str(path), "relevance": 1.0}
    _, plan = run_eager(program_of(audio(), feeds), policy(step), feeds)
    with torch.no_grad():
        rated = importance(audio()(**feeds)["tokens"][0], weights)
    assert plan.made[0].index[0].tolist() == sorted(top(rated.tolist(), range(31), 8))


def test_another_score_needs_no_weights() -> None:
    """The scorer is a plug: with the length of the tokens in its place nothing is trained."""
    feeds = {"frames": frames(1, 31)}
    step = {"preset": "idpruner", "score": {"kind": "norm", "of": "features"}, "relevance": 1.0}
    _, plan = run_eager(program_of(audio(), feeds), policy(step), feeds)
    with torch.no_grad():
        lengths = audio()(**feeds)["tokens"][0].norm(dim=1).tolist()
    assert plan.made[0].index[0].tolist() == sorted(top(lengths, range(31), 8))


def test_the_preset_alone_asks_for_weights() -> None:
    with pytest.raises(PolicyError, match="no weights are given") as caught:
        run_eager(program_of(audio(), {"frames": frames(1, 31)}), "idpruner", {"frames": frames(1, 31)})
    assert "layers.1.weight float[1, hidden_0]" in (caught.value.needed or "")
    assert library()["idpruner"].needs == ("trained",)
