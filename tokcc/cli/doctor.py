"""``tokcc doctor``: what works on this machine, and what to install for the rest."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Literal

from rich.markup import escape
from rich.table import Table

from tokcc.backends.cxx import CXX_HELP, cxx_compiler, cxx_missing
from tokcc.cli.output import Json, Output, Quiet, Verbose

__all__ = ["doctor"]

State = Literal["works", "broken", "missing"]

_SECONDS_TO_IMPORT = 120


@dataclass(frozen=True)
class Package:
    """A package that some part of tokcc needs.

    Attributes:
        module: What is imported.
        use: What it is for.
        install: What to do when it is missing.
        detail: An expression on the imported ``module`` that tells more, such as the providers of a runtime.
    """

    module: str
    use: str
    install: str
    detail: str = ""


@dataclass(frozen=True)
class Found:
    """What was found of a package."""

    name: str
    state: State
    version: str
    use: str
    detail: str
    help: str


@dataclass(frozen=True)
class BackendState:
    """Whether engines of a backend can be built and run here."""

    name: str
    state: Literal["works", "builds only", "unavailable"]
    why: str


PACKAGES = (
    Package("torch", "capture, pt2, aoti", "pip install tokcc", "'CUDA' if module.cuda.is_available() else 'CPU only'"),
    Package("onnx", "onnx engines", "pip install tokcc"),
    Package("onnxscript", "onnx engines", "pip install tokcc"),
    Package(
        "onnxruntime",
        "running onnx engines, calibration",
        'pip install "tokcc[cpu]" (or "tokcc[gpu]", not both)',
        "', '.join(module.get_available_providers())",
    ),
    Package("openvino", "running onnx engines on Intel", 'pip install "tokcc[openvino]"'),
    Package("tensorrt", "tensorrt engines", "install TensorRT from NVIDIA: https://developer.nvidia.com/tensorrt"),
    Package("tensorrt_rtx", "tensorrt engines without plugins", "pip install tensorrt-rtx-cu13"),
    Package("torch_tensorrt", "tensorrt from torch", "pip install torch-tensorrt (needs CUDA and libnvinfer)"),
    Package("triton", "GPU kernels", "pip install triton (comes with a CUDA build of torch)"),
    Package("transformers", "Hugging Face models", 'pip install "tokcc[hf]"'),
    Package("timm", "timm models", "pip install timm torchvision"),
    Package("matplotlib", "pictures in reports", 'pip install "tokcc[report]"'),
    Package("jinja2", "report.html", 'pip install "tokcc[report]"'),
)
TORCH_TENSORRT = Package(
    "tokcc.backends.torch_tensorrt", "engines through Torch-TensorRT", "", "'; '.join(module.lacking())"
)
"""Ours, which knows what has to go together; its detail is what is missing."""

# Runs in a process of its own: a broken native library may end the process that imports it.
_PROBE = """
import importlib, sys
from importlib import metadata
module = importlib.import_module(sys.argv[1])
version = getattr(module, "__version__", None)
if not isinstance(version, str):
    names = metadata.packages_distributions().get(sys.argv[1], [])
    version = metadata.version(names[0]) if names else "unknown"
print("tokcc-found", version, eval(sys.argv[2]) if sys.argv[2] else "", sep="\\t")
"""


def doctor(json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """Say which backends and runtimes work here, with versions, and what to install for the others."""
    out = Output(json=json, quiet=quiet, verbose=verbose)
    with out.running():
        wanted = (*PACKAGES, TORCH_TENSORRT)
        with out.progress().stage("import packages", len(wanted)) as advance, ThreadPoolExecutor(4) as pool:
            found = []
            for each in pool.map(probe, wanted):
                found.append(each)
                advance(1)
        backends = backend_states({each.name: each for each in found})
        found = [each for each in found if each.name != TORCH_TENSORRT.module]
        out.data(
            {
                "python": sys.version.split()[0],
                "backends": [asdict(state) for state in backends],
                "packages": [asdict(each) for each in found],
            }
        )
        out.show(_backend_table(backends), "", _package_table(found))


def probe(package: Package) -> Found:
    """Import a package in a process of its own."""
    if importlib.util.find_spec(package.module) is None:
        return Found(package.module, "missing", "", package.use, "", package.install)
    command = [sys.executable, "-c", _PROBE, package.module, package.detail]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS_TO_IMPORT)
    except subprocess.TimeoutExpired:
        reason = f"importing took more than {_SECONDS_TO_IMPORT} s"
        return Found(package.module, "broken", "", package.use, reason, package.install)
    lines = [line for line in done.stdout.splitlines() if line.startswith("tokcc-found\t")]
    if done.returncode != 0 or not lines:
        errors = done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"]
        return Found(package.module, "broken", "", package.use, errors[-1], package.install)
    _, version, detail = lines[-1].split("\t")
    return Found(package.module, "works", version, package.use, detail, "")


def backend_states(found: dict[str, Found]) -> list[BackendState]:
    """Return what the packages add up to."""

    def lacking(*names: str) -> list[str]:
        return [f"{name} is {found[name].state}" for name in names if found[name].state != "works"]

    def state(name: str, build: list[str], run: list[str]) -> BackendState:
        if build:
            return BackendState(name, "unavailable", "; ".join(build))
        return BackendState(name, "builds only" if run else "works", "; ".join(run))

    compiler = [] if cxx_compiler() else [f"{cxx_missing()}: {CXX_HELP}"]
    builders = lacking("tensorrt", "tensorrt_rtx")
    unbuilt = builders if len(builders) == 2 else []
    if not unbuilt and found["torch"].detail != "CUDA":
        unbuilt = ["engines can be built here, and need a GPU to run"]
    return [
        state("onnx", lacking("torch", "onnx", "onnxscript"), lacking("onnxruntime")),
        state("pt2", lacking("torch"), []),
        state("aoti", lacking("torch") + compiler, []),
        # The folder for TensorRT (an ONNX file, plugins, a build script) is written without TensorRT.
        state("tensorrt", lacking("torch", "onnx", "onnxscript"), unbuilt),
        state("torch_tensorrt", lacking("torch") or _missing(found[TORCH_TENSORRT.module]), []),
    ]


def _missing(part: Found) -> list[str]:
    """Return what a part of ours says is missing."""
    if part.state != "works":
        return [f"it does not import: {part.detail}"]
    return [part.detail] if part.detail else []


def _backend_table(states: list[BackendState]) -> Table:
    table = _empty("backend", "state", "why")
    for state in states:
        table.add_row(state.name, _coloured(state.state), escape(state.why))
    return table


def _package_table(found: list[Found]) -> Table:
    table = _empty("package", "state", "version", "for", "note")
    for each in found:
        note = "; ".join(part for part in (each.detail, each.help) if part)
        table.add_row(each.name, _coloured(each.state), each.version, escape(each.use), escape(note))
    return table


def _empty(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=column in ("backend", "package", "state", "version"), overflow="fold")
    return table


def _coloured(state: str) -> str:
    styles = {"works": "green", "broken": "red", "unavailable": "red"}
    return f"[{styles.get(state, 'yellow')}]{state}[/]"
