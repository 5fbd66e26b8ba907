"""Make the engines that are compared: plain ONNX exports, and engines compiled by tokcc."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from torch import nn

Feeds = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Model:
    """A model to export or compile.

    Attributes:
        name: Short name.
        module: The module, in eval mode.
        args: Example inputs.
        inputs: Input names, in the order of ``args``.
        outputs: Output names.
        dynamic: Dynamic axes per input, as ``torch.export`` wants them; None for all static.
    """

    name: str
    module: nn.Module
    args: tuple[torch.Tensor, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic: dict[str, dict[int, Any]] | None = None

    def named_args(self) -> dict[str, torch.Tensor]:
        """The example inputs by name."""
        return dict(zip(self.inputs, self.args, strict=True))

    def feeds(self) -> Feeds:
        """The example inputs as an ONNX feed."""
        return {name: value.numpy() for name, value in self.named_args().items()}


def export_plain(model: Model, path: Path, opset: int = 18) -> Path:
    """Export the model as it is: what a user has without tokcc."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), quiet():
        program = torch.export.export(model.module, model.args, dynamic_shapes=model.dynamic, strict=False)
        onnx_program = torch.onnx.export(
            program,
            input_names=list(model.inputs),
            output_names=list(model.outputs),
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
        if onnx_program is None:
            raise RuntimeError("torch.onnx.export returned nothing")
        onnx_program.save(path, external_data=False)
    return path


def compile_tokcc(model: Model, policy: Mapping[str, Any] | str, folder: Path) -> Path:
    """Compile with tokcc and return the engine file of the bundle in ``folder``."""
    import tokcc  # here, so that the plain parts of the benchmarks run without it

    bundle = tokcc.compile(
        model.module,
        policy=policy,
        example_inputs=model.args,
        dynamic_shapes=model.dynamic,
        backends=("onnx",),
        output=folder,
        calibrate=False,
        force=True,
    )
    return Path(bundle.engine("onnx"))


def open_session(
    path: Path, threads: int, *, optimise: bool = True, profile: Path | None = None
) -> ort.InferenceSession:
    """Open an ONNX file on the CPU.

    Args:
        path: Engine.
        threads: Threads inside an operator.
        optimise: False runs the graph as it is written, operator by operator.
        profile: Prefix of a profile file to write.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # The threads of an idle session must not spin while the other session is measured.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        # A prepacked weight disappears from the profile's input shapes.
        options.add_session_config_entry("session.disable_prepacking", "1")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_batched(
    session: ort.InferenceSession, feeds: Feeds, batch: int, outputs: Sequence[str] | None = None
) -> list[npt.NDArray[np.float32]]:
    """Run all rows of ``feeds`` in batches and return the concatenated outputs."""
    rows = len(next(iter(feeds.values())))
    parts = [
        session.run(outputs, {name: value[start : start + batch] for name, value in feeds.items()})
        for start in range(0, rows, batch)
    ]
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


class quiet:  # noqa: N801 - reads as a verb, like contextlib's own
    """Silence the exporter's progress lines, its missing-torchvision notes and its deprecation warnings."""

    def __enter__(self) -> None:
        self._catch = warnings.catch_warnings()
        self._catch.__enter__()
        warnings.simplefilter("ignore")
        self._stdout = redirect_stdout(io.StringIO())
        self._stdout.__enter__()
        self._level = logging.root.manager.disable
        logging.disable(logging.WARNING)

    def __exit__(self, *exception: object) -> None:
        logging.disable(self._level)
        self._stdout.__exit__(None, None, None)
        self._catch.__exit__(None, None, None)
