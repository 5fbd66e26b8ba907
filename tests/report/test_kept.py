from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tokcc.report.kept import KeptTokens, kept_texts, paint, readable, spread_over
from tokcc.report.schema import KeptText

GRID = (2, 3)
RAMP = np.arange(20 * 30 * 3, dtype=np.uint32).reshape(20, 30, 3).astype(np.uint8)


def cell(picture: np.ndarray, row: int, column: int) -> np.ndarray:
    """The inside of a painted patch, without its outline."""
    size = picture.shape[0] // GRID[0]
    return picture[row * size + 4 : (row + 1) * size - 4, column * size + 4 : (column + 1) * size - 4]


def stage(kept: object = None, assign: object = None, layer: int = 3) -> KeptTokens:
    to_array = {"kept": kept, "assign": assign}
    arrays = {name: None if value is None else np.asarray(value) for name, value in to_array.items()}
    return KeptTokens(layer, "step", arrays["kept"], arrays["assign"], prefix=1, grid=GRID)


def test_dropped_patches_are_dark_and_grey_and_the_others_untouched() -> None:
    everything = paint(RAMP, stage([[1, 1, 1, 1, 1, 1, 1]]), 0)
    some = paint(RAMP, stage([[1, 1, 0, 1, 1, 1, 0]]), 0)
    for position in range(6):
        row, column = divmod(position, 3)
        before, after = cell(everything, row, column), cell(some, row, column)
        if position in {1, 5}:
            assert after.mean() < 0.3 * before.mean()
            assert (after.max(axis=-1) == after.min(axis=-1)).all()
        else:
            np.testing.assert_array_equal(before, after)


def test_merged_patches_take_their_common_mean() -> None:
    flat = np.zeros((20, 30, 3), dtype=np.uint8)
    flat[:10, :10] = 200  # the first patch
    picture = paint(flat, stage(assign=[[0, 1, 1, 2, 3, 4, 5]]), 0)
    assert np.allclose(cell(picture, 0, 0), 0.25 * 200 + 0.75 * 100, atol=3)
    assert np.allclose(cell(picture, 0, 1), 0.75 * 100, atol=3)
    assert cell(picture, 0, 2).max() == 0
    middle = picture.shape[0] // 4
    width = picture.shape[1] // 3
    assert picture[middle, 2 * width - 1].min() > 150  # outline towards another token
    assert picture[middle, width + 1].max() < 100  # none within the token


@given(hnp.arrays(np.int64, (1, 7), elements=st.integers(-1, 4)))
def test_painting_any_assignment_gives_a_picture(assign: np.ndarray) -> None:
    picture = paint(RAMP, stage(assign=assign), 0)
    assert picture.dtype == np.uint8
    assert picture.shape[0] * 3 == picture.shape[1] * 2
    for position in np.flatnonzero(assign[0, 1:] < 0):
        patch = cell(picture, *divmod(int(position), 3))
        assert (patch.max(axis=-1) == patch.min(axis=-1)).all()


def test_grey_pictures_are_painted_too() -> None:
    assert paint(RAMP[..., :1], stage([[1] * 7]), 0).shape[-1] == 3


def test_counts_leave_out_the_prefix_and_the_dropped() -> None:
    assert stage([[1, 1, 0, 1, 0, 0, 1]]).count() == 3
    assert stage(assign=[[0, 1, 1, 2, -1, 2, 3]]).count() == 3


@given(hnp.arrays(np.int64, (2, 7), elements=st.integers(-1, 5)))
def test_one_token_stands_for_each_group(assign: np.ndarray) -> None:
    found = stage(assign=assign)
    for sample in range(2):
        groups = assign[sample][found.standing(sample)]
        assert sorted(groups.tolist()) == sorted(set(assign[sample][assign[sample] >= 0].tolist()))


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match="one of kept and assign"):
        KeptTokens(0, "s", None)
    with pytest.raises(ValueError, match=r"\[B, N0\]"):
        KeptTokens(0, "s", np.ones(3))
    with pytest.raises(ValueError, match=r"\[B, N0\]"):
        KeptTokens(0, "s", np.ones((1, 3)), np.ones((1, 4)))
    with pytest.raises(ValueError, match="only 3 tokens"):
        KeptTokens(0, "s", np.ones((1, 3)), grid=(2, 2))
    text = KeptTokens(0, "s", np.ones((1, 3)))
    with pytest.raises(ValueError, match="no patches"):
        paint(RAMP, text, 0)


@given(st.integers(0, 40), st.integers(1, 6))
def test_the_last_stage_is_always_shown(count: int, columns: int) -> None:
    stages = [stage([[1] * 7], layer=layer) for layer in range(count)]
    chosen = [found.layer for found in spread_over(stages[::-1], columns)]
    assert len(chosen) == min(count, columns)
    assert chosen == sorted(set(chosen))
    assert not chosen or chosen[-1] == count - 1


def test_texts_know_when_a_token_is_gone() -> None:
    tokens = ["[CLS]", "a", "b", "c", "[SEP]", "[PAD]", "[PAD]"]
    first = KeptTokens(2, "s", np.array([[1, 1, 0, 1, 1, 0, 0]]))
    second = KeptTokens(5, "s", np.array([[1, 0, 0, 1, 1, 0, 0]]))
    (found,) = kept_texts([tokens, tokens], [second, first])
    assert found.tokens == tuple(tokens[:5])
    assert found.gone_after == (None, 5, 2, None, None)
    assert found.how == "dropped"
    merged = KeptTokens(2, "s", None, np.array([[0, 1, 1, 2, 3, 3, 3]]))
    (found,) = kept_texts([tokens], [merged])
    assert (found.gone_after, found.how) == ((None, None, 2, None, None), "merged")
    assert kept_texts([tokens], [first, merged])[0].how == "reduced"
    assert kept_texts([tokens], []) == ()


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (("[CLS]", "token", "##iser", "works"), " [CLS] tokeniser works"),
        (("▁To", "ken", "▁works"), " Token works"),
        (("The", "Ġcat", "ĠsÃ¤gt", "Ċ"), "The cat sägt↵"),
        (("Ġ\u2581odd",), " \u2581odd"),
    ],
)
def test_tokens_become_words(tokens: tuple[str, ...], text: str) -> None:
    words = readable(KeptText(tokens=tokens, gone_after=(None,) * len(tokens)))
    assert "".join((" " if word.space and word.text != "↵" else "") + word.text for word in words) == text
    assert len(words) == len(tokens)


@given(st.lists(st.text(min_size=1, max_size=8), max_size=10))
def test_any_token_can_be_shown(tokens: list[str]) -> None:
    words = readable(KeptText(tokens=tuple(tokens), gone_after=(None,) * len(tokens)))
    assert len(words) == len(tokens)
