from __future__ import annotations

import json
from pathlib import Path

import pytest

from tokcc.errors import TokccError
from tokcc.report.machine import describe_machine, peak_memory

on_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")


def test_the_machine_is_described() -> None:
    machine = describe_machine(3, packages=("numpy", "no-such-package-at-all"))
    assert machine.cpu
    assert machine.cores >= 1
    assert machine.threads == 3
    assert list(machine.versions) == ["numpy"]
    assert json.loads(machine.model_dump_json())["python"].startswith("3.")


@on_linux
def test_peak_memory_sees_what_the_function_allocates() -> None:
    small = peak_memory("builtins:bytearray", 1)
    large = peak_memory("builtins:bytearray", 100_000_000)
    assert small is not None
    assert large is not None
    assert 90_000_000 < large - small < 130_000_000


@on_linux
def test_a_failing_function_is_reported_with_its_last_line() -> None:
    with pytest.raises(TokccError, match="ValueError"):
        peak_memory("builtins:int", "x")


@on_linux
def test_a_hanging_function_is_given_up() -> None:
    with pytest.raises(TokccError, match="too long"):
        peak_memory("time:sleep", 30, timeout_s=0.5)
