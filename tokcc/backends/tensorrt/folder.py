"""What a TensorRT user builds from: the model, the shapes, the commands, a repository for a server."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tokcc.backends.tensorrt.profiles import KINDS, Profile
from tokcc.backends.tensorrt.server import Tensor, repository_config

__all__ = ["CHECKED_WITH", "Described", "write_folder"]

CHECKED_WITH = "TensorRT for RTX 1.7.1.116"
"""The builder that graphs of all methods were given, without a GPU."""
_RTX = "tensorrt-rtx-cu13==1.7.1.116"


@dataclass(frozen=True)
class Described:
    """What is said of an engine.

    Attributes:
        policy: The policy's name.
        inputs: Its inputs.
        outputs: Its outputs.
        profiles: Shapes to build for.
        dtype: Floating-point type of the graph.
        plugins: Operations that have plugins in the folder.
        name: Of the model in the server's repository.
    """

    policy: str
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    profiles: Sequence[Profile]
    dtype: str
    plugins: Sequence[str] = ()
    name: str = "model"

    @property
    def plan(self) -> str:
        """Where the server looks for the engine."""
        return f"triton/{self.name}/1/model.plan"


def write_folder(folder: Path, about: Described) -> None:
    """Write everything beside ``model.onnx``."""
    shapes = {"profiles": [profile.to_dict() for profile in about.profiles]}
    (folder / "profiles.json").write_text(json.dumps(shapes, indent=1) + "\n", encoding="utf-8")
    spec = find_spec("tokcc.backends.tensorrt.build_engine")
    assert spec is not None
    assert spec.origin is not None
    builder = Path(spec.origin).read_text(encoding="utf-8")
    (folder / "build_engine.py").write_text(builder, encoding="utf-8")
    script = folder / "build.sh"
    script.write_text(_script(about), encoding="utf-8")
    script.chmod(0o755)
    model = folder / "triton" / about.name
    (model / "1").mkdir(parents=True)
    config = repository_config(about.inputs, about.outputs, about.profiles)
    (model / "config.pbtxt").write_text(config, encoding="utf-8")
    (folder / "README.md").write_text(_readme(about), encoding="utf-8")


def _dynamic(about: Described) -> list[Profile]:
    """Return the profiles with the inputs that vary only: trtexec takes no shapes of others."""
    varying = {tensor.name for tensor in about.inputs if any(isinstance(size, str) for size in tensor.shape)}
    kept = [
        Profile(profile.name, {name: three for name, three in profile.shapes.items() if name in varying})
        for profile in about.profiles
    ]
    return [profile for profile in kept if profile.shapes]


def _script(about: Described) -> str:
    """Return the line for trtexec; right for TensorRT 10 and 11."""
    options = ["--onnx=model.onnx", "--stronglyTyped"]
    profiles = _dynamic(about)
    for number, profile in enumerate(profiles):
        if len(profiles) > 1:
            options.append(f"--profile={number}")
        options += [shlex.quote(f"--{kind}Shapes={profile.option(kind)}") for kind in KINDS]
    options += ["--timingCacheFile=timing.cache", "--skipInference", f"--saveEngine={about.plan}"]
    line = " \\\n  ".join(["trtexec", *options, '"$@"'])
    return (
        "#!/bin/sh\n"
        "# Builds the engine of model.onnx for the GPU of this machine, into the server's model repository.\n"
        "# Further options of trtexec may follow, such as --builderOptimizationLevel=5.\n"
        'set -eu\ncd "$(dirname "$0")"\n'
        f'mkdir -p "$(dirname {about.plan})"\n'
        f"exec {line}\n"
    )


def _readme(about: Described) -> str:
    rows = "\n".join(
        f"| {profile.name} | `{name}` | {' | '.join('x'.join(map(str, each)) for each in three)} |"
        for profile in about.profiles
        for name, three in profile.shapes.items()
    )
    plugins = ""
    if about.plugins:
        listed = ", ".join(f"`{name}`" for name in about.plugins)
        plugins = f"""
## With plugins

`model_plugins.onnx` is the same model with {listed} as plugins: kernels compiled ahead of time, in `plugins/`. trtexec
cannot load plugins written in Python; the finished engine needs neither Python nor the plugin files.

    python build_engine.py --plugins
"""
    run_in = ", in float32, since it has no bfloat16" if about.dtype == "bfloat16" else ""
    return f"""# TensorRT engine: policy `{about.policy}`, {about.dtype}

| file | what it is |
|---|---|
| `model.onnx` | the reduced model, standard operations only |
| `profiles.json` | the shapes the engine is built for |
| `build.sh` | builds with trtexec, into `triton/` |
| `build_engine.py` | builds with the Python package of TensorRT, or of TensorRT for RTX |
| `triton/` | a model repository for Triton Inference Server |

## Build

On the machine that the engine is for, with TensorRT 10 or 11 (either one does it):

    sh build.sh
    python build_engine.py --timing-cache timing.cache --engine {about.plan}

Without a GPU, with TensorRT for RTX (A100, RTX 30, 40 and 50; not the H100 and B200):

    pip install {_RTX}
    python build_engine.py --rtx --compute-capability 8.0 8.6 8.9 12.0

Serve: `tritonserver --model-repository=$PWD/triton`.
{plugins}
## Shapes

| profile | input | min | opt | max |
|---|---|---|---|---|
{rows}

Other shapes: change `profiles.json` (and the options in `build.sh`) and build again.

## What was checked, and what was not

| what | how |
|---|---|
| `model.onnx` equals the eager reduced model | run in ONNX Runtime on the CPU when compiled{run_in} (`report.json`) |
| TensorRT's rules for operations, types, sizes | every node, at the shapes above |
| the builder takes such graphs | tiny models of every method and large ones of some, {CHECKED_WITH}, no GPU |
| numbers, ties and speed of the engine on a GPU | not run |
| trtexec, TensorRT 10 and 11, Triton Inference Server | not run |
"""
