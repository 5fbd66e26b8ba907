"""PTX as a TensorRT plugin takes it: only the documented arguments, no global scratch memory."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from tokcc.errors import LoweringError
from tokcc.kernels.compile import build
from tokcc.kernels.configs import Config
from tokcc.kernels.gpu import BASE_ARCH, has_triton
from tokcc.plugins_trt.description import Plugin
from tokcc.plugins_trt.parts import SHARED_LIMIT, PluginUse

__all__ = ["Compiled", "assemble", "compile_tactics", "parameters", "stripped", "without_lines"]

_HIDDEN = 2
"""Triton 3.6 appends two pointers to what it compiles: global scratch and the profiler's."""


@dataclass(frozen=True)
class Compiled:
    """A tactic of a plugin.

    Attributes:
        ptx: The text.
        name: The kernel's name in it.
        config: Tile, warps and stages.
        shared: Bytes of shared memory of a block.
        registers: Registers of a thread.
    """

    ptx: str = field(repr=False)
    name: str
    config: Config
    shared: int
    registers: int

    @property
    def threads(self) -> int:
        """Return the threads of a block."""
        return 32 * self.config.warps


def compile_tactics(plugin: Plugin, use: PluginUse) -> list[Compiled]:
    """Compile the tactics of a use; those that spill or want too much shared memory are left out.

    Raises:
        LoweringError: Triton is not installed, or no tactic is left.
    """
    if not has_triton():
        raise LoweringError(
            "TensorRT plugins are written from Triton kernels",
            needed="triton",
            found="it is not installed",
            help='pip install "tokcc[triton]", or use the graph without plugins',
        )
    case = plugin.case(use)
    name: str = case.kernel.fn.__name__
    wanted = ["u64"] * len(plugin.inputs) + ["u32"] * len(plugin.scalars) + ["u64"] * len(plugin.outputs)
    left = []
    for config in case.candidates:
        built = build(case, config, BASE_ARCH)
        if built.spills or built.shared > SHARED_LIMIT:
            continue
        assert built.scratch == 0, f"{name} wants memory that no plugin gets"
        ptx = without_lines(stripped(built.ptx, name, len(wanted)))
        assert parameters(ptx, name) == wanted, f"{name} takes other arguments than its plugin says"
        assert f".reqntid {32 * config.warps}" in ptx
        left.append(Compiled(ptx, name, config, built.shared, built.registers))
    if not left:
        raise LoweringError(
            f"the TensorRT plugin `{plugin.op}` has no tactic left",
            needed=f"a tile within {SHARED_LIMIT} bytes of shared memory and without spills",
            found=", ".join(f"{name} = {value}" for name, value in use.attributes.items()),
            help="use the graph without plugins",
        )
    return left


def stripped(ptx: str, name: str, count: int) -> str:
    """Return PTX without Triton's two hidden parameters, which must not be read.

    Args:
        ptx: What Triton wrote.
        name: The kernel.
        count: Its own parameters.
    """
    found = _entry(ptx, name)
    listed = [each.strip() for each in found[2].split(",")]
    assert len(listed) == count + _HIDDEN, f"{name}: {len(listed)} parameters, not {count} and {_HIDDEN}"
    for number, parameter in enumerate(listed[count:], count):
        own = f"{name}_param_{number}"
        assert parameter.startswith(".param .u64"), parameter
        assert len(re.findall(rf"\b{own}\b", ptx)) == 1, f"{own} is read"
    return ptx[: found.start(2)] + ",\n\t".join(listed[:count]) + ptx[found.end(2) :]


def without_lines(ptx: str) -> str:
    """Return PTX without what debuggers read: it names files of the machine that it was compiled on."""
    code = re.split(r"^\s*(?=\.file\s)", ptx, maxsplit=1, flags=re.MULTILINE)[0]  # files and sections stand last
    return re.sub(r"^\s*\.loc\s.*\n", "", code, flags=re.MULTILINE).rstrip() + "\n"


def parameters(ptx: str, name: str) -> list[str]:
    """Return the types of a kernel's parameters, such as ``["u64", "u32"]``."""
    return re.findall(r"\.param \.(\w+)", _entry(ptx, name)[2])


def _entry(ptx: str, name: str) -> re.Match[str]:
    found = re.search(r"(\.entry " + re.escape(name) + r"\(\s*)(.*?)(\s*\)\s*\.)", ptx, re.DOTALL)
    assert found is not None, f"no entry {name}"
    return found


def assemble(ptx: str, arch: int) -> str:
    """Assemble PTX for an architecture with the assembler that triton brings, and return what it says.

    Raises:
        RuntimeError: It refuses.
    """
    import triton  # only where kernels are compiled

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    assembler = tools / ("ptxas-blackwell" if arch >= 100 else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx, encoding="utf-8")
        command = [str(assembler), "-v", f"--gpu-name=sm_{arch}", str(source), "-o", str(source.with_suffix(".cubin"))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ptxas: {done.stderr}")
    return done.stderr
