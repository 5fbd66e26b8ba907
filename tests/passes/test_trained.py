"""Weights of trained pieces: what is read, what is refused and in which words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.passes.oracle import program_of
from tests.passes.reference_models import WIDTH, patches, vision
from tokcc.errors import PolicyError
from tokcc.testing import plan_for, reduce_program, run_program

_HIDDEN = 6


def scorer(**changes: Tensor | None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    tensors: dict[str, Tensor | None] = {
        "layers.0.weight": torch.randn(_HIDDEN, WIDTH, generator=generator),
        "layers.0.bias": torch.randn(_HIDDEN, generator=generator),
        "layers.1.weight": torch.randn(1, _HIDDEN, generator=generator),
        **changes,
    }
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def refused(path: Path, tensors: Mapping[str, Tensor] | None, **piece: Any) -> PolicyError:
    file = path / "scorer.safetensors"
    if tensors is not None:
        save_file(dict(tensors), file)
    policy = path / "policy.yaml"
    extra = "".join(f", {key}: {value}" for key, value in {"weights": file.name, **piece}.items() if value is not None)
    policy.write_text(f"steps:\n  - node: prune\n    score: {{kind: mlp{extra}}}\n    budget: {{keep: 0.5}}\n")
    with pytest.raises(PolicyError) as caught:
        plan_for(program_of(vision(), {"patches": patches(1, 17)}), policy)
    error = caught.value
    assert "policy.yaml:3" in (error.policy or "")
    return error


def test_a_path_counts_from_the_policy(tmp_path: Path) -> None:
    save_file(scorer(), tmp_path / "scorer.safetensors")
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        "steps:\n  - node: prune\n    at: {layers: [1]}\n"
        "    score: {kind: mlp, weights: scorer.safetensors}\n    budget: {keep: 0.5}\n"
    )
    feeds = {"patches": patches(2, 17)}
    reduced, _ = reduce_program(program_of(vision(), feeds), policy)
    names = [name for name in reduced.constants if name.startswith("mlp_layers_")]
    assert sorted(names) == ["mlp_layers_0_bias", "mlp_layers_0_weight", "mlp_layers_1_weight"]
    assert all(torch.isfinite(out).all() for out in run_program(reduced, feeds))


def test_half_precision_and_other_names(tmp_path: Path) -> None:
    """Weights are used in fp32, and may be called anything in the file: a checkpoint needs no conversion."""
    file, feeds = tmp_path / "w.safetensors", {"patches": patches(2, 17)}
    half = {name: tensor.to(torch.bfloat16) for name, tensor in scorer().items()}
    save_file({f"model.{name}": tensor for name, tensor in half.items()}, file)
    save_file({name: tensor.float() for name, tensor in half.items()}, tmp_path / "same.safetensors")
    step = {"node": "prune", "budget": {"keep": 0.5}, "at": {"layers": [1]}}
    renamed = {"kind": "mlp", "weights": str(file), "names": {name: f"model.{name}" for name in half}}
    plain = {"kind": "mlp", "weights": str(tmp_path / "same.safetensors")}
    program = program_of(vision(), feeds)
    results = [
        run_program(reduce_program(program, {"steps": [{**step, "score": score}]})[0], feeds)
        for score in (renamed, plain)
    ]
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_no_weights(tmp_path: Path) -> None:
    error = refused(tmp_path, None, weights=None)
    assert "no weights are given" in error.what
    assert "layers.0.weight float[hidden_0, C]" in (error.needed or "")
    assert f"C = {WIDTH}" in (error.help or "")


def test_no_file(tmp_path: Path) -> None:
    assert "cannot be read" in refused(tmp_path, None).what


def test_pickles_are_not_read(tmp_path: Path) -> None:
    torch.save(scorer(), tmp_path / "scorer.pt")
    error = refused(tmp_path, None, weights="scorer.pt")
    assert "not a safetensors file" in error.what
    assert "pickled" in (error.help or "")


def test_a_file_that_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "scorer.safetensors").write_bytes(b"\x00" * 40)
    assert "cannot be read" in refused(tmp_path, None).what


def test_a_tensor_is_missing(tmp_path: Path) -> None:
    error = refused(tmp_path, scorer(**{"layers.1.weight": None}))
    assert error.what == "the weights have no tensor `layers.1.weight`"
    assert error.found == "layers.0.bias, layers.0.weight"
    assert "names: {layers.1.weight: NAME}" in (error.help or "")
    assert "scorer.safetensors" in (error.policy or "")


@pytest.mark.parametrize(
    ("name", "tensor", "found"),
    [
        ("layers.0.weight", torch.zeros(_HIDDEN, WIDTH + 1), f"f32[{_HIDDEN}, {WIDTH + 1}]"),
        ("layers.1.weight", torch.zeros(1, _HIDDEN + 1), f"f32[1, {_HIDDEN + 1}]"),
        ("layers.1.weight", torch.zeros(_HIDDEN), f"f32[{_HIDDEN}]"),
        ("layers.0.bias", torch.zeros(_HIDDEN, dtype=torch.int64), f"i64[{_HIDDEN}]"),
    ],
)
def test_a_tensor_does_not_fit(tmp_path: Path, name: str, tensor: Tensor, found: str) -> None:
    """The model's sizes are given, the file's own sizes must agree among themselves."""
    error = refused(tmp_path, scorer(**{name: tensor}))
    assert error.what == f"the tensor `{name}` of the weights does not fit"
    assert error.found == found
    assert name in (error.needed or "")


def test_numbers_that_are_none(tmp_path: Path) -> None:
    error = refused(tmp_path, scorer(**{"layers.0.bias": torch.full((_HIDDEN,), float("nan"))}))
    assert "NaN" in error.what


def test_a_name_that_the_piece_does_not_have(tmp_path: Path) -> None:
    assert "`head`" in refused(tmp_path, scorer(), names="{head: x}").what


def test_weights_for_a_piece_that_needs_none(tmp_path: Path) -> None:
    save_file(scorer(), tmp_path / "w.safetensors")
    score = {"kind": "text_relevance", "weights": str(tmp_path / "w.safetensors")}
    with pytest.raises(PolicyError, match="needs no weights"):
        plan_for(
            program_of(vision(), {"patches": patches(1, 17)}),
            {"steps": [{"node": "prune", "score": score, "budget": {"keep": 0.5}}]},
        )


def test_weights_of_a_score_inside_another(tmp_path: Path) -> None:
    save_file(scorer(), tmp_path / "w.safetensors")
    inner = {"kind": "mlp", "weights": str(tmp_path / "w.safetensors")}
    step = {"node": "prune", "budget": {"keep": 0.5}, "at": {"layers": [1]}}
    both = {"kind": "combined", "by": "sum", "of": [inner, inner]}
    feeds = {"patches": patches(2, 17)}
    program = program_of(vision(), feeds)
    outputs = [
        run_program(reduce_program(program, {"steps": [{**step, "score": score}]})[0], feeds) for score in (inner, both)
    ]
    for one, two in zip(*outputs, strict=True):
        torch.testing.assert_close(one, two)
