"""A model repository for NVIDIA's Triton Inference Server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokcc.backends.tensorrt.profiles import Profile

__all__ = ["Tensor", "repository_config"]

_TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "int8": "TYPE_INT8",
    "uint8": "TYPE_UINT8",
    "bool": "TYPE_BOOL",
}


@dataclass(frozen=True)
class Tensor:
    """An input or output: sizes that vary have names."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


def repository_config(inputs: Sequence[Tensor], outputs: Sequence[Tensor], profiles: Sequence[Profile]) -> str:
    """Return the text of ``config.pbtxt``.

    Requests are batched by the server where axis 0 of every input and output is one and the same dynamic size.
    """
    first = {tensor.shape[0] if tensor.shape else 0 for tensor in (*inputs, *outputs)}
    batched = len(first) == 1 and isinstance(next(iter(first)), str)
    most = min(profile.at("max")[inputs[0].name][0] for profile in profiles) if batched else 0
    lines = [
        'backend: "tensorrt"',
        'default_model_filename: "model.plan"',
        f"max_batch_size: {most}",
        *(_tensor("input", tensor, batched) for tensor in inputs),
        *(_tensor("output", tensor, batched) for tensor in outputs),
    ]
    if batched and most > 1:
        lines.append("dynamic_batching { max_queue_delay_microseconds: 500 }")
    numbers = ", ".join(f'"{number}"' for number in range(len(profiles)))
    lines.append(f"instance_group [ {{ kind: KIND_GPU count: 1 profile: [ {numbers} ] }} ]")
    return "\n".join(lines) + "\n"


def _tensor(kind: str, tensor: Tensor, batched: bool) -> str:
    shape = tensor.shape[1:] if batched else tensor.shape
    sizes = [str(size) if isinstance(size, int) else "-1" for size in shape]
    # The server knows no tensors without axes: a tensor of one number is written as one.
    dims = f"dims: [ {', '.join(sizes)} ]" if sizes else "dims: [ 1 ] reshape { shape: [ ] }"
    return f'{kind} [ {{ name: "{tensor.name}" data_type: {_TYPES[tensor.dtype]} {dims} }} ]'
