"""SparseVLM against its formula: raters, and clusters of what goes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.prompt.engine import TOKENS, compare, visual_policy
from tests.prompt.models import IMAGE, model_of
from tests.prompt.oracle import Cut, Rebuilding, Stream, Trace, run_rebuilt
from tests.prompt.rules import best

LAYERS, KEPT = (0, 1, 3), (10, 6, 3)


def raters(stream: Stream) -> list[int]:
    """Places in the prompt of the text tokens that are about the image."""
    if "raters" not in stream.memory:
        image = [tag for tag, own in zip(stream.tags, stream.image, strict=True) if own]
        text = [tag for tag in stream.tags if tag > max(image)]
        got = torch.zeros(len(text))
        for j in image:
            got += torch.softmax(torch.stack([stream.embedded[j] @ stream.embedded[t] for t in text]), 0)
        got /= len(image)
        stream.memory["raters"] = [t for t, value in zip(text, got, strict=True) if value > got.mean()]
    found: list[int] = stream.memory["raters"]
    return found


def clusters(x: Tensor, count: int) -> list[tuple[int, list[int]]]:
    """Centres and members by density peaks."""
    total = len(x)
    apart = [[float(((x[i] - x[j]) ** 2).sum() ** 0.5 / x.shape[1] ** 0.5) for j in range(total)] for i in range(total)]
    density = [float(torch.exp(-torch.tensor([d**2 for d in sorted(row)[:count]]).mean())) for row in apart]
    far = max(map(max, apart))
    peak = []
    for i in range(total):
        denser = [j for j in range(total) if (density[j], -j) > (density[i], -i)]
        peak.append(min((apart[i][j] for j in denser), default=far))
    rated = torch.tensor(density) * torch.tensor(peak)
    centres = sorted(range(total), key=lambda i: (-float(rated[i]), i))[:count]
    members: dict[int, list[int]] = {centre: [] for centre in centres}
    for i in range(total):
        own = i if i in members else min(centres, key=lambda c: apart[i][c])
        members[own].append(i)
    return list(members.items())


def rule(kept: int, recycle: bool) -> Rebuilding:
    def cut(stream: Stream) -> tuple[list[int], list[tuple[int, Tensor]]]:
        image = [i for i, own in enumerate(stream.image) if own]
        rows = [i for i, tag in enumerate(stream.tags) if tag in raters(stream)]
        score = stream.probs[:, rows].mean((0, 1))
        stay = best(score, image, kept)
        gone = [i for i in image if i not in stay]
        count = int(0.3 * len(gone)) + 1
        some = best(score, gone, count)
        made = []
        if recycle:
            for number, (_, members) in enumerate(clusters(stream.hidden[some], int(count / 10) + 1)):
                made.append((some[number], stream.hidden[[some[i] for i in members]].mean(0)))
        return [i for i in range(len(stream.tags)) if not stream.image[i] or i in stay], made

    return cut


@pytest.mark.parametrize("recycle", ["recycle", pytest.param("drop", marks=pytest.mark.slow)])
def test_equals_the_formula(recycle: str, tmp_path: Path) -> None:
    def trace(ids: Tensor, prompt: int) -> Trace:
        cuts = [(layer, rule(kept, recycle == "recycle")) for layer, kept in zip(LAYERS, KEPT, strict=True)]
        return run_rebuilt(model_of("llama"), ids, prompt, IMAGE, cuts)

    step = {"preset": "sparsevlm", "layers": list(LAYERS), "tokens": list(KEPT), "recycle": recycle}
    cuts = [Cut(layer, lambda seen: seen.alive) for layer in LAYERS]
    compare("llama", visual_policy(step), lambda: cuts, tmp_path, trace=trace)


def test_several_clusters(tmp_path: Path) -> None:
    def small(stream: Stream) -> tuple[list[int], list[tuple[int, Tensor]]]:
        image = [i for i, own in enumerate(stream.image) if own]
        rows = [i for i, tag in enumerate(stream.tags) if tag in raters(stream)]
        score = stream.probs[:, rows].mean((0, 1))
        stay = best(score, image, 4)
        some = best(score, [i for i in image if i not in stay], int(0.7 * (TOKENS - 4)) + 1)
        made = [
            (some[number], stream.hidden[[some[i] for i in members]].mean(0))
            for number, (_, members) in enumerate(clusters(stream.hidden[some], len(some) // 3 + 1))
        ]
        assert len(made) == 4
        return [i for i in range(len(stream.tags)) if not stream.image[i] or i in stay], made

    step = {
        "preset": "sparsevlm",
        "layers": [1],
        "tokens": [4],
        "reduce": {"kind": "recycle", "share": 0.7, "size": 3},
    }
    compare(
        "llama",
        visual_policy(step),
        lambda: [Cut(1, lambda seen: seen.alive)],
        tmp_path,
        trace=lambda ids, prompt: run_rebuilt(model_of("llama"), ids, prompt, IMAGE, [(1, small)]),
    )


def test_the_published_totals() -> None:
    from tokcc.passes.prompt.reducers.recycle import Recycle

    present, totals = 576, []
    for kept in (300, 200, 110):
        present = kept + Recycle().added(present - kept)
        totals.append(present)
    assert totals == [309, 204, 113]
