"""Example inputs and dynamic axes: the ``--input`` and ``--dynamic`` notations, random tensors, and their checks."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from tokcc.errors import UsageError

__all__ = [
    "AxisRange",
    "InputSpec",
    "bind_names",
    "cast_floating",
    "describe",
    "dynamic_from_ranges",
    "kwargs_from_specs",
    "parse_dtype",
    "parse_dynamic",
    "parse_inputs",
    "random_tensor",
    "required_parameters",
    "split_example_inputs",
    "unknown_name",
]

DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "f32": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "i64": torch.int64,
    "int32": torch.int32,
    "i32": torch.int32,
    "bool": torch.bool,
}
_CANONICAL = ("fp32", "fp16", "bf16", "int64", "int32", "bool")
_INPUT_FORM = "NAME=DTYPE[dims], for instance pixel_values=fp32[2,3,224,224]"
_DYNAMIC_FORM = "NAME:AXIS=MIN..MAX, for instance pixel_values:0=1..64 (MAX may be left out)"
_INPUT = re.compile(r"(?P<name>[^=\s]+)\s*=\s*(?P<dtype>\w+)\s*\[(?P<dims>[^\]]*)\]")
_DYNAMIC = re.compile(r"(?P<name>[^=:\s]+)\s*:\s*(?P<axis>-?\d+)\s*=\s*(?P<low>\d+)\s*\.\.\s*(?P<high>\d*)")
# Without a vocabulary, ids from here are inside every embedding table one meets.
_SAFE_INTEGERS = 10


@dataclass(frozen=True)
class InputSpec:
    """One ``--input``: the name, type and shape of an example input."""

    name: str
    dtype: torch.dtype
    dims: tuple[int, ...]


@dataclass(frozen=True)
class AxisRange:
    """One ``--dynamic``: an axis and the sizes it may take; ``high`` None = unbounded."""

    name: str
    axis: int
    low: int
    high: int | None

    def __str__(self) -> str:
        return f"{self.name}:{self.axis}={self.low}..{'' if self.high is None else self.high}"


def parse_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """Read the ``dtype`` option: the floating type to cast the model to, or None to leave it."""
    if name is None or (isinstance(name, torch.dtype) and name.is_floating_point):
        return name
    dtype = None if isinstance(name, torch.dtype) else DTYPES.get(name.strip().lower())
    if dtype is None or not dtype.is_floating_point:
        raise UsageError("unknown model dtype", needed="fp32, fp16 or bf16", found=str(name))
    return dtype


def parse_inputs(texts: str | Sequence[str]) -> tuple[InputSpec, ...]:
    """Parse ``NAME=DTYPE[dims]`` strings, or one."""
    specs = tuple(_parse_input(text) for text in ([texts] if isinstance(texts, str) else texts))
    _refuse_repeats("--input", [spec.name for spec in specs])
    return specs


def _parse_input(text: str) -> InputSpec:
    match = _INPUT.fullmatch(text.strip())
    if match is None:
        raise UsageError("cannot read --input", needed=_INPUT_FORM, found=text)
    dtype = DTYPES.get(match["dtype"].lower())
    if dtype is None:
        raise UsageError("unknown dtype in --input", needed=", ".join(_CANONICAL), found=f"{match['dtype']} in {text}")
    dims = [part.strip() for part in re.split(r"[,x]", match["dims"])] if match["dims"].strip() else []
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in dims):
        raise UsageError(
            "bad dimensions in --input",
            needed="positive whole numbers, comma separated",
            found=f"[{match['dims']}] in {text}",
            help="give the example sizes here; say which axes may vary with --dynamic",
        )
    return InputSpec(match["name"], dtype, tuple(int(part) for part in dims))


def parse_dynamic(texts: Sequence[str]) -> tuple[AxisRange, ...]:
    """Parse ``NAME:AXIS=MIN..MAX`` strings."""
    ranges = tuple(_parse_range(text) for text in texts)
    _refuse_repeats("--dynamic", [f"{item.name}:{item.axis}" for item in ranges])
    return ranges


def _parse_range(text: str) -> AxisRange:
    match = _DYNAMIC.fullmatch(text.strip())
    if match is None:
        raise UsageError("cannot read --dynamic", needed=_DYNAMIC_FORM, found=text)
    low, high = int(match["low"]), int(match["high"]) if match["high"] else None
    if low < 1:
        raise UsageError("a dynamic axis has at least one element", needed="MIN >= 1", found=text)
    if high is not None and high <= low:
        raise UsageError("empty range in --dynamic", needed="MIN < MAX", found=text)
    return AxisRange(match["name"], int(match["axis"]), low, high)


def _refuse_repeats(flag: str, keys: Iterable[str]) -> None:
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            raise UsageError(f"{flag} names {key} twice", needed=f"each one once in {flag}", found=key)
        seen.add(key)


def random_tensor(spec: InputSpec, generator: torch.Generator, *, below: int = _SAFE_INTEGERS) -> Tensor:
    """Make a random tensor; masks known by the community's names get values that mask nothing.

    Args:
        spec: Name, type and shape.
        generator: Source of the randomness.
        below: Upper bound (exclusive) of integers.
    """
    if spec.name.endswith("padding_mask"):  # torch's convention: True or 1 = ignore
        return torch.zeros(spec.dims, dtype=spec.dtype)
    if spec.name == "attention_mask" and not spec.dtype.is_floating_point:  # 1 = a real token
        return torch.ones(spec.dims, dtype=spec.dtype)
    if spec.name == "token_type_ids":
        return torch.zeros(spec.dims, dtype=spec.dtype)
    if spec.dtype.is_floating_point:
        return torch.randn(spec.dims, generator=generator).to(spec.dtype)
    if spec.dtype == torch.bool:
        return torch.randint(0, 2, spec.dims, generator=generator).bool()
    return torch.randint(0, below, spec.dims, generator=generator, dtype=spec.dtype)


def split_example_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turn the accepted forms of example inputs into positional and named ones.

    A tensor, a tuple or list of positional inputs, a mapping of named ones, or a pair (tuple, mapping) of both.
    """
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        if len(example_inputs) == 2:
            args, kwargs = example_inputs
            if isinstance(args, tuple | list) and isinstance(kwargs, Mapping):
                return tuple(args), dict(kwargs)
        return tuple(example_inputs), {}
    raise UsageError(
        "cannot use these example inputs",
        needed="a tensor, a tuple of positional inputs, a dict of named ones, or (tuple, dict)",
        found=type(example_inputs).__name__,
    )


def kwargs_from_specs(
    forward: Callable[..., Any],
    specs: Sequence[InputSpec],
    *,
    make: Callable[[InputSpec, torch.Generator], Tensor] = random_tensor,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Make named example inputs for ``forward``, in the order of its signature."""
    parameters = inspect.signature(forward).parameters
    names = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    required = [name for name in names if parameters[name].default is inspect.Parameter.empty]
    by_name = {spec.name: spec for spec in specs}
    for name in by_name:
        if name not in names and not takes_any:
            raise unknown_name("--input", name, names)
    if missing := [name for name in required if name not in by_name]:
        raise UsageError(
            f"no --input for {', '.join(missing)}",
            needed=f"an example of every input without a default: {', '.join(required)}",
            found=", ".join(by_name) or "none",
            help=f"add --input {missing[0]}=DTYPE[dims]",
        )
    ordered = [name for name in names if name in by_name] + [name for name in by_name if name not in names]
    generator = torch.Generator().manual_seed(seed)
    return {name: make(by_name[name], generator) for name in ordered}


def required_parameters(module: nn.Module) -> list[str]:
    """List the inputs of ``module.forward`` that have no default."""
    parameters = inspect.signature(module.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in parameters if p.kind in kinds and p.default is inspect.Parameter.empty]


def bind_names(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Give every example input the name of the parameter of ``forward`` that it binds to."""
    return dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)


def dynamic_from_ranges(ranges: Sequence[AxisRange], inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Turn ``--dynamic`` ranges into torch.export's form.

    Axes with the same range and the same example size share one symbol (``input_ids:1`` and ``attention_mask:1`` must,
    or torch.export refuses); a different example size keeps two axes apart.
    """
    if not ranges:
        return None
    everywhere = _batch_range(ranges, inputs)
    shared: dict[tuple[int, int, int | None], Any] = {}
    shapes: dict[str, dict[int, Any] | None] = dict.fromkeys(inputs)
    for item in ranges:
        if item.name not in inputs:
            raise unknown_name("--dynamic", item.name, list(inputs))
        value = inputs[item.name]
        if not isinstance(value, Tensor):
            raise UsageError(
                f"--dynamic {item} names an input that is not one tensor",
                needed="a tensor",
                found=type(value).__name__,
                help="give dynamic_shapes from Python for nested inputs",
            )
        axis, size = _checked_axis(item, value)
        key = (size, item.low, item.high)
        if key not in shared:
            name = "batch" if key == everywhere else f"{re.sub(r'[^0-9A-Za-z_]', '_', item.name)}_{axis}"
            shared[key] = Dim(name, min=item.low, max=item.high)
        axes = shapes[item.name] or {}
        if axis in axes:
            raise UsageError(f"--dynamic names axis {axis} of {item.name} twice", found=str(item))
        shapes[item.name] = {**axes, axis: shared[key]}
    return shapes


def _batch_range(ranges: Sequence[AxisRange], inputs: Mapping[str, Any]) -> tuple[int, int, int | None] | None:
    """Return size and range of an axis 0 that all tensors share, and no other axis, or None."""
    first: dict[str, tuple[int, int, int | None]] = {}
    others: set[tuple[int, int, int | None]] = set()
    for item in ranges:
        value = inputs.get(item.name)
        if not isinstance(value, Tensor) or not -value.dim() <= item.axis < value.dim():
            return None  # refused with a reason where it is read
        axis = item.axis % value.dim()
        key = (int(value.shape[axis]), item.low, item.high)
        if axis == 0:
            first[item.name] = key
        else:
            others.add(key)
    tensors = {name for name, value in inputs.items() if isinstance(value, Tensor)}
    shared = set(first.values()) - others
    return shared.pop() if len(shared) == 1 and first.keys() == tensors else None


def _checked_axis(item: AxisRange, value: Tensor) -> tuple[int, int]:
    """Return the axis counted from the front and its example size, or say why it cannot vary."""
    if not -value.dim() <= item.axis < value.dim():
        raise UsageError(
            f"--dynamic {item} names an axis that the input does not have",
            needed=f"an axis from 0 to {value.dim() - 1}",
            found=f"{item.name}: {describe(value)}",
        )
    size = int(value.shape[item.axis])
    if size < item.low or (item.high is not None and size > item.high):
        raise UsageError(
            f"the example input is outside --dynamic {item}",
            needed=f"a size from {item.low} to {item.high if item.high is not None else 'any'} on axis {item.axis}",
            found=f"{item.name}: {describe(value)}",
            help="give an example of a size inside the range with --input",
        )
    if size == 1:
        raise UsageError(
            f"the example input has size 1 on the dynamic axis of --dynamic {item}",
            needed="an example size of 2 or more: torch.export makes an axis of size 1 static",
            found=f"{item.name}: {describe(value)}",
            help="give a larger example with --input; MIN may stay 1",
        )
    return item.axis % value.dim(), size


def unknown_name(flag: str, name: str, known: Sequence[str]) -> UsageError:
    """Make the error for a name that is not an input."""
    near = difflib.get_close_matches(name, known, n=1)
    return UsageError(
        f"{flag} names an input that the model does not have",
        needed=f"one of {', '.join(known)}" if known else "a model with named inputs",
        found=name,
        help=f"did you mean {near[0]}?" if near else None,
    )


def describe(value: Any) -> str:
    """Write values as a user would: ``fp32[2,3,224,224]``; containers and mappings item by item."""
    if isinstance(value, Tensor):
        dtype = next((name for name in _CANONICAL if DTYPES[name] is value.dtype), str(value.dtype).split(".")[-1])
        return f"{dtype}[{','.join(str(size) for size in value.shape)}]"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {describe(item)}" for name, item in value.items())
    if isinstance(value, tuple | list):
        return f"({', '.join(describe(item) for item in value)})"
    return repr(value) if isinstance(value, bool | int | float | str | None) else type(value).__name__


def cast_floating(values: Any, dtype: torch.dtype) -> Any:
    """Cast every floating tensor in a nested structure."""
    return pytree.tree_map_only(Tensor, lambda item: item.to(dtype) if item.is_floating_point() else item, values)
