"""Shipped configurations compile for every architecture without a GPU: no spills, shared memory within the limit."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch

from tests.kernels.installed import needs_triton
from tokcc.kernels.configs import ARCHS, SHARED_LIMITS, choose, row, table

FOLDER = Path(__file__).resolve().parents[2] / "kernels"
OPS = sorted(path.parent.name for path in FOLDER.glob("*/configs.yaml"))
INSTRUCTIONS = {80: "mma.sync", 90: "wgmma", 100: "tcgen05", 120: "mma.sync"}


@pytest.mark.parametrize("op", OPS)
def test_tables_are_whole_and_within_limits(op: str) -> None:
    for kernel, archs in table(op).items():
        assert list(archs) == [f"sm_{arch}" for arch in ARCHS]
        for name in archs["sm_80"]:
            for arch in ARCHS:
                entries = archs[f"sm_{arch}"][name]
                assert entries
                assert all(entry["shared"] <= SHARED_LIMITS[arch] and entry["registers"] <= 255 for entry in entries)
                # The last serves every call: no tile is smaller.
                sizes = [config.tile for config in row(op, kernel, arch, name)]
                assert all(sizes[-1][key] <= size[key] for size in sizes for key in size)


def test_a_configuration_is_chosen_without_running() -> None:
    assert choose("block_sparse_attention", "attend", 90, "half 64").tile == {"BQ": 128, "BK": 64}
    fits = choose("block_sparse_attention", "attend", 90, "half 64", lambda tile: 64 % tile["BQ"] == 0)
    assert fits.tile == {"BQ": 64, "BK": 64}
    last = choose("block_sparse_attention", "attend", 90, "half 64", lambda tile: 24 % tile["BQ"] == 0)
    assert last.tile == {"BQ": 16, "BK": 16}


@pytest.mark.parametrize(
    ("arch", "same"), [(86, 120), (89, 120), (87, 80), (103, 100), (121, 120), (130, 120), (95, 90)]
)
def test_kin_and_newer_architectures_have_a_table(arch: int, same: int) -> None:
    assert row("sparse_decode", "part", arch, "half 128") == row("sparse_decode", "part", same, "half 128")


@needs_triton
@pytest.mark.parametrize("arch", ARCHS)
def test_the_default_for_prefill_fits_and_uses_tensor_cores(arch: int) -> None:
    from tokcc.kernels.compile import build

    case = import_module("tokcc.kernels.block_sparse_attention.triton").cases()[0]
    entry = table("block_sparse_attention")["attend"][f"sm_{arch}"][case.row][0]
    built = build(case, row("block_sparse_attention", "attend", arch, case.row)[0], arch)
    assert built.fits(arch)
    assert (built.registers, built.shared) == (entry["registers"], entry["shared"])
    assert INSTRUCTIONS[arch] in built.ptx
    assert "cp.async" in built.ptx


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("half", ["fp16", "bf16"])
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op", OPS)
def test_every_default_and_fallback_fits(op: str, arch: int, half: str) -> None:
    from tokcc.kernels.compile import build

    for case in import_module(f"tokcc.kernels.{op}.triton").cases(half):
        shipped = row(op, case.name, arch, case.row)
        for config in {id(shipped[0]): shipped[0], id(shipped[-1]): shipped[-1]}.values():
            built = build(case, config, arch)
            assert built.fits(arch), (case.name, case.row, config, built)


@needs_triton
def test_spills_and_shared_memory_are_found() -> None:
    from tokcc.kernels.compile import Built, build
    from tokcc.kernels.configs import Config

    case = import_module("tokcc.kernels.block_sparse_attention.triton").cases()[0]
    full = build(case, Config({"BQ": 128, "BK": 128}, 4, 2), 80)
    assert full.spills > 0
    assert not full.fits(80)
    assert not Built("", 32, 0, SHARED_LIMITS[120] + 1).fits(120)


def test_the_type_of_a_row() -> None:
    from tokcc.kernels.configs import kind

    assert [kind(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)] == ["half", "half", "fp32"]
