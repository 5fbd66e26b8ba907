"""What every way of loading a model ends in."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

__all__ = ["Loaded"]


@dataclass(frozen=True)
class Loaded:
    """A model with everything that tracing it needs.

    Attributes:
        source: How the user named the model, for messages and reports.
        module: The module in eval mode on the CPU; None when `exported` is given.
        exported: A program that was traced already.
        example_args: Positional example inputs.
        example_kwargs: Example inputs by name.
        dynamic_shapes: In `torch.export`'s form; None when every axis is static.
        task: The task the model was loaded for, where it has one.
        preprocessor: Folder with tokenizer or image-processor files, if any.
        label_names: Class names of a classifier, in logit order.
    """

    source: str
    module: nn.Module | None = None
    exported: ExportedProgram | None = None
    example_args: tuple[Any, ...] = ()
    example_kwargs: dict[str, Any] = field(default_factory=dict)
    dynamic_shapes: Any | None = None
    task: str | None = None
    preprocessor: Path | None = None
    label_names: tuple[str, ...] = ()
