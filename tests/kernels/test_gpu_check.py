"""``make gpu-check`` knows every kernel, and says so where there is no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import environment, gpu_check, gpu_check_plugins
from benchmarks.gpu_check_cases import CHECKS, causal_lists
from tests.kernels.installed import needs_triton
from tokcc.kernels.decompositions import overload, triton_forms
from tokcc.plugins_trt import PLUGINS


@needs_triton
def test_every_kernel_has_inputs() -> None:
    assert sorted(CHECKS) == sorted(triton_forms())


@pytest.mark.parametrize("op", sorted(CHECKS))
def test_the_inputs_are_what_the_operation_takes(op: str) -> None:
    for found in gpu_check.tensors(overload(op)(*CHECKS[op].small(torch.float32))):
        assert found.isfinite().all()


def test_lists_ascend_and_end_on_the_diagonal() -> None:
    index, count = causal_lists(300, 500, 32, 4, 2, torch.device("cpu"))
    for head in range(2):
        for m in range(index.shape[2]):
            ids = index[0, head, m, : count[0, head, m]].tolist()
            assert ids == sorted(set(ids))
            assert ids[-1] == min(6 + m, 15)


def test_without_a_gpu_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(environment, "RESULTS", tmp_path)
    assert gpu_check.main([]) == 1
    assert "not run" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
def test_every_kernel_is_right_on_this_gpu() -> None:
    device = torch.device("cuda")
    results = [gpu_check.correct(op, dtype, device) for op in sorted(CHECKS) for dtype in gpu_check.DTYPES]
    assert [result for result in results if not result["ok"]] == []


def test_every_plugin_has_inputs() -> None:
    assert sorted(gpu_check_plugins.SMALL) == sorted(gpu_check_plugins.LARGE) == sorted(PLUGINS)
    for op in PLUGINS:
        for make in (*gpu_check_plugins.SMALL[op], *gpu_check_plugins.LARGE[op]):
            call = gpu_check_plugins.prepare(op, make(torch.float32))
            assert all(each.isfinite().all() for each in call.expected)


def test_what_a_plugin_did_not_write_counts_as_off() -> None:
    call = gpu_check_plugins.prepare("merge_tokens", gpu_check_plugins.SMALL["merge_tokens"][0](torch.float32))
    assert gpu_check_plugins.difference(call.outputs(call.inputs), call.expected) == float("inf")
    assert gpu_check_plugins.difference(call.expected, call.expected) == 0


@pytest.mark.gpu
def test_the_kernels_of_every_plugin_are_right_on_this_gpu() -> None:
    results = gpu_check_plugins.check_all(gpu_check.TOLERANCE, torch.device("cuda"))
    assert [result for result in results if not result["ok"]] == []
