"""Where the padding is read from: masks of all the forms that attention takes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.passes.oracle import policy
from tests.passes.reference_models import sentences, text
from tokcc.testing import run_eager, trace


class Masked(nn.Module):
    """The text encoder with a mask of any form."""

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = text(2)
        self.make = make

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"tokens": self.inner.encode(self.inner.embed(ids), self.make(mask))}


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "bool": lambda m: m[:, None, None].bool(),
    "additive": lambda m: (1.0 - m[:, None, None]) * -1e4,
    "lowest": lambda m: (1.0 - m[:, None, None].float()) * torch.finfo(torch.float32).min,
    "queries": lambda m: m[:, None, None].bool().expand(-1, 1, m.shape[1], -1),
    "heads": lambda m: m[:, None, None].bool().expand(-1, 4, m.shape[1], -1),
}


@pytest.mark.parametrize("form", FORMS)
def test_masks_per_sample(form: str) -> None:
    model, feeds = Masked(FORMS[form]), sentences([14, 8])
    step = policy({"preset": "tome", "r": 3}, "full")
    batch, _ = run_eager(trace(model, feeds), step, feeds)
    alone = {name: t[1:, :8] for name, t in feeds.items()}
    single, _ = run_eager(trace(model, alone), step, alone)
    torch.testing.assert_close(batch[0][1, :8], single[0][0], rtol=0, atol=1e-4)


SHARED: dict[str, Callable[[Tensor], Tensor]] = {
    "1 1 1 N": lambda m: m[None, None, None].bool(),
    "1 N": lambda m: m[None].bool(),
    "N N": lambda m: m[None].bool().expand(m.shape[0], -1),
    "1 1 N": lambda m: m[None, None].bool(),
}


@pytest.mark.parametrize("form", SHARED)
def test_one_mask_for_all_samples(form: str) -> None:
    feeds = sentences([14, 14, 14])
    feeds["mask"] = (torch.arange(14) < 9).long()
    _, plan = run_eager(trace(Masked(SHARED[form]), feeds), policy({"preset": "uniform", "keep": 0.5}), feeds)
    assert plan.made[0].valid.sum(1).tolist() == [5] * 3
    assert plan.made[0].index[:, :5].tolist() == [[0, 1, 3, 5, 7]] * 3


def test_a_constant_mask_is_no_padding() -> None:
    """A causal or windowed mask that does not come from an input hides no token for good."""
    feeds = sentences([14, 14])
    band = torch.ones(14, 14, dtype=torch.bool).triu(-4).tril(4)

    def make(mask: Tensor) -> Tensor:
        return band

    _, plan = run_eager(trace(Masked(make), feeds), policy({"preset": "uniform", "keep": 0.5}), feeds)
    assert plan.made[0].valid is None


def test_batch_of_one() -> None:
    feeds = sentences([9])
    feeds = {
        "ids": torch.nn.functional.pad(feeds["ids"], (0, 4)),
        "mask": torch.nn.functional.pad(feeds["mask"], (0, 4)),
    }
    step = policy({"preset": "evit", "keep": 0.6})
    padded, plan = run_eager(trace(text(), feeds), step, feeds)
    exact = {name: t[:, :9] for name, t in feeds.items()}
    alone, single = run_eager(trace(text(), exact), step, exact)
    torch.testing.assert_close(padded[1], alone[1], rtol=0, atol=1e-4)
    length = single.made[-1].size
    assert plan.made[-1].valid[0].tolist() == [True] * length + [False] * (plan.made[-1].size - length)
