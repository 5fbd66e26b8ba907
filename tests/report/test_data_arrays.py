from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from tokcc.errors import UsageError
from tokcc.report.batches import InputSpec, batched_names, cast
from tokcc.report.data import CalibrationData, load_calibration

X = InputSpec("x", "float32", ("batch", 4))
FIXED = InputSpec("x", "float32", (2, 4))
PAIR = [InputSpec("ids", "int64", ("batch", "seq")), InputSpec("mask", "int64", ("batch", "seq"))]


def rows(count: int, *shape: int) -> np.ndarray:
    return np.arange(count * int(np.prod(shape)), dtype=np.float32).reshape(count, *shape)


def stacked(data: CalibrationData, name: str = "x") -> np.ndarray:
    return np.concatenate([feed[name] for feed in data.feeds])


def test_npz_with_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=rows(11, 4), labels=np.arange(11))
    data = load_calibration(tmp_path / "d.npz", [X])
    assert [len(feed["x"]) for feed in data.feeds] == [8, 3]
    np.testing.assert_array_equal(stacked(data), rows(11, 4))
    assert data.labels == list(range(11))
    assert [labels for _, labels in data.batches()] == [list(range(8)), [8, 9, 10]]
    assert data.source == "d.npz"


def test_npy_is_the_only_input(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", rows(5, 4).astype(np.float64))
    data = load_calibration(tmp_path / "d.npy", [FIXED])
    assert [feed["x"].shape for feed in data.feeds] == [(2, 4), (2, 4)]
    assert data.feeds[0]["x"].dtype == np.float32
    assert any("1 samples left out" in note for note in data.notes)
    with pytest.raises(UsageError, match="holds one array, but the model has 2 inputs"):
        load_calibration(tmp_path / "d.npy", PAIR)


@given(count=st.integers(1, 40), size=st.integers(1, 9), fixed=st.booleans())
def test_batching_keeps_order_and_drops_only_the_rest(count: int, size: int, fixed: bool) -> None:
    spec = InputSpec("x", "float32", (size if fixed else "batch", 4))
    arrays = {"x": rows(count, 4), "labels": np.arange(count)}
    if fixed and count < size:
        with pytest.raises(UsageError, match="not enough"):
            load_calibration(arrays, [spec], limit=None)
        return
    data = load_calibration(arrays, [spec], batch_size=size, limit=None)
    used = count - count % size if fixed else count
    np.testing.assert_array_equal(stacked(data), rows(used, 4))
    assert data.labels == list(range(used))
    assert all(len(feed["x"]) == size for feed in data.feeds[:-1])
    assert data.samples == used


def loader(**options: int) -> DataLoader[tuple[torch.Tensor, ...]]:
    return DataLoader(TensorDataset(torch.from_numpy(rows(7, 4)), torch.arange(7)), **options)


def test_a_data_loader_keeps_its_batches() -> None:
    data = load_calibration(loader(batch_size=3), [X])
    assert [len(feed["x"]) for feed in data.feeds] == [3, 3, 1]
    assert data.labels == list(range(7))
    fixed = load_calibration(loader(batch_size=3), [FIXED])
    assert [len(feed["x"]) for feed in fixed.feeds] == [2, 2, 2]
    assert fixed.labels == list(range(6))
    np.testing.assert_array_equal(stacked(fixed), rows(6, 4))


def test_a_data_set_without_a_loader_and_single_samples() -> None:
    data = load_calibration(TensorDataset(torch.from_numpy(rows(9, 4)), torch.arange(9)), [X])
    assert [len(feed["x"]) for feed in data.feeds] == [8, 1]
    assert data.labels == list(range(9))


@pytest.mark.parametrize(
    "items",
    [
        [rows(2, 4), rows(2, 4)],
        [(rows(2, 4),), (rows(2, 4),)],
        [[rows(2, 4)], [rows(2, 4)]],
        [{"x": rows(2, 4)}, {"x": torch.from_numpy(rows(2, 4))}],
        [*rows(2, 4), *rows(2, 4)],
        [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3], [4, 5, 6, 7]],
        torch.from_numpy(np.concatenate([rows(2, 4)] * 2)),
        {"x": torch.from_numpy(np.concatenate([rows(2, 4)] * 2)).bfloat16()},
    ],
    ids=["arrays", "tuples", "lists", "mappings", "samples", "numbers", "tensor", "bfloat16"],
)
def test_forms_of_python_data(items: object) -> None:
    np.testing.assert_array_equal(stacked(load_calibration(items, [FIXED])), np.concatenate([rows(2, 4)] * 2))


def test_an_endless_generator_stops_at_the_limit() -> None:
    def endless() -> Iterator[np.ndarray]:
        for start in itertools.count():
            yield np.full((4, 4), start, dtype=np.float32)

    data = load_calibration(endless(), [X], limit=10)
    assert stacked(data)[:, 0].tolist() == [0] * 4 + [1] * 4 + [2] * 2
    assert any("first 10" in note for note in data.notes)


def test_batches_of_several_lengths_are_not_mixed() -> None:
    items = [{"ids": np.ones((2, n), dtype=np.int32), "mask": np.ones((2, n), dtype=bool)} for n in (3, 5, 5)]
    data = load_calibration(items, PAIR)
    assert [feed["ids"].shape for feed in data.feeds] == [(2, 3), (2, 5), (2, 5)]
    assert data.feeds[0]["mask"].dtype == np.int64
    chosen = load_calibration(items, PAIR, batch_size=4)
    assert [feed["ids"].shape for feed in chosen.feeds] == [(2, 3), (4, 5)]


def test_inputs_without_a_batch_axis_are_the_same_for_all() -> None:
    specs = [
        InputSpec("x", "float32", (2, 4)),
        InputSpec("scale", "float32", ()),
        InputSpec("table", "float32", (5, 3)),
    ]
    assert batched_names(specs) == {"x"}
    data = load_calibration({"x": rows(4, 4), "scale": np.float32(3), "table": rows(5, 3)}, specs)
    assert len(data.feeds) == 2
    assert data.feeds[1]["scale"].shape == ()
    np.testing.assert_array_equal(data.feeds[1]["table"], rows(5, 3))
    assert data.samples == 4


def test_data_that_is_ready_is_returned_as_it_is() -> None:
    data = load_calibration([rows(2, 4)], [X])
    assert load_calibration(data, [X]) is data


@pytest.mark.parametrize(
    ("data", "specs", "message"),
    [
        ({"y": rows(2, 4)}, [X], "no input of the model: y"),
        ({"xx": rows(2, 4)}, [X], r"did you mean x\?"),
        ({"ids": rows(2, 4)}, PAIR, "nothing for input mask"),
        ({"x": rows(2, 5)}, [X], "wrong shape for input x"),
        ({"x": rows(2, 4, 1)}, [X], "wrong shape for input x"),
        ({"x": rows(3, 4), "labels": np.arange(2)}, [X], "different numbers of samples"),
        ({"x": rows(2, 4), "labels": np.ones(2)}, [X], "not class indices"),
        ({"x": np.array([["a"] * 4] * 2)}, [X], "wrong type"),
        ({"x": rows(2, 4) * np.nan}, [X], "NaN or infinity"),
        ({"x": rows(0, 4)}, [X], "is empty"),
        ([], [X], "is empty"),
        ([(1, 2, 3)], [X], "wrong shape"),
        ([("a", "b", "c")], [X], "has 3 entries"),
        ([object()], [X], "is not calibration data"),
        (3, [X], "this is not calibration data"),
        ([rows(2, 4)], [], "no inputs"),
        ([(rows(2, 4), np.arange(2)), rows(2, 4)], [X], "some have not"),
    ],
)
def test_refusals(data: object, specs: list[InputSpec], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_calibration(data, specs)


def test_numbers_must_keep_their_meaning() -> None:
    ids = InputSpec("ids", "int32", ("b",))
    assert cast(np.array([1, 2]), ids).dtype == np.int32
    with pytest.raises(UsageError, match="wrong type"):
        cast(np.array([1.5]), ids)
    with pytest.raises(UsageError, match="does not fit its type"):
        cast(np.array([2**40]), ids)
    with pytest.raises(UsageError, match="wrong type"):
        cast(np.array([2]), InputSpec("m", "bool", ("b",)))
    with pytest.raises(UsageError, match="a type that numpy has"):
        cast(np.array([1.0]), InputSpec("x", "float9", ("b",)))


@pytest.mark.parametrize(("name", "content"), [("d.npz", b"PK no"), ("d.npy", b"junk"), ("d.npy", b"")])
def test_damaged_files(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match="cannot read"):
        load_calibration(tmp_path / name, [X])


def test_files_of_python_objects_and_of_unknown_kind(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UsageError, match=r"cannot read .*d\.npz"):
        load_calibration(tmp_path / "d.npz", [X])
    (tmp_path / "d.csv").write_text("1,2")
    with pytest.raises(UsageError, match="of this kind is not known"):
        load_calibration(tmp_path / "d.csv", [X])


def test_limits_and_batch_sizes_that_make_no_sense() -> None:
    with pytest.raises(UsageError, match="limit"):
        load_calibration([rows(2, 4)], [X], limit=0)
    with pytest.raises(UsageError, match="batch size is too small"):
        load_calibration([rows(2, 4)], [X], batch_size=0)
    with pytest.raises(UsageError, match="fixed batch size"):
        load_calibration([rows(2, 4)], [FIXED], batch_size=3)
