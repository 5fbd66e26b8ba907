"""Running ONNX engines in ONNX Runtime."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tokcc.errors import LoweringError, UsageError

__all__ = ["Session", "inserted_share"]

Array = npt.NDArray[Any]


class Session:
    """An engine in ONNX Runtime on the CPU.

    Args:
        path: The model.
        threads: Intra-op threads; 0 = the runtime's default.
        profile: Prefix of a profile to write.
        patterns: Plan memory for each set of input shapes. The runtime keeps every plan: where shapes change with each
            call, as a generation's mask does, memory grows without end.

    Raises:
        UsageError: ONNX Runtime is not installed.
        LoweringError: The runtime does not take the model.
    """

    def __init__(self, path: Path, *, threads: int = 0, profile: Path | None = None, patterns: bool = True) -> None:
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise UsageError("onnxruntime is not installed", help="pip install 'tokcc[cpu]' (or tokcc[gpu])") from error
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.enable_mem_pattern = patterns
        # The threads of an idle session must not spin while another one is measured.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        try:
            self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises its own, undocumented classes
            raise LoweringError(
                "onnxruntime does not load the engine",
                found=" ".join(str(error).split())[:300],
                help="the CPU provider has no bfloat16 kernels: compile such models with --dtype float32 or float16",
            ) from error
        self.inputs = [i.name for i in self.session.get_inputs()]
        self.outputs = [o.name for o in self.session.get_outputs()]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once."""
        given = {name: feeds[name] for name in self.inputs}
        return dict(zip(self.outputs, self.session.run(None, given), strict=True))

    def run_over(self, feeds: Mapping[str, Array], over: Mapping[str, str]) -> dict[str, Array]:
        """Run once and write some outputs over inputs, whose arrays are then what is returned for them.

        Args:
            feeds: Inputs.
            over: For each such output the input.
        """
        from onnxruntime import OrtValue

        binding = self.session.io_binding()
        # An OrtValue on the CPU is the array's own memory.
        given = {name: np.ascontiguousarray(feeds[name]) for name in self.inputs}
        held = {name: OrtValue.ortvalue_from_numpy(array) for name, array in given.items()}
        for name, value in held.items():
            binding.bind_ortvalue_input(name, value)
        for name in self.outputs:
            if name in over:
                binding.bind_ortvalue_output(name, held[over[name]])
            else:
                binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        made = dict(zip(self.outputs, binding.get_outputs(), strict=True))
        return {name: given[over[name]] if name in over else made[name].numpy() for name in self.outputs}


def inserted_share(path: Path, feeds: Mapping[str, Array], folder: Path, *, threads: int, runs: int = 5) -> float:
    """Return the share of a run's kernel time that nodes take which tokcc inserted, from the runtime's own profile.

    A share, since profiling itself makes every node slower.

    Args:
        path: The engine.
        feeds: Inputs.
        folder: Where the profile is written (and removed).
        threads: Intra-op threads.
        runs: Profiled runs, after one that is not counted.
    """
    session = Session(path, threads=threads, profile=folder / "profile")
    for _ in range(runs + 1):
        session.run(feeds)
    name = Path(session.session.end_profiling())
    try:
        events = json.loads(name.read_text(encoding="utf-8"))
    finally:
        name.unlink(missing_ok=True)
    spent: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event.get("name", "").endswith("_kernel_time"):
            spent.setdefault(event["name"], []).append(float(event["dur"]))
    medians = {node: float(np.median(times[1:] or times)) for node, times in spent.items()}
    total = sum(medians.values())
    return sum(value for node, value in medians.items() if "tokcc/" in node) / total if total else 0.0
