"""Write ``kernels/<op>/configs.yaml``: compile every candidate for every architecture, keep those that fit.

python tools/kernel_configs.py [OP ...]
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from tokcc.kernels.compile import Built, Case, build
from tokcc.kernels.configs import ARCHS, Config

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
HEAD = """\
# Configurations that compile without spills and within shared memory, the default first; figures from ptxas.
# Written by tools/kernel_configs.py.
"""


def operations() -> list[str]:
    """Return the operations that have a Triton kernel."""
    return sorted(path.parent.name for path in KERNELS.glob("*/triton.py"))


def survivors(case: Case, arch: int) -> list[tuple[Config, Built]]:
    """Return the candidates that fit.

    Raises:
        RuntimeError: The smallest tile, which serves every call, fits in no form.
    """
    tried = [(config, build(case, config, arch)) for config in case.candidates]
    fitting = [(config, built) for config, built in tried if built.fits(arch)]
    if not fitting or fitting[-1][0].tile != case.candidates[-1].tile:
        raise RuntimeError(f"{case.name} {case.row}: the smallest tile does not fit sm_{arch}: {tried[-1]}")
    return fitting


def line(config: Config, built: Built) -> str:
    """Return one configuration as the table writes it."""
    figures = {"warps": config.warps, "stages": config.stages, "registers": built.registers, "shared": built.shared}
    return "{" + ", ".join(f"{name}: {value}" for name, value in {**config.tile, **figures}.items()) + "}"


def written(cases: list[Case]) -> str:
    """Return the table of an operation."""
    lines = [HEAD]
    for kernel in dict.fromkeys(case.name for case in cases):
        lines.append(f"{kernel}:\n")
        for arch in ARCHS:
            lines.append(f"  sm_{arch}:\n")
            for case in cases:
                if case.name == kernel:
                    lines.append(f"    {case.row}:\n")
                    lines.extend(f"      - {line(config, built)}\n" for config, built in survivors(case, arch))
    return "".join(lines)


def main(chosen: list[str]) -> None:
    """Write the tables of the chosen operations, or of all."""
    for op in chosen or operations():
        cases: list[Case] = import_module(f"tokcc.kernels.{op}.triton").cases()
        (KERNELS / op / "configs.yaml").write_text(written(cases), encoding="utf-8")
        print(f"{op}: {len(cases)} rows for each of {len(ARCHS)} architectures")


if __name__ == "__main__":
    main(sys.argv[1:])
