"""Packages of AOTInductor for texts, image towers, decoders and models in parts: equal to the other engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tokcc
from tests.decoders.bundles import compiled, model_folder
from tests.vlm.bundles import compiled as compiled_parts
from tests.zoo import ZOO
from tokcc.backends.bundle import Bundle
from tokcc.backends.reference import load_reference
from tokcc.pipeline import verify

pytestmark = [
    pytest.mark.slow,
    # torch's own pytree copies a deprecated class in run_decompositions.
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning"),
]

BOTH = ("onnx", "aoti")


def steps(*given: dict[str, Any], **further: Any) -> dict[str, Any]:
    return {"version": 1, "name": "p", "steps": list(given), **further}


def passed(bundle: Bundle) -> set[str]:
    """The engines whose every output equals the eager program's, of the bundle as it is on the disk."""
    bundle.verify()
    parity = verify(bundle)
    assert parity.passed
    return {check.engine for check in parity.checks}


def test_a_text_encoder_of_one_length(tmp_path: Path) -> None:
    """Layer after layer takes tokens away, of texts with padding, in batches of any size."""
    entry = ZOO["bert"]
    batch = {name: {0: axes[0]} for name, axes in entry.dynamic_shapes().items()}
    bundle = tokcc.compile(
        entry.build(),
        steps({"preset": "tome", "r": 3}),
        example_inputs=entry.inputs(2),
        dynamic_shapes=batch,
        backends=BOTH,
        output=tmp_path / "out",
        calibrate=False,
    )
    assert passed(bundle) == set(BOTH)
    for size in (1, 5):
        feeds = entry.inputs(size, seed=size)
        arrays = {name: value.numpy() for name, value in feeds.items()}
        want, got = (bundle.run(arrays, backend) for backend in BOTH)
        for name, value in want.items():
            defined = [entry.defined(name, torch.from_numpy(x), feeds) for x in (got[name], value)]
            torch.testing.assert_close(*defined, rtol=1e-3, atol=1e-4)


def test_an_image_tower(tmp_path: Path) -> None:
    entry = ZOO["clip_vision"]
    bundle = tokcc.compile(
        entry.build(),
        steps({"preset": "tome", "r": 5}),
        example_inputs=entry.inputs(2),
        dynamic_shapes=entry.dynamic_shapes(),
        backends=BOTH,
        output=tmp_path / "out",
        calibrate=False,
    )
    assert passed(bundle) == set(BOTH)
    arrays = {name: value.numpy() for name, value in entry.inputs(3, seed=3).items()}
    want, got = (bundle.run(arrays, backend) for backend in BOTH)
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "policy",
    [
        "none",
        "h2o",
        steps(kv={"layout": "slots", "tokens": 64}),
        steps({"preset": "quest", "tokens": 16, "page": 4, "length": 16}, kv={"layout": "slots", "tokens": 64}),
    ],
    ids=["grows", "evicts", "slots", "slots-sparse"],
)
def test_a_decoder(policy: Any, tmp_path: Path) -> None:
    """Caches that grow, that are cut, and that have their slots from the beginning."""
    bundle = compiled(model_folder(tmp_path / "model"), tmp_path / "out", policy, backends=BOTH)
    assert passed(bundle) == set(BOTH)
    sparse = isinstance(policy, dict) and bool(policy["steps"])
    assert any("attends both ways" in note for note in bundle.report.notes) is sparse


def test_a_model_in_parts(tmp_path: Path) -> None:
    """Encoder, embedding and decoder, each a package of its own."""
    policy = steps({"preset": "fastervlm", "tokens": 5}, {"preset": "h2o", "tokens": 12})
    bundle = compiled_parts("llava", tmp_path / "out", policy, backends=BOTH)
    names = set(bundle.manifest.parts)
    assert len(names) == 3
    assert passed(bundle) == {f"{part} ({backend})" for part in names for backend in BOTH}
    for name in names:
        part = bundle.part(name)
        assert part.engine("aoti").is_file()
        feeds = {name: value.numpy() for name, value in load_reference(part.path / "reference.npz")[0][0].items()}
        want, got = (part.run(feeds, backend) for backend in BOTH)
        assert list(got) == list(want)
