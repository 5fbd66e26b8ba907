"""Build the engine of the ONNX model beside this file with TensorRT, or with TensorRT for RTX.

    python build_engine.py                                   # TensorRT, for the GPU of this machine
    python build_engine.py --plugins                         # model_plugins.onnx and the plugins beside it
    python build_engine.py --rtx --compute-capability 8.0 8.6 8.9 12.0     # no GPU needed

The shapes that the engine is made for are those of ``profiles.json``. Needs the Python package ``tensorrt``
(``tensorrt_rtx`` with ``--rtx``) and nothing else; a warning of TensorRT about a size that an operation does not take
fails the build, since the engine would fail at run time.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FATAL_WARNINGS = ("exceeds the maximum value allowed", "are not self-consistent")
"""What TensorRT warns of, and fails on at run time."""


class BuildError(Exception):
    """The engine was not built; says why."""


def check_profiles(network: Any, profiles: list[dict[str, Any]]) -> None:
    """Hold the profiles against the network's inputs: TensorRT takes wrong ones in silence.

    Raises:
        BuildError: Naming profile, input and axis.
    """
    inputs = {tensor.name: tuple(tensor.shape) for tensor in (network.get_input(i) for i in range(network.num_inputs))}
    for profile in profiles:
        named = f"profile `{profile['name']}`"
        for name in profile["shapes"]:
            if name not in inputs:
                raise BuildError(f"{named}: the model has no input `{name}`; it has {', '.join(inputs)}")
        for name, shape in inputs.items():
            if -1 not in shape:
                continue
            given = profile["shapes"].get(name)
            if given is None:
                raise BuildError(f"{named}: no shapes for `{name}`, whose shape is {list(shape)}")
            low, usual, high = (given[key] for key in ("min", "opt", "max"))
            if not len(low) == len(usual) == len(high) == len(shape):
                raise BuildError(f"{named}: `{name}` has {len(shape)} axes")
            for axis, (size, *three) in enumerate(zip(shape, low, usual, high, strict=True)):
                if not three[0] <= three[1] <= three[2]:
                    raise BuildError(f"{named}: `{name}` axis {axis}: min <= opt <= max does not hold: {three}")
                if size != -1 and set(three) != {size}:
                    raise BuildError(f"{named}: `{name}` axis {axis} is {size} in the model, not {three}")


def load_plugins(folder: Path) -> None:
    """Import the plugin modules, which registers them."""
    sys.path.insert(0, str(folder))
    for path in sorted(folder.glob("*.py")):
        if path.name.startswith(("_", "tokcc_")) or path.name.endswith("_jit.py"):
            continue
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None:
            raise BuildError(f"{path} is no Python module")
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)


def build(options: argparse.Namespace, trt: Any) -> dict[str, Any]:
    """Parse the model, build the engine and write it.

    Raises:
        BuildError: TensorRT refuses the model, or fails.
    """

    class Log(trt.ILogger):  # type: ignore[misc]  # the module is not known before it runs
        """Keeps what is worth telling."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            """Keep errors and warnings."""
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.Severity.WARNING:
                self.warnings.append(message)

    log = Log()
    begun = time.perf_counter()
    builder = trt.Builder(log)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # always on where there is no flag
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(options.onnx)):
        found = [parser.get_error(i) for i in range(parser.num_errors)]
        said = [f"{e.desc()} [{e.node_operator()} {e.node_name()}]".replace(" [ ]", "") for e in found]
        raise BuildError("the parser refuses the model: " + "; ".join(said or log.errors))
    config = builder.create_builder_config()
    aliased = getattr(getattr(trt, "PreviewFeature", None), "ALIASED_PLUGIN_IO_10_03", None)
    if options.plugins and aliased is not None:
        config.set_preview_feature(aliased, True)  # plugins that write into a cache in place
    profiles = json.loads(options.profiles.read_text(encoding="utf-8"))["profiles"]
    check_profiles(network, profiles)
    dynamic = {network.get_input(i).name for i in range(network.num_inputs) if -1 in network.get_input(i).shape}
    for profile in profiles if dynamic else ():
        made = builder.create_optimization_profile()
        for name in sorted(dynamic):
            made.set_shape(name, *(tuple(profile["shapes"][name][key]) for key in ("min", "opt", "max")))
        if config.add_optimization_profile(made) < 0:
            raise BuildError(f"profile `{profile['name']}` is refused: " + "; ".join(log.errors))
    if options.rtx:
        wanted = [f"SM{round(float(each) * 10)}" for each in options.compute_capability]
        known = trt.ComputeCapability.__members__
        for name in wanted:
            if name not in known:
                raise BuildError(f"{name} is unknown to TensorRT for RTX; it builds for {', '.join(sorted(known))}")
        config.num_compute_capabilities = len(wanted)
        for place, name in enumerate(wanted):
            config.set_compute_capability(known[name], place)
    if options.timing_cache is not None and not options.rtx:
        held = options.timing_cache.read_bytes() if options.timing_cache.is_file() else b""
        cache = config.create_timing_cache(held)
        config.set_timing_cache(cache, False)
    plan = builder.build_serialized_network(network, config)
    fatal = [line for line in log.warnings if any(text in line for text in FATAL_WARNINGS)]
    if plan is None or fatal:
        raise BuildError("the builder fails: " + "; ".join(dict.fromkeys(log.errors + fatal)))
    if options.timing_cache is not None and not options.rtx:
        write(options.timing_cache, config.get_timing_cache().serialize())
    write(options.engine, plan)
    return {
        "ok": True,
        "engine": str(options.engine),
        "bytes": options.engine.stat().st_size,
        "seconds": round(time.perf_counter() - begun, 1),
        "layers": network.num_layers,
        "version": trt.__version__,
        "warnings": list(dict.fromkeys(log.warnings)),
    }


def write(path: Path, data: Any) -> None:
    """Write a file whole, or leave what was there."""
    handle, name = tempfile.mkstemp(dir=path.resolve().parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(memoryview(data))
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def ready(options: argparse.Namespace, name: str) -> Any:
    """Return the module that builds, once all that it needs is there.

    Raises:
        BuildError: A file or the package is missing.
    """
    if options.plugins and options.rtx:
        raise BuildError("TensorRT for RTX has no such plugins: build model.onnx, or use TensorRT")
    for path in (options.onnx, options.profiles):
        if not path.is_file():
            raise BuildError(f"{path} is not there")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BuildError(f"the Python package `{name}` cannot be imported: {error}") from error


def main(arguments: list[str] | None = None) -> int:
    """Build, and say what came of it."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description="Build the engine of the ONNX model beside this file.")
    parser.add_argument("--onnx", type=Path, help="the model (default: the one beside this file)")
    parser.add_argument("--profiles", type=Path, default=here / "profiles.json", help="shapes to build for")
    parser.add_argument("--engine", type=Path, help="what to write (default: the model's name with .plan)")
    parser.add_argument("--plugins", action="store_true", help="model_plugins.onnx, with the plugins in plugins/")
    parser.add_argument("--rtx", action="store_true", help="TensorRT for RTX; builds without a GPU")
    parser.add_argument(
        "--compute-capability", nargs="+", default=["8.0", "8.6", "8.9", "12.0"], help="of --rtx: GPUs to build for"
    )
    parser.add_argument("--timing-cache", type=Path, help="kept between builds (not with --rtx)")
    parser.add_argument("--json", action="store_true", help="say it in one line of JSON")
    options = parser.parse_args(arguments)
    options.onnx = options.onnx or here / ("model_plugins.onnx" if options.plugins else "model.onnx")
    options.engine = options.engine or options.onnx.with_suffix(".plan")
    name = "tensorrt_rtx" if options.rtx else "tensorrt"
    try:
        trt = ready(options, name)
        if options.plugins:
            load_plugins(here / "plugins")
        found = build(options, trt)
    except (BuildError, OSError) as error:
        found = {"ok": False, "error": str(error)}
    if options.json:
        print(json.dumps(found))
    elif found["ok"]:
        print(f"wrote {found['engine']}: {found['bytes']:,} bytes in {found['seconds']} s, {name} {found['version']}")
    else:
        print(f"error: {found['error']}", file=sys.stderr)
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the libraries' own way out sometimes crashes on machines without a GPU
