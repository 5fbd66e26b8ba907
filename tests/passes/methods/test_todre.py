"""ToDRE's first stage (arXiv:2505.18757) against a NumPy greedy."""

from __future__ import annotations

import numpy as np
import pytest

from tests.passes.oracle import Cut, Method, Model, Scene, at_output, compare, drop, share_of
from tests.passes.reference_models import audio, frames, patches, sentences, text, vision
from tokcc.passes.methods import library


def grown(scene: Scene, protected: int, start: int, count: int, against: str) -> Cut:
    z = scene.x[protected:].double().numpy()
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    distance = 1 - z @ z.T
    chosen = [start]
    while len(chosen) < count:
        rows = distance[chosen]
        value = rows.min(axis=0) if against == "nearest" else rows.sum(axis=0)
        value[chosen] = -np.inf
        chosen.append(int(value.argmax()))
    return drop(scene, [*range(protected), *sorted(i + protected for i in chosen)])


def todre(against: str, *, keep: float = 0.1, count: int | None = None) -> Method:
    def method(scene: Scene) -> Cut:
        start = int(scene.rows[-1].mean(0)[1:].argmax())
        return grown(scene, 1, start, count or share_of(scene.n - 1, keep, "round"), against)

    return method


def outlier(model: Model, count: int) -> Method:
    """The start without a class token: the token least like the mean direction."""

    def method(scene: Scene) -> Cut:
        z = scene.x.double().numpy()
        z = z / np.linalg.norm(z, axis=1, keepdims=True)
        return grown(scene, 0, int((z @ z.mean(axis=0)).argmin()), count, "nearest")

    return method


@pytest.mark.parametrize("against", ["nearest", "all"])
@pytest.mark.parametrize("keep", [0.1, 0.4])
def test_images(against: str, keep: float) -> None:
    step = {"preset": "todre", "keep": keep, "against": against}
    compare(vision(), {"patches": patches(3, 65)}, step, at_output(vision(), todre(against, keep=keep)), engine=True)


def test_the_two_versions_differ() -> None:
    results = [at_output(vision(), todre(kind, keep=0.3))({"patches": patches(1, 65)}) for kind in ("nearest", "all")]
    assert results[0].cuts[0].kept != results[1].cuts[0].kept


def test_without_a_class_token() -> None:
    score = {"kind": "similarity", "to": "mean", "sign": -1}
    step = {"preset": "todre", "budget": {"tokens": 7}, "score": score}
    compare(audio(), {"frames": frames(2, 31)}, step, at_output(audio(), outlier(audio(), 7)))


@pytest.mark.parametrize("against", ["nearest", "all"])
def test_padded_rows_with_a_fixed_number_of_tokens(against: str) -> None:
    step = {"preset": "todre", "budget": {"tokens": 5}, "against": against}
    compare(text(), sentences([20, 12, 7]), step, at_output(text(), todre(against, count=5)))


def test_default() -> None:
    assert library()["todre"].params["keep"].default == 0.1
