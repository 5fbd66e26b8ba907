"""Inputs that engines are checked with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from tests.zoo import ZOO
from tokcc.backends.feeds import Feeds, example_feeds, make_feeds
from tokcc.ir.program import Program
from tokcc.testing import run_program, trace

# torch's own pytree copies a deprecated class in run_decompositions.
pytestmark = pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning")


class Masked(nn.Module):
    """Ids and masks as text models take them, and numbers."""

    def forward(self, ids: Tensor, attention_mask: Tensor, scale: Tensor) -> Tensor:
        return (ids * attention_mask).float() * scale.sum()


def masked(batch: int = 2, length: int = 9, **shapes: Any) -> tuple[Program, Feeds]:
    feeds = {
        "ids": torch.randint(5, 90, (batch, length), generator=torch.Generator().manual_seed(0)),
        "attention_mask": torch.ones(batch, length, dtype=torch.int64),
        "scale": torch.randn(3),
    }
    feeds["attention_mask"][1:, 7:] = 0
    return trace(Masked(), feeds, shapes.get("dynamic")), feeds


def dynamic(low: int = 4, high: int = 12) -> dict[str, Any]:
    axes = {0: Dim("batch", min=1, max=8), 1: Dim("sequence", min=low, max=high)}
    return {"ids": axes, "attention_mask": axes, "scale": {}}


def test_the_example_comes_first() -> None:
    program, example = masked()
    feeds = make_feeds(program, example)
    assert feeds[0] is example
    assert len(feeds) == 4
    assert len(make_feeds(program, example, variants=0)) == 1


def test_static_inputs_keep_their_shapes() -> None:
    program, example = masked()
    for feed in make_feeds(program, example):
        assert {name: x.shape for name, x in feed.items()} == {name: x.shape for name, x in example.items()}
        assert {name: x.dtype for name, x in feed.items()} == {name: x.dtype for name, x in example.items()}


def test_dynamic_inputs_vary_within_their_ranges() -> None:
    program, example = masked(dynamic=dynamic())
    shapes = [tuple(feed["ids"].shape) for feed in make_feeds(program, example)]
    assert shapes[0] == (2, 9)
    assert shapes[1] == (1, 4)  # a batch of one, and the shortest allowed
    assert len(set(shapes)) == 4
    assert all(1 <= b <= 8 and 4 <= n <= 12 for b, n in shapes)
    for feed in make_feeds(program, example):
        assert feed["attention_mask"].shape == feed["ids"].shape
        run_program(program, feed)


def test_ranges_of_one_length_are_kept() -> None:
    program, example = masked(dynamic=dynamic(low=8, high=9))
    assert {feed["ids"].shape[1] for feed in make_feeds(program, example)} == {8, 9}


def test_ids_stay_within_the_example() -> None:
    """Ids may not leave the vocabulary, which nothing else tells."""
    program, example = masked(dynamic=dynamic())
    low, high = int(example["ids"].min()), int(example["ids"].max())
    for feed in make_feeds(program, example, variants=6):
        assert int(feed["ids"].min()) >= low
        assert int(feed["ids"].max()) <= high


def test_masks_are_padded_on_the_right() -> None:
    program, example = masked(batch=3, dynamic=dynamic())
    for feed in make_feeds(program, example, variants=6)[1:]:
        mask = feed["attention_mask"]
        assert mask[0].all()
        assert (mask.diff(dim=1) <= 0).all()
        assert (2 * mask.sum(1) >= mask.shape[1]).all()


def test_masks_of_padding_are_the_other_way_round() -> None:
    entry = ZOO["torch_encoder_bnc_pre"]
    example = entry.inputs(4)
    program = trace(entry.build(), example, entry.dynamic_shapes())
    for feed in make_feeds(program, example)[1:]:
        padding = feed["src_key_padding_mask"]
        assert padding.dtype == torch.bool
        assert not padding[0].any()
        assert not padding[:, 0].any()


def test_a_constant_input_stays_constant() -> None:
    """Token types of zero, a mask that hides nothing."""
    program, example = masked(dynamic=dynamic())
    example["attention_mask"] = torch.zeros_like(example["attention_mask"])
    assert not any(feed["attention_mask"].any() for feed in make_feeds(program, example))


def test_the_same_seed_gives_the_same_inputs() -> None:
    program, example = masked(dynamic=dynamic())
    first, second, other = (make_feeds(program, example, seed=seed)[1] for seed in (3, 3, 4))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["scale"], other["scale"])


class Related(nn.Module):
    def forward(self, short: Tensor, long: Tensor) -> Tensor:
        return torch.cat([short, long], 0)


def test_axes_that_depend_on_another() -> None:
    n = Dim("n", min=2, max=20)
    inputs = {"short": torch.randn(4, 3), "long": torch.randn(9, 3)}
    program = trace(Related(), inputs, {"short": {0: n}, "long": {0: 2 * n + 1}})
    for feed in make_feeds(program, inputs):
        assert feed["long"].shape[0] == 2 * feed["short"].shape[0] + 1


class Nested(nn.Module):
    def forward(self, x: Tensor, pair: tuple[Tensor, Tensor]) -> Tensor:
        return x + pair[0] * pair[1]


def test_example_feeds_by_name() -> None:
    x, y, z = (torch.full((2,), float(i)) for i in range(3))
    program = trace(Nested(), {"x": x, "pair": (y, z)})  # type: ignore[dict-item]  # inputs may be nested
    feeds = example_feeds(program, (), {"x": x, "pair": (y, z)})
    assert list(feeds) == ["x", "pair.0", "pair.1"]
    assert [float(value[0]) for value in feeds.values()] == [0.0, 1.0, 2.0]
