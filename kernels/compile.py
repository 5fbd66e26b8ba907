"""Compile Triton kernels for a named architecture without a GPU, and read what they cost.

Registers and spills are what ``ptxas -v`` says of the PTX, shared memory is what Triton's launcher would ask for.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokcc.kernels.configs import SHARED_LIMITS, Config

__all__ = ["Built", "Case", "build"]


@dataclass(frozen=True)
class Case:
    """A kernel for one set of types and constants.

    Attributes:
        kernel: The ``@triton.jit`` function.
        row: The row of the table that it belongs to.
        types: The type of each argument that is no constant, as Triton writes it: ``*fp16``, ``i32``, ``fp32``.
        constants: The constants that the row fixes.
        candidates: What to try, in order of preference.
        multiples_of_16: Integer arguments that launches find to be such: strides, mostly. Pointers always are.
    """

    kernel: Any
    row: str
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    candidates: tuple[Config, ...]
    multiples_of_16: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """Return the kernel's name in tables: its function's, without underscores in front."""
        return str(self.kernel.fn.__name__).lstrip("_")


@dataclass(frozen=True)
class Built:
    """A compiled kernel.

    Attributes:
        ptx: The assembly, for one architecture.
        registers: Registers of a thread.
        spills: Bytes of a thread that went to local memory.
        shared: Bytes of shared memory of a block.
        scratch: Bytes of global memory that Triton's launcher would hand in.
    """

    ptx: str = field(repr=False)
    registers: int
    spills: int
    shared: int
    scratch: int = 0

    def fits(self, arch: int) -> bool:
        """Whether the kernel runs on the architecture without spilling."""
        return self.spills == 0 and self.shared <= SHARED_LIMITS[arch]


def build(case: Case, config: Config, arch: int) -> Built:
    """Compile one case with one configuration.

    Raises:
        ImportError: triton is not installed.
        RuntimeError: ptxas refuses the PTX.
    """
    import triton  # only where kernels are compiled
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names: list[str] = case.kernel.arg_names
    constants = {**case.constants, **config.tile}
    source = ASTSource(
        fn=case.kernel,
        signature={name: case.types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        # Without these, loads are neither wide nor pipelined.
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name, kind in case.types.items()
            if kind.startswith("*") or name in case.multiples_of_16
        },
    )
    options = {"num_warps": config.warps, "num_stages": config.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx: str = compiled.asm["ptx"]
    registers, spills = _resources(ptx, Path(triton.__file__).parent / "backends" / "nvidia" / "bin")
    metadata = compiled.metadata
    scratch = metadata.global_scratch_size + metadata.profile_scratch_size
    return Built(ptx, registers, spills, int(metadata.shared), int(scratch))


def _resources(ptx: str, tools: Path) -> tuple[int, int]:
    target = re.search(r"^\.target (sm_(\d+)a?)", ptx, re.MULTILINE)
    assert target is not None, "PTX names its target"
    assembler = tools / ("ptxas-blackwell" if int(target[2]) >= 100 else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx, encoding="utf-8")
        command = [str(assembler), "-v", "--gpu-name", target[1], str(path), "-o", str(path.with_suffix(".cubin"))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ptxas: {done.stderr}")
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)]
    return max(registers), max(spills, default=0)
