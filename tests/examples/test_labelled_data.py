import gzip

import numpy as np
import pytest

from examples import labelled_data
from examples.assets import FASHION_MNIST, MNIST_5K, TWEETS, Asset, available


def needs(asset: Asset) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        not available(asset), reason=f"{asset.pin} is not here (python examples/assets.py fetches it)"
    )


def test_balanced_cycles_through_classes() -> None:
    labels = np.array([0] * 50 + [1] * 30 + [2] * 40)
    rows = labelled_data.balanced(labels, 60)
    assert len(set(rows.tolist())) == 60
    assert np.bincount(labels[rows]).tolist() == [20, 20, 20]
    assert np.bincount(labels[rows[:30]]).tolist() == [10, 10, 10]
    np.testing.assert_array_equal(rows, labelled_data.balanced(labels, 60))
    assert not np.array_equal(rows, labelled_data.balanced(labels, 60, seed=1))


def test_balanced_refuses_too_many() -> None:
    with pytest.raises(ValueError, match="61 rows asked for, 60 can be had"):
        labelled_data.balanced(np.array([0] * 30 + [1] * 90), 61)


def test_idx_reader() -> None:
    body = bytes(range(24))
    header = b"\0\0\x08\x03" + b"".join(side.to_bytes(4, "big") for side in (2, 3, 4))
    values = labelled_data._idx(gzip.compress(header + body))
    assert values.shape == (2, 3, 4)
    assert values[1, 2, 3] == 23
    with pytest.raises(ValueError, match="IDX"):
        labelled_data._idx(gzip.compress(b"\0\0\x0d\x01" + bytes(8)))


@needs(FASHION_MNIST)
@pytest.mark.slow
def test_fashion_mnist() -> None:
    split = labelled_data.fashion_mnist(100, 50)
    assert split.train.shape == (100, 28, 28)
    assert split.test.shape == (50, 28, 28)
    assert np.bincount(split.train_labels).tolist() == [10] * 10
    assert np.bincount(split.test_labels).tolist() == [5] * 10
    # Sandals (5) cover less of the picture than coats (4): the labels belong to the images.
    ink = [split.train[split.train_labels == kind].mean() for kind in (4, 5)]
    assert ink[1] < 0.6 * ink[0]


@needs(MNIST_5K)
@pytest.mark.slow
def test_mnist_parts_are_disjoint() -> None:
    split = labelled_data.mnist_5k(200, 100)
    train = {image.tobytes() for image in split.train}
    assert not train & {image.tobytes() for image in split.test}
    assert np.bincount(split.train_labels).tolist() == [20] * 10
    # A one has less ink than a zero: the labels belong to the images.
    ink = [split.train[split.train_labels == digit].mean() for digit in (0, 1)]
    assert ink[1] < 0.6 * ink[0]


@needs(TWEETS)
@pytest.mark.slow
def test_tweets_are_unique_and_balanced() -> None:
    split = labelled_data.tweets(600, 300)
    assert not set(split.train) & set(split.test)
    assert np.bincount(split.train_labels).tolist() == [300, 300]
    assert np.bincount(split.test_labels).tolist() == [150, 150]
