"""The zoo keeps its promises: every entry exports, and the decomposed program equals eager."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.zoo import ZOO, ZooModel

# torch's own pytree copies a deprecated class in run_decompositions.
pytestmark = pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning")

ALL = list(ZOO)


def _entry(name: str) -> ZooModel:
    entry = ZOO[name]
    if reason := entry.available():
        pytest.skip(reason)
    return entry


def _compare(entry: ZooModel, program: nn.Module, eager: nn.Module, inputs: dict[str, Tensor]) -> None:
    with torch.no_grad():
        expected, found = eager(**inputs), program(**inputs)
    assert tuple(found) == tuple(expected) == entry.outputs
    for name in entry.outputs:
        torch.testing.assert_close(
            entry.defined(name, found[name], inputs),
            entry.defined(name, expected[name], inputs),
            rtol=0,
            atol=1e-5,
        )


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", ALL)
def test_decomposed_export_equals_eager(name: str, dynamic: bool) -> None:
    entry = _entry(name)
    model = entry.build()
    inputs = entry.inputs(2)
    shapes = entry.dynamic_shapes() if dynamic else None
    program = torch.export.export(model, (), kwargs=inputs, dynamic_shapes=shapes, strict=False)
    decomposed = program.run_decompositions({}).module()
    _compare(entry, decomposed, model, inputs)
    if dynamic:
        _compare(entry, decomposed, model, entry.inputs(3, 17 if entry.has_length else None, seed=1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_outputs_depend_on_the_input(name: str) -> None:
    entry = _entry(name)
    model = entry.build()
    first, second = entry.inputs(2, seed=0), entry.inputs(2, seed=1)
    with torch.no_grad():
        before, after, again = model(**first), model(**second), entry.build()(**first)
    for output in entry.outputs:
        assert before[output].isfinite().all()
        spread = before[output].std().item()
        assert (before[output] - after[output]).abs().mean().item() > 0.05 * spread
        torch.testing.assert_close(before[output], again[output], rtol=0, atol=0)
        if output in entry.token_outputs:
            assert before[output].std(dim=entry.token_axis).mean().item() > 0.05
            if not entry.windowed:
                assert before[output].shape[entry.token_axis] == entry.tokens


@pytest.mark.parametrize("name", ALL)
def test_inputs_match_the_declaration(name: str) -> None:
    entry = ZOO[name]
    inputs = entry.inputs(3)
    assert set(entry.dynamic_shapes()) == set(inputs)
    valid = entry.valid_rows(inputs)
    assert (valid is None) == (not entry.has_length)
    if valid is not None:
        assert valid.shape == (3, entry.tokens)
        assert valid[0].all()
        assert not valid[1].all()
        assert valid.any(dim=1).all()
