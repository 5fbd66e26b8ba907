"""Where a number was measured: the machine, the versions, the memory of a process."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from pydantic import JsonValue

from tokcc.errors import TokccError
from tokcc.report.schema import Machine

__all__ = ["describe_machine", "peak_memory"]

PACKAGES = (
    "tokcc",
    "torch",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxscript",
    "transformers",
    "openvino",
)


def describe_machine(threads: int = 0, *, packages: Iterable[str] = PACKAGES, gpu: str | None = None) -> Machine:
    """Describe this machine.

    Args:
        threads: Threads that the runtime was given; 0 = its default.
        packages: Distributions whose versions to record; those not installed are left out.
        gpu: Name of the GPU, when one took part.
    """
    return Machine(
        cpu=_cpu_model(),
        cores=_usable_cores(),
        threads=threads,
        os=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        memory_bytes=_physical_memory(),
        gpu=gpu,
        versions=_versions(packages),
    )


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        text = ""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in {"model name", "Hardware", "Processor"} and value.strip():
            return value.strip()
    return platform.processor() or platform.machine() or "unknown"


def _usable_cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # only Linux limits a process to some of the cores
        return os.cpu_count() or 1


def _physical_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # no sysconf (Windows), or names it does not know
        return None


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


# VmHWM and not ru_maxrss: the latter survives exec, so a child of a big process would start with its parent's peak.
_CHILD = """
import importlib, json, sys
module, _, name = sys.argv[1].partition(":")
getattr(importlib.import_module(module), name)(*json.loads(sys.argv[2]))
with open("/proc/self/status") as status:
    print(next(line for line in status if line.startswith("VmHWM:")))
"""


def peak_memory(function: str, *args: JsonValue, timeout_s: float = 300.0) -> int | None:
    """Run a function in a fresh process and return that process's peak resident memory in bytes.

    A fresh process, because the peak of the one that compiles says nothing about the engine; and not one made by
    ``multiprocessing``, which would run a user's script a second time. Compare two peaks rather than read one: a few
    hundred megabytes are the interpreter and its libraries.

    Args:
        function: ``package.module:name``; it loads and runs the engine.
        args: What it is called with, as JSON values.
        timeout_s: Give up after so many seconds.

    Returns:
        Bytes, or None where the system does not tell (only Linux does).

    Raises:
        TokccError: The function failed, the process died, or it took too long.
    """
    if not Path("/proc/self/status").exists():
        return None
    command = [sys.executable, "-c", _CHILD, function, json.dumps(args)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise TokccError("measuring the peak memory took too long", needed=f"at most {timeout_s:g} s") from error
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise TokccError("cannot measure the peak memory", found=last, help="is there enough memory?")
    return int(done.stdout.split("VmHWM:")[-1].split()[0]) * 1024
