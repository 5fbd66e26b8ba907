"""Trained pieces: weights from a safetensors file that the policy names, which become constants of the program.

A piece says which tensors it needs, with shapes in numbers and symbols. Symbols of the model (``C`` its width,
``heads``, ``head_width``, ``layers``, ``stages`` the layers that the step chooses, ``K`` the kept tokens; of a decoder
``heads`` are key heads, and sparse attention has ``query_heads``, too) are known beforehand; any other symbol, such as
the width of a hidden layer, is what the file says, the same in all tensors of the piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

import torch
from pydantic import Field, PrivateAttr
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tokcc.errors import PolicyError
from tokcc.ir.builder import Builder
from tokcc.passes.piece import Piece

__all__ = [
    "Activation",
    "TensorSpec",
    "Trained",
    "activated",
    "linear_specs",
    "mlp_specs",
    "second_minus_first",
    "weight_file",
    "with_weights",
]

aten = torch.ops.aten
Activation = Literal["gelu", "silu", "relu", "tanh"]
Kind = Literal["float", "int"]
_FLOATS = ("F64", "F32", "F16", "BF16")
_INTS = ("I64", "I32", "I16", "I8", "U8")


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a piece needs.

    Attributes:
        name: Its name in the file.
        shape: Numbers and symbols.
        kind: Floating-point numbers of any width (used in fp32), or whole ones (used as int64).
        optional: The piece does without, for instance without a bias.
    """

    name: str
    shape: tuple[int | str, ...]
    kind: Kind = "float"
    optional: bool = False

    def __str__(self) -> str:
        return f"{self.name} {self.kind}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, eq=False)
class _Weights:
    """The tensors that were read, by the piece's names."""

    tensors: Mapping[str, Tensor]


class Trained(Piece):
    """A piece with trained weights.

    Attributes:
        weights: A ``.safetensors`` file; a relative path counts from the policy's file.
        names: What the file calls a tensor, where it is not the piece's own name.
    """

    made: ClassVar[str] = "trained"
    """How the weights come about."""
    advice: ClassVar[str | None] = None
    """What to do without them."""

    weights: str | None = None
    names: dict[str, str] = Field(default_factory=dict)

    _read: _Weights | None = PrivateAttr(default=None)

    def tensors(self, sizes: Mapping[str, int]) -> Sequence[TensorSpec]:
        """Return the tensors that are needed.

        Args:
            sizes: The model's symbols, for pieces whose number of tensors depends on them.
        """
        raise NotImplementedError

    def having(self, tensors: Mapping[str, Tensor]) -> Self:
        """Return the same piece with its tensors."""
        copied = self.model_copy()
        copied._read = _Weights(dict(tensors))
        return copied

    def weight(self, name: str) -> Tensor:
        """Return a tensor that was read, for its sizes."""
        assert self._read is not None, "weights are read when a policy is planned"
        return self._read.tensors[name]

    def has(self, name: str) -> bool:
        """Return True when the file holds an optional tensor."""
        return self._read is not None and name in self._read.tensors

    def tensor(self, b: Builder, name: str) -> Any:
        """Return a tensor as a constant of the program, named after the piece and the tensor."""
        return b.constant(f"{self.kind}_{name}".replace(".", "_").replace("-", "_"), self.weight(name))

    def linear(self, b: Builder, x: Any, name: str) -> Any:
        """Apply ``x W^T + b`` with ``<name>.weight`` ``[out, in]`` and, where there is one, ``<name>.bias``."""
        bias = self.tensor(b, f"{name}.bias") if self.has(f"{name}.bias") else None
        return b.call(aten.linear.default, x, self.tensor(b, f"{name}.weight"), bias)

    def mlp(self, b: Builder, x: Any, name: str, depth: int, activation: Activation) -> Any:
        """Apply linear layers ``<name>.<i>`` with an activation between them."""
        for i in range(depth):
            x = self.linear(b, activated(b, x, activation) if i else x, f"{name}.{i}")
        return x

    def normed(self, b: Builder, x: Any, name: str, kind: Literal["layer", "rms"], eps: float = 1e-6) -> Any:
        """Normalise the last axis with ``<name>.weight`` and, where there is one, ``<name>.bias``."""
        scale = self.tensor(b, f"{name}.weight")
        bias = self.tensor(b, f"{name}.bias") if self.has(f"{name}.bias") else None
        if kind == "layer":
            return b.call(aten.layer_norm.default, x, [self.weight(f"{name}.weight").shape[0]], scale, bias, eps)
        mean = b.mean(b.mul(x, x), len(b.shape(x)) - 1, keepdim=True)
        y = b.mul(b.div(x, b.sqrt(b.add(mean, eps))), scale)
        return y if bias is None else b.add(y, bias)


def activated(b: Builder, x: Any, name: Activation) -> Any:
    """Apply an activation."""
    return b.call(getattr(aten, name).default, x)


def second_minus_first(b: Builder, logits: Any) -> Any:
    """Return the second of two logits ``[B, N, 2]`` minus the first: a softmax orders tokens in this way."""
    first, second = (b.call(aten.select.int, logits, 2, i) for i in (0, 1))
    return b.sub(second, first)


def linear_specs(name: str, outputs: int | str, inputs: int | str) -> tuple[TensorSpec, TensorSpec]:
    """Return the weight and the optional bias of a linear layer."""
    return (
        TensorSpec(f"{name}.weight", (outputs, inputs)),
        TensorSpec(f"{name}.bias", (outputs,), optional=True),
    )


def mlp_specs(name: str, widths: Sequence[int | str]) -> list[TensorSpec]:
    """Return the tensors of linear layers ``<name>.<i>`` from one width to the next."""
    pairs = zip(widths[1:], widths, strict=False)
    return [spec for i, (out, into) in enumerate(pairs) for spec in linear_specs(f"{name}.{i}", out, into)]


T = TypeVar("T", bound=Piece)


def weight_file(weights: str, folder: Path | None) -> Path:
    """Return the file that a policy means: relative paths count from the policy's folder."""
    path = Path(weights)
    return path if path.is_absolute() or folder is None else folder / path


def with_weights(piece: T, sizes: Mapping[str, int], *, folder: Path | None, where: str) -> T:
    """Read the weights of a piece, if it is a trained one, and of those that are parameters of it.

    Args:
        piece: Any piece.
        sizes: The model's symbols.
        folder: Where the policy lies; None = the working folder.
        where: The place of the piece in the policy, for messages.

    Raises:
        PolicyError: No file is named, it cannot be read, a tensor is missing or has another shape or type, or holds
            numbers that are not finite.
    """
    inner: dict[str, Any] = {}
    for name, value in piece:
        if isinstance(value, Piece):
            inner[name] = with_weights(value, sizes, folder=folder, where=where)
        elif isinstance(value, tuple) and any(isinstance(part, Piece) for part in value):
            inner[name] = tuple(with_weights(part, sizes, folder=folder, where=where) for part in value)
    if inner:
        piece = piece.model_copy(update=inner)
    if not isinstance(piece, Trained):
        return piece
    specs = tuple(piece.tensors(sizes))
    if not specs:
        if piece.weights is None:
            return piece
        raise PolicyError(f"`{piece.kind}` needs no weights as it is set up", policy=where, found=piece.weights)
    if piece.weights is None:
        raise PolicyError(
            f"`{piece.kind}` is {piece.made}, and no weights are given",
            policy=where,
            needed="`weights: FILE.safetensors` with " + ", ".join(map(str, specs)),
            help=piece.advice or _known(sizes, specs),
        )
    reading = _Reading(piece, dict(sizes), weight_file(piece.weights, folder), where, specs)
    read: Any = piece.having(dict(reading.run()))
    return read  # type: ignore[no-any-return]  # the same class


@dataclass(frozen=True)
class _Reading:
    """One file that is read for one piece."""

    piece: Trained
    sizes: dict[str, int]
    path: Path
    where: str
    specs: tuple[TensorSpec, ...]

    def run(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors by the piece's names."""
        unknown = self.piece.names.keys() - {spec.name for spec in self.specs}
        if unknown:
            raise self._error(f"`names` has `{min(unknown)}`, which `{self.piece.kind}` does not need", None)
        if self.path.suffix != ".safetensors":
            raise self._error(
                "the weights are not a safetensors file",
                str(self.path.name),
                "pickled weights are not read: convert them",
            )
        try:
            with safe_open(self.path, framework="pt") as file:
                present = set(file.keys())
                for spec in self.specs:
                    stored = self.piece.names.get(spec.name, spec.name)
                    if stored not in present:
                        if spec.optional:
                            continue
                        raise self._missing(spec, stored, sorted(present))
                    yield spec.name, self._checked(spec, stored, file)
        except (OSError, SafetensorError) as error:
            raise self._error("the weights cannot be read", str(error) or type(error).__name__) from error

    def _checked(self, spec: TensorSpec, stored: str, file: Any) -> Tensor:
        entry = file.get_slice(stored)
        shape, dtype = tuple(entry.get_shape()), str(entry.get_dtype())
        fits = len(shape) == len(spec.shape) and dtype in (_FLOATS if spec.kind == "float" else _INTS)
        if fits:
            fits = all(
                size == (wanted if isinstance(wanted, int) else self.sizes.setdefault(wanted, size))
                for size, wanted in zip(shape, spec.shape, strict=True)
            )
        if not fits:
            raise self._error(
                f"the tensor `{stored}` of the weights does not fit", f"{dtype.lower()}[{', '.join(map(str, shape))}]",
                _known(self.sizes, (spec,)), needed=str(spec),
            )  # fmt: skip
        tensor: Tensor = file.get_tensor(stored)
        # A copy: the tensors of a file share its storage, which archives store whole.
        tensor = tensor.to(torch.float32 if spec.kind == "float" else torch.int64, copy=True).contiguous()
        if spec.kind == "float" and not bool(torch.isfinite(tensor).all()):
            raise self._error(f"the tensor `{stored}` of the weights holds NaN or infinity", None)
        return tensor

    def _missing(self, spec: TensorSpec, stored: str, present: Sequence[str]) -> PolicyError:
        shown = ", ".join(present[:12]) + (f" and {len(present) - 12} more" if len(present) > 12 else "")
        return self._error(
            f"the weights have no tensor `{stored}`",
            shown or "nothing",
            f"where the file has it under another name: `names: {{{spec.name}: NAME}}`",
            needed=str(spec),
        )

    def _error(self, what: str, found: str | None, help: str | None = None, needed: str | None = None) -> PolicyError:
        return PolicyError(
            what,
            policy=f"{self.where}, file {self.path.name}",
            needed=needed or "a .safetensors file with " + ", ".join(map(str, self.specs)),
            found=found,
            help=help,
        )


def _known(sizes: Mapping[str, int], specs: Sequence[TensorSpec]) -> str | None:
    used = {part for spec in specs for part in spec.shape if isinstance(part, str)}
    known = [f"{name} = {size}" for name, size in sizes.items() if name in used]
    return "of this model and file: " + ", ".join(known) if known else None
