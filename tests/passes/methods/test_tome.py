"""ToMe against a brute-force reading of arXiv:2210.09461."""

from __future__ import annotations

import pytest
import torch

from tests.passes.oracle import Cut, Feeds, Result, Scene, compare, cosine, merge, program_of, reference
from tests.passes.reference_models import patches, sentences, text, vision

ALL = range(4)


def tome(r: int, protected: int = 1):
    def method(scene: Scene) -> Cut | None:
        mean_keys = [sum(scene.keys[h, i] for h in range(len(scene.keys))) / len(scene.keys) for i in range(scene.n)]
        count = min(r, (scene.n - protected) // 2)
        if count == 0:
            return merge(scene, list(range(0, scene.n, 2)) + list(range(1, scene.n, 2)), []) if protected < 2 else None
        evens = [i for i in range(0, scene.n, 2) if i >= protected]
        odds = [i for i in range(1, scene.n, 2) if i >= protected]
        best = {a: max(odds, key=lambda b: (cosine(mean_keys[a], mean_keys[b]), -b)) for a in evens}
        value = {a: cosine(mean_keys[a], mean_keys[best[a]]) for a in evens}
        sources = sorted(evens, key=lambda a: (-value[a], a))[:count]
        unmerged = [a for a in evens if a not in sources]
        kept = list(range(protected)) + unmerged + odds
        return merge(scene, kept, [(a, best[a]) for a in sources])

    return method


@pytest.mark.parametrize(("tokens", "r"), [(65, 13), (50, 8), (49, 16)])
def test_against_brute_force(tokens: int, r: int) -> None:
    model, feeds = vision(), {"patches": patches(3, tokens)}
    results = compare(model, feeds, {"preset": "tome", "r": r}, lambda s: reference(model, s, tome(r), layers=ALL))
    for result in results:
        for cut in result.cuts:
            assert cut.sizes is not None
            assert float(cut.sizes.sum()) == pytest.approx(tokens)
