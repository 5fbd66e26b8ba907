"""The model that a job is about, and how it becomes a program: the first two stages of every job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokcc.capture.export import capture
from tokcc.capture.load import load
from tokcc.capture.loaded import Loaded
from tokcc.capture.vlm.load import LoadedParts, is_multimodal, load_parts
from tokcc.errors import UsageError
from tokcc.ir.program import Program
from tokcc.pipeline.stages import Stages

__all__ = ["ModelRequest"]


@dataclass(frozen=True)
class ModelRequest:
    """A model as the user named it.

    Attributes:
        model: An ``nn.Module``, an ``ExportedProgram``, or anything the command line takes.
        example_inputs: Tuple or dict of tensors.
        dynamic_shapes: As for ``torch.export.export``.
        inputs: ``NAME=DTYPE[dims]`` where the model brings no inputs.
        dynamic: ``NAME:AXIS=MIN..MAX``.
        task: Task of a Hugging Face model.
        dtype: Floating-point type to cast the model to.
        allow_pickle: Load pickled modules.
        or_dynamic: Like `dynamic`, for a model that brings no dynamic axes of its own.
    """

    model: Any
    example_inputs: Any = None
    dynamic_shapes: Any = None
    inputs: Sequence[str] = ()
    dynamic: Sequence[str] = ()
    task: str | None = None
    dtype: str | None = None
    allow_pickle: bool = False
    or_dynamic: Sequence[str] = ()

    def open(self, stages: Stages) -> tuple[Loaded, Program]:
        """Load the model and capture it as a clean program."""
        with stages.stage("load"):
            loaded = load(
                self.model,
                example_inputs=self.example_inputs,
                dynamic_shapes=self.dynamic_shapes,
                inputs=self.inputs,
                dynamic=self.dynamic,
                or_dynamic=self.or_dynamic,
                task=self.task,
                dtype=self.dtype,
                allow_pickle=self.allow_pickle,
            )
        with stages.stage("capture"):
            return loaded, capture(loaded)

    @property
    def multimodal(self) -> bool:
        """Whether the model is compiled in parts."""
        return is_multimodal(self.model, self.task)

    def open_parts(self, stages: Stages) -> LoadedParts:
        """Load a model in parts; they are captured one by one, so that only one is in the making."""
        for name, given in (
            ("example_inputs", self.example_inputs),
            ("dynamic_shapes", self.dynamic_shapes),
            ("--dynamic", self.dynamic),
        ):
            if given is not None and given != ():
                raise UsageError(
                    f"{name} is not for models that are compiled in parts",
                    help="their inputs and dynamic axes follow from the family; --input chooses the image size",
                )
        with stages.stage("load"):
            return load_parts(
                self.model, inputs=self.inputs, dtype=self.dtype, allow_pickle=self.allow_pickle, task=self.task
            )
