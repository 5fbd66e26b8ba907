"""Where the tokens of real architectures come from."""

from __future__ import annotations

import pytest

from tests.zoo.models import ZOO
from tokcc.analysis.sites import find_sites
from tokcc.testing import trace

# torch's own pytree copies a deprecated class in run_decompositions.
pytestmark = pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning")


@pytest.mark.parametrize(
    ("name", "laid_out", "looked_up"),
    [
        ("deit", (8, 8), False),
        ("ast", (4, 16), False),
        ("videomae", (4, 4, 4), False),
        ("whisper_encoder", (64,), False),
        ("clip_vision", (8, 8), False),
        ("roberta", None, True),
        ("torch_encoder_bnc_post", None, False),
    ],
)
def test_of_architectures(name: str, laid_out: tuple[int, ...] | None, looked_up: bool) -> None:
    sites = find_sites(trace(ZOO[name].build(), ZOO[name].inputs(2)))
    assert (sites.laid_out, sites.looked_up) == (laid_out, looked_up)
