"""What became of each token, and how to show it: patches painted into a picture, words of a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tokcc.report.distances import Array
from tokcc.report.schema import KeptText

__all__ = ["KeptTokens", "Word", "kept_texts", "paint", "painting", "patch_grid", "readable", "spread_over"]

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Pixels = NDArray[np.uint8]

_PATCH = 24
"""Pixels that a patch is painted with."""

_EDGE = 2
"""Width of a merged token's outline in these pixels."""


@dataclass(frozen=True)
class KeptTokens:
    """The original tokens after one reduction, composed through all reductions before it.

    Attributes:
        layer: Block of the reduction.
        step: Its preset or node kind.
        kept: ``[B, N0]``: which original tokens are still there (of a merged token: its representative).
        assign: ``[B, N0]``: the current token that each original token went into; -1 for a dropped one. None where
            nothing was merged.
        prefix: Leading tokens that are no patches (CLS, registers).
        grid: Rows and columns of patches, or None for text.
    """

    layer: int
    step: str
    kept: Array | None
    assign: Array | None = None
    prefix: int = 0
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.kept is None and self.assign is None:
            raise ValueError("one of kept and assign is needed")
        shapes = {value.shape for value in (self.kept, self.assign) if value is not None}
        if len(shapes) != 1 or len(next(iter(shapes))) != 2:
            raise ValueError(f"kept and assign must be [B, N0] both, not {shapes}")
        if self.grid is not None and self.prefix + self.grid[0] * self.grid[1] > self.shape[1]:
            raise ValueError(f"{self.prefix} + {self.grid} patches, but only {self.shape[1]} tokens")

    @property
    def shape(self) -> tuple[int, int]:
        """Samples and original tokens."""
        batch, tokens = np.asarray(self.kept if self.kept is not None else self.assign).shape
        return batch, tokens

    def alive(self, sample: int) -> Bools:
        """Original tokens whose content is still there, alone or within a merged token."""
        if self.assign is not None:
            return _integers(self.assign, sample) >= 0
        return _booleans(self.kept, sample)

    def standing(self, sample: int) -> Bools:
        """Original tokens that stand for themselves or for their group: one for each current token."""
        if self.kept is not None:
            return _booleans(self.kept, sample)
        groups = _integers(self.assign, sample)
        first = np.zeros(len(groups), dtype=bool)
        first[np.unique(groups, return_index=True)[1]] = True  # of a group without a named representative: its first
        return first & (groups >= 0)

    def patches(self, sample: int) -> tuple[Bools, Ints | None]:
        """What is alive, and the groups, of the patches only."""
        if self.grid is None:
            raise ValueError("text has no patches")
        span = slice(self.prefix, self.prefix + self.grid[0] * self.grid[1])
        groups = None if self.assign is None else _integers(self.assign, sample)[span]
        return self.alive(sample)[span], groups

    def count(self, sample: int = 0) -> int:
        """Tokens of a sample that are left, without the prefix (all of it, for text)."""
        span = slice(self.prefix, None if self.grid is None else self.prefix + self.grid[0] * self.grid[1])
        if self.assign is None:
            return int(self.alive(sample)[span].sum())
        groups = _integers(self.assign, sample)[span]
        return len(np.unique(groups[groups >= 0]))


def _booleans(values: Array | None, sample: int) -> Bools:
    row: Bools = np.asarray(np.asarray(values)[sample], dtype=np.bool_)
    return row


def _integers(values: Array | None, sample: int) -> Ints:
    row: Ints = np.asarray(np.asarray(values)[sample], dtype=np.int64)
    return row


def spread_over(stages: Sequence[KeptTokens], columns: int) -> list[KeptTokens]:
    """Choose at most so many stages, evenly, always with the last."""
    ordered = sorted(stages, key=lambda stage: stage.layer)
    if len(ordered) <= columns:
        return ordered
    chosen = np.linspace(len(ordered) / columns, len(ordered), columns).round().astype(int) - 1
    return [ordered[position] for position in chosen]


def patch_grid(patches: int, height: int, width: int) -> tuple[int, int] | None:
    """Return rows and columns of square patches that cover a picture, or None where none do.

    Args:
        patches: How many there are.
        height: Of the picture.
        width: Of the picture.
    """
    rows = round(float(np.sqrt(patches * height / width)))
    if rows < 1 or patches % rows:
        return None
    columns = patches // rows
    return (rows, columns) if rows * width == columns * height else None


def painting(stages: Sequence[KeptTokens]) -> str:
    """Say what dark and outlined patches mean, as far as there are any in the first sample."""
    dropped = any(not stage.patches(0)[0].all() for stage in stages)
    merged = any(stage.assign is not None for stage in stages)
    said = ["Dark patches are gone."] * dropped
    return " ".join([*said, *["Patches of one merged token have its mean colour and one outline."] * merged])


def paint(pixels: Array, stage: KeptTokens, sample: int) -> Pixels:
    """Paint the patches of one sample: dropped ones dark and grey, merged ones in their mean colour, outlined.

    Args:
        pixels: The picture as the model sees it, uint8 ``[H, W, C]``.
        stage: What became of the tokens.
        sample: Which sample of it.
    """
    if stage.grid is None:
        raise ValueError("text has no patches")
    rows, columns = stage.grid
    image = _enlarged(pixels, rows * _PATCH, columns * _PATCH)
    alive, groups = stage.patches(sample)
    tiled = image.astype(np.float64).reshape(rows, _PATCH, columns, _PATCH, 3).transpose(0, 2, 1, 3, 4)
    cells: NDArray[np.float64] = np.array(tiled.reshape(rows * columns, _PATCH, _PATCH, 3))
    gone = ~alive
    cells[gone] = cells[gone].mean(axis=-1, keepdims=True) * 0.22
    if groups is not None:
        _paint_groups(cells, groups, rows, columns)
    whole = cells.reshape(rows, columns, _PATCH, _PATCH, 3).transpose(0, 2, 1, 3, 4).reshape(image.shape)
    return np.array(whole.clip(0, 255), dtype=np.uint8)


def _enlarged(pixels: Array, height: int, width: int) -> Pixels:
    from PIL import Image

    array = np.asarray(pixels, dtype=np.uint8)
    if array.shape[-1] == 1:
        array = np.repeat(array, 3, axis=-1)
    return np.asarray(Image.fromarray(array).resize((width, height), Image.Resampling.BICUBIC))


def _paint_groups(cells: NDArray[np.float64], groups: Ints, rows: int, columns: int) -> None:
    grid = groups.reshape(rows, columns)
    sizes = {int(group): int(size) for group, size in zip(*np.unique(groups, return_counts=True), strict=True)}
    merged = {group for group, size in sizes.items() if size > 1 and group >= 0}
    for group in merged:
        inside = groups == group
        cells[inside] = 0.25 * cells[inside] + 0.75 * cells[inside].mean(axis=(0, 1, 2))
    for position in range(rows * columns):
        if int(groups[position]) not in merged:
            continue
        row, column = divmod(position, columns)
        cell = cells[position]
        shade = 255.0 if cell.mean() < 165 else 40.0  # a white outline is lost on snow
        for edge, (down, right) in (
            (cell[:_EDGE], (-1, 0)),
            (cell[-_EDGE:], (1, 0)),
            (cell[:, :_EDGE], (0, -1)),
            (cell[:, -_EDGE:], (0, 1)),
        ):
            other = row + down, column + right
            inside_grid = 0 <= other[0] < rows and 0 <= other[1] < columns
            if inside_grid and grid[other] != grid[row, column]:
                edge[:] = 0.2 * edge + 0.8 * shade


def kept_texts(texts: Sequence[Sequence[str]], stages: Sequence[KeptTokens], *, limit: int = 3) -> tuple[KeptText, ...]:
    """Return, for the first texts, the block after which each token is gone.

    Args:
        texts: Tokens of each sample, in the order of the samples.
        stages: What became of the tokens, reduction by reduction.
        limit: At most so many texts.
    """
    ordered = sorted(stages, key=lambda stage: stage.layer)
    if not ordered:
        return ()
    merges = [stage.assign is not None for stage in ordered]
    how: Literal["dropped", "merged", "reduced"] = "merged" if all(merges) else "reduced" if any(merges) else "dropped"
    shown = min(limit, len(texts), min(stage.shape[0] for stage in ordered))
    return tuple(_kept_text(texts[sample], ordered, sample, how) for sample in range(shown))


def _kept_text(
    tokens: Sequence[str], stages: Sequence[KeptTokens], sample: int, how: Literal["dropped", "merged", "reduced"]
) -> KeptText:
    count = _without_padding(tokens)
    gone: list[int | None] = [None] * count
    for stage in stages:
        standing = stage.standing(sample)
        for position in range(min(count, len(standing))):
            if gone[position] is None and not standing[position]:
                gone[position] = stage.layer
    return KeptText(tokens=tuple(tokens[:count]), gone_after=tuple(gone), how=how)


_PADDING = frozenset({"[PAD]", "<pad>", "<|endoftext|>", "<|pad|>", "<unk>", "</s>"})


def _without_padding(tokens: Sequence[str]) -> int:
    """Number of tokens before a run of padding at the end; one single end token is not padding."""
    count = len(tokens)
    while (
        count > 1
        and tokens[count - 1] in _PADDING
        and (tokens[count - 2] == tokens[count - 1] or "pad" in tokens[count - 1].lower())
    ):
        count -= 1
    return count


@dataclass(frozen=True)
class Word:
    """A token as a reader wants to see it.

    Attributes:
        text: Without the marks of the tokenizer.
        space: Whether a space stands before it.
        special: Whether it is no text, such as ``[CLS]``.
        gone_after: Block after which it is gone, or None.
    """

    text: str
    space: bool
    special: bool
    gone_after: int | None


def readable(text: KeptText) -> list[Word]:
    """Turn tokens into words: byte-level BPE (GPT-2), SentencePiece and WordPiece marks become spaces."""
    bytelevel = any("Ġ" in token or "Ċ" in token for token in text.tokens)
    pieces = bytelevel or any("▁" in token for token in text.tokens)
    words = []
    for position, (token, gone) in enumerate(zip(text.tokens, text.gone_after, strict=True)):
        special = len(token) > 2 and (token[0], token[-1]) in {("[", "]"), ("<", ">")}
        if special:
            words.append(Word(token, True, True, gone))
        elif bytelevel:
            plain = _from_bytes(token)
            words.append(Word(plain.strip() or "↵", plain[:1].isspace(), False, gone))
        elif pieces:
            plain = token.replace("▁", " ")
            words.append(Word(plain.strip() or "·", plain.startswith(" "), False, gone))
        else:
            words.append(Word(token.removeprefix("##"), position > 0 and not token.startswith("##"), False, gone))
    return words


def _from_bytes(token: str) -> str:
    """Undo the byte-to-character table of GPT-2's tokenizer; half a character becomes a replacement mark."""
    table = _byte_table()
    try:
        return bytes(table[character] for character in token).decode("utf-8", errors="replace")
    except KeyError:  # an added token that is not in byte form
        return token.replace("Ġ", " ")


@cache
def _byte_table() -> dict[str, int]:
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [value for value in range(256) if value not in visible]
    return {chr(value): value for value in visible} | {chr(256 + n): value for n, value in enumerate(hidden)}
