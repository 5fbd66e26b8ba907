"""MMTok (arXiv:2508.18264) against the objective itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.export import Dim

from tests.passes.guided import choosing, texts, words_of
from tests.passes.oracle import Feeds, Scene, compare, policy, program_of
from tests.passes.reference_models import WIDTH, audio, frames, patches, sentences, text, vision
from tokcc.testing import run_eager


def shares(rows: Tensor, columns: Tensor, temperature: float) -> np.ndarray:
    """Softmax over the columns of the cosine, row by row."""
    result = []
    for row in rows.double():
        cosine = [float(row @ column / (row.norm() * column.norm())) for column in columns.double()]
        weights = np.exp(np.array(cosine) / temperature - max(cosine) / temperature)
        result.append(weights / weights.sum())
    return np.array(result)


def covered(table: np.ndarray, chosen: Sequence[int]) -> float:
    return float(table[:, list(chosen)].max(axis=1).sum()) if chosen else 0.0


def table_of(words: Tensor, x: Tensor, z: Tensor, image_share: float = 0.5) -> np.ndarray:
    of_text = shares(words, z, 0.02) / len(words)
    return np.concatenate([of_text, image_share * shares(x, x, 0.2) / len(x)])


def greedy(table: np.ndarray, count: int) -> list[int]:
    picked: list[int] = []
    while len(picked) < min(count, table.shape[1]):
        left = [i for i in range(table.shape[1]) if i not in picked]
        picked.append(max(left, key=lambda i: covered(table, [*picked, i])))
    return picked


def mmtok(
    count: int, image_share: float = 0.5, embed: Callable[[Tensor], Tensor] = lambda x: x
) -> Callable[[Tensor, Scene, Feeds], list[int]]:
    def choose(x: Tensor, scene: Scene, sample: Feeds) -> list[int]:
        del scene
        return greedy(table_of(words_of(sample), x, embed(x), image_share), count)

    return choose


def test_images() -> None:
    feeds = {"patches": patches(3, 50), **texts([3, 1, 5])}
    step = {"preset": "mmtok", "tokens": 12}
    results = compare(
        vision(), feeds, step, choosing(vision(), 1, mmtok(12)), traced={"patches": patches(3, 50)}, engine=True
    )
    assert results[0].lengths == [13]


def test_a_fixed_number_of_rows() -> None:
    feeds = {"frames": frames(2, 25), **texts([2, 6], rows=8)}
    step = {"preset": "mmtok", "tokens": 5, "rows": 8, "image_share": 0.1}
    compare(audio(), feeds, step, choosing(audio(), 0, mmtok(5, 0.1)), traced={"frames": frames(2, 25)})


def test_tokens_brought_to_the_texts_space(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    weights = {"projection.weight": torch.randn(12, WIDTH, generator=generator), "projection.bias": torch.ones(12)}
    save_file(weights, tmp_path / "projector.safetensors")
    step = {"preset": "mmtok", "tokens": 5, "projection": True, "weights": str(tmp_path / "projector.safetensors")}
    feeds = {"frames": frames(2, 20), **texts([2, 1], width=12)}
    choice = mmtok(5, embed=lambda x: x @ weights["projection.weight"].T + 1)
    compare(audio(), feeds, step, choosing(audio(), 0, choice), traced={"frames": frames(2, 20)})


def test_dynamic_number_of_tokens() -> None:
    shapes = {"frames": {0: Dim("batch", min=1, max=9), 1: Dim("sequence", min=4, max=60)}}
    for tokens in (25, 6):
        compare(
            audio(2),
            {"frames": frames(3, tokens), **texts([2, 2, 3])},
            {"preset": "mmtok", "tokens": 6},
            choosing(audio(2), 0, mmtok(6)),
            dynamic=shapes,
            traced={"frames": frames(2, 16)},
        )


def test_padded_rows_are_what_they_are_alone() -> None:
    given = sentences([20, 12, 4])
    step = {"preset": "mmtok", "tokens": 5}
    compare(text(), {**given, **texts([2, 1, 3])}, step, choosing(text(), 1, mmtok(5)), traced=given)


def test_one_word_without_the_image_is_its_nearest_token() -> None:
    feeds = {"frames": frames(1, 30), **texts([1])}
    step = {"preset": "mmtok", "tokens": 1, "image_share": 0.0}
    _, plan = run_eager(program_of(audio(), {"frames": frames(1, 30)}), policy(step), feeds)
    with torch.no_grad():
        z = audio()(feeds["frames"])["tokens"][0]
    cosine = torch.nn.functional.cosine_similarity(z, feeds["text"][0], dim=-1)
    assert plan.made[0].index.tolist() == [[int(cosine.argmax())]]


def test_what_is_gained_falls_from_pick_to_pick() -> None:
    """The objective is monotone and submodular: the selections of growing budgets show it."""
    feeds = {"frames": frames(1, 24), **texts([2])}
    program = program_of(audio(), {"frames": frames(1, 24)})
    with torch.no_grad():
        z = audio()(feeds["frames"])["tokens"][0]
    table = table_of(words_of(feeds), z, z)
    values = [0.0]
    for count in range(1, 9):
        _, plan = run_eager(program, policy({"preset": "mmtok", "tokens": count}), feeds)
        values.append(covered(table, plan.made[0].index[0].tolist()))
    gains = np.diff(values)
    assert (gains > 0).all()
    assert (np.diff(gains) <= 1e-6).all()
