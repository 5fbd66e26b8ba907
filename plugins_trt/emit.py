"""Plugins as files: a module for TensorRT's builder, one that runs in Python instead, and the kernels beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import tokcc.plugins_trt.driver as driver
from tokcc.plugins_trt.aot_module import aot_module
from tokcc.plugins_trt.description import Plugin, refuse_sms
from tokcc.plugins_trt.jit_module import jit_module
from tokcc.plugins_trt.module_text import Kernels
from tokcc.plugins_trt.parts import NAMESPACE, SMS, PluginUse
from tokcc.plugins_trt.ptx import compile_tactics

__all__ = ["file_name", "write_plugins"]

_LABELS: Mapping[str, str] = {"fp16": "FP16", "bf16": "BF16", "fp32": "FP32"}
"""Types as TensorRT's combinations of types write them."""


def write_plugins(
    needs: Sequence[PluginUse], folder: Path, *, sms: Sequence[int] = SMS, namespace: str = NAMESPACE
) -> list[Path]:
    """Write the plugins that a graph uses.

    For each operation there is ``<op>.py``, a quick-deployable plugin whose kernel goes into the engine (import it
    before the network is parsed; the engine needs no Python), ``<op>_jit.py``, the same as a class that runs in Python
    (import one or the other, there too where the engine runs), and ``<op>.<type>[...].ptx``. The modules need
    TensorRT's Python package and numpy, and nothing of tokcc, torch or Triton.

    Kernels are compiled for sm_80, which the driver turns into code for any newer architecture.

    Args:
        needs: What nodes use, see :meth:`Plugin.takes`; the same may come several times.
        folder: Where to; made if it is not there.
        sms: Architectures that the engine is for.
        namespace: Of the plugins in TensorRT's registry.

    Returns:
        The files.

    Raises:
        LoweringError: No tactic serves a use or an architecture, or triton is not installed.
    """
    from tokcc.plugins_trt import PLUGINS  # found by importing this folder's modules

    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    for op in sorted({use.op for use in needs}):
        refuse_sms(op, sms)
        plugin = PLUGINS[op]
        uses = {(use.key, use.dtype): use for use in needs if use.op == op}
        kernels = _write_kernels(plugin, [uses[key] for key in sorted(uses)], folder, files)
        for name, text in (
            (f"{op}.py", aot_module(plugin, kernels, namespace)),
            (f"{op}_jit.py", jit_module(plugin, kernels, namespace)),
        ):
            files.append(folder / name)
            files[-1].write_text(text, encoding="utf-8")
    if files:
        files.append(folder / "tokcc_driver.py")
        files[-1].write_bytes(Path(driver.__file__).read_bytes())
    return files


def _write_kernels(plugin: Plugin, uses: Sequence[PluginUse], folder: Path, files: list[Path]) -> Kernels:
    kernels: Kernels = {}
    for use in uses:
        table = kernels.setdefault(use.key, {})
        variant = list(kernels).index(use.key)
        tactics = table[_LABELS[use.dtype]] = {}
        for tactic, compiled in enumerate(compile_tactics(plugin, use), 1):
            path = folder / file_name(plugin.op, use.dtype, variant, tactic)
            path.write_text(compiled.ptx, encoding="utf-8")
            files.append(path)
            tactics[tactic] = {
                "file": path.name,
                "name": compiled.name,
                "threads": compiled.threads,
                "shared": compiled.shared,
                "tile": dict(compiled.config.tile),
            }
    return kernels


def file_name(op: str, dtype: str, variant: int, tactic: int) -> str:
    """Return a kernel's file: ``<op>.<type>.ptx``, with a number where there are several numbers or tactics."""
    numbers = (f"v{variant}" if variant else "", f"t{tactic}" if tactic > 1 else "")
    return ".".join((op, dtype, *filter(None, numbers), "ptx"))
