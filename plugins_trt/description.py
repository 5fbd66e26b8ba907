"""What a TensorRT plugin is, as data: tensors, attributes, output shapes, launch and the kernel made for them.

A plugin is one launch of one kernel. Sizes are letters of its inputs' axes; what the launch needs is said in
expressions of letters, attributes and the kernel's tile (``B * cdiv(K, BT)``), of ``+ - * //`` and ``cdiv`` with a
letter on the left, which mean the same in Python and in TensorRT's symbolic sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any, NoReturn

import torch

from tokcc.errors import LoweringError
from tokcc.kernels.compile import Case
from tokcc.kernels.configs import DTYPES, Config, dtype_of
from tokcc.kernels.gpu import BASE_ARCH
from tokcc.plugins_trt.parts import KINDS, NAMESPACE, SMS, Attribute, Call, Input, Operand, Output, PluginUse, single

__all__ = ["Plugin", "evaluate", "refuse_sms"]

_GRID_Y = 65_535
_INT32 = 2**31
_POINTERS = {"int32": "*i32", "int64": "*i64", "bool": "*i1"}


def _nothing(attributes: Mapping[str, Any]) -> None:
    del attributes


def _none(sizes: Mapping[str, Any]) -> dict[str, int]:
    del sizes
    return {}


@dataclass(frozen=True)
class Plugin:
    """A TensorRT plugin.

    Attributes:
        op: Its name.
        doc: What it computes.
        replaces: The operation of a graph that it stands for.
        kernel: Module and name of the Triton kernel: inputs, 32-bit sizes, outputs, constants.
        inputs: Tensors in, in order.
        attributes: Numbers, in order.
        scalars: The kernel's sizes by name, in order, as expressions.
        outputs: Tensors out, in order.
        grid: Programs on each axis of the launch.
        constants: Type and attributes -> the kernel's constants, but for those of the tile.
        tactics: Type and attributes -> the tiles to choose from, in order of preference. TensorRT times them.
        arguments: The replaced operation's arguments -> the plugin's. Raises LoweringError for what it does not do.
        compute: Inputs by name, None for those left out, and attributes -> what comes out, by the operation itself.
        derive: Sizes by letter -> attributes that follow from several of them; they must be known.
        check: Refuse attributes that no kernel takes: ValueError of what is needed and what was found.
    """

    op: str
    doc: str
    replaces: str
    kernel: tuple[str, str]
    inputs: tuple[Input, ...]
    attributes: tuple[Attribute, ...]
    scalars: Mapping[str, str]
    outputs: tuple[Output, ...]
    grid: tuple[str, str, str]
    constants: Callable[[str, Mapping[str, Any]], dict[str, Any]]
    tactics: Callable[[str, Mapping[str, Any]], tuple[Config, ...]]
    arguments: Callable[..., Call]
    compute: Callable[[Mapping[str, Any], Mapping[str, Any]], Any]
    derive: Callable[[Mapping[str, Any]], Mapping[str, int]] = _none
    check: Callable[[Mapping[str, Any]], None] = _nothing

    @property
    def functional(self) -> bool:
        """Whether nothing is written but fresh outputs."""
        return not any(output.alias for output in self.outputs)

    @cached_property
    def letters(self) -> dict[str, tuple[int, int]]:
        """Return the input and axis that each letter is read from: the first, one that is always given if any is."""
        places: dict[str, tuple[int, int]] = {}
        for given in (True, False):
            for number, each in enumerate(self.inputs):
                if given == (not each.flag):
                    for axis, letter in enumerate(each.axes):
                        if not letter.isdigit():
                            places.setdefault(letter, (number, axis))
        return places

    def sizes(self, shapes: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """Return the size of each letter; those of tensors left out are missing."""
        return {
            letter: shapes[number][axis]
            for letter, (number, axis) in self.letters.items()
            if len(shapes[number]) == len(self.inputs[number].axes)
        }

    def takes(
        self,
        inputs: Mapping[str, Operand | None],
        attributes: Mapping[str, int | float],
        *,
        sms: Sequence[int] = SMS,
        node: str | None = None,
    ) -> PluginUse:
        """Return the use of the plugin at a node of a graph.

        Args:
            inputs: Type and shape of each input; None for one that is left out.
            attributes: Those that do not follow from sizes.
            sms: Architectures that the engine is for.
            node: The node's name, for messages.

        Raises:
            LoweringError: The plugin does not take it: type, sizes or architecture.
        """
        refuse_sms(self.op, sms, node)
        given = {each.name: inputs.get(each.name) for each in self.inputs}
        dtype = self._dtype(given, node)
        sizes = self._sizes(given, node)
        found: dict[str, Any] = {each.flag: int(given[each.name] is not None) for each in self.inputs if each.flag}
        for each in self.attributes:
            if each.axis:
                found[each.name] = self._known(each.axis, sizes, node)
        found.update(self.derive({letter: self._known_or_none(size) for letter, size in sizes.items()}))
        found.update(attributes)
        return self.use(dtype, found, node=node)

    def use(self, dtype: str, attributes: Mapping[str, int | float], *, node: str | None = None) -> PluginUse:
        """Return a use with all attributes.

        Raises:
            LoweringError: Attributes are missing, unknown or out of what the kernel takes, or the type is.
        """
        if dtype not in DTYPES.values():
            self._refuse("the type", ", ".join(DTYPES.values()), dtype, node, "insert a Cast")
        names = [each.name for each in self.attributes]
        if sorted(names) != sorted(attributes):
            self._refuse("the attributes", ", ".join(names), ", ".join(attributes) or "none", node)
        values = {
            each.name: single(attributes[each.name]) if each.type is float else int(attributes[each.name])
            for each in self.attributes
        }
        try:
            self.check(values)
        except ValueError as error:
            needed, found = error.args
            self._refuse("the sizes", needed, found, node)
        return PluginUse(self.op, dtype, values)

    def case(self, use: PluginUse) -> Case:
        """Return what is compiled for a use; the candidates are its tactics."""
        module, name = self.kernel
        kernel = getattr(import_module(module), name)
        types = [_POINTERS.get(each.kind, f"*{use.dtype}") for each in self.inputs]
        assert kernel.arg_names[len(types) :][: len(self.scalars)] == list(self.scalars), f"the sizes of {name}"
        types += ["i32"] * len(self.scalars) + [f"*{use.dtype}"] * len(self.outputs)
        return Case(
            kernel=kernel,
            row=use.dtype,
            types=dict(zip(kernel.arg_names, types, strict=False)),
            constants=self.constants(use.dtype, use.attributes),
            candidates=self.tactics(use.dtype, use.attributes),
        )

    def launch(
        self, use: PluginUse, config: Config, sizes: Mapping[str, int]
    ) -> tuple[tuple[int, int, int], tuple[int, ...]]:
        """Return the grid and the 32-bit sizes of a launch, from the sizes of the letters.

        Raises:
            LoweringError: Sizes that no launch can have.
        """
        known = {**use.attributes, **config.tile, **sizes}
        x, y, z = (int(evaluate(each, known)) for each in self.grid)
        scalars = tuple(int(evaluate(each, known)) for each in self.scalars.values())
        if max(x, *scalars) >= _INT32 or max(y, z) > _GRID_Y:
            self._refuse("the sizes", f"a grid of {_INT32 - 1} x {_GRID_Y} x {_GRID_Y} at most", f"{x} x {y} x {z}")
        return (x, y, z), scalars

    def wanted(self, name: str) -> torch.dtype | None:
        """Return the type that an input must have, whatever that of the plugin; None for the plugin's own."""
        return next(KINDS.get(each.kind) for each in self.inputs if each.name == name)

    def onnx_node(self, use: PluginUse) -> dict[str, Any]:
        """Return what an ONNX node of the plugin is: ``op_type``, ``domain``, ``attributes``, ``inputs``, ``outputs``.

        ``inputs`` are (name, element type, axes) in order; one that is left out is a constant of one element. The
        parser looks for ``op_type`` in ``plugin_namespace``; ``aot`` asks for the kernel in the engine.
        """
        return {
            "op_type": self.op,
            "domain": NAMESPACE,
            "attributes": {**use.attributes, "plugin_namespace": NAMESPACE, "plugin_version": "1", "aot": 1},
            "inputs": [
                (
                    each.name,
                    KINDS.get(each.kind, dtype_of(use.dtype)),
                    each.axes if not each.flag or use.attributes[each.flag] else ("1",),
                )
                for each in self.inputs
            ],
            "outputs": [(each.name, dtype_of(use.dtype), each.axes) for each in self.outputs],
        }

    def _dtype(self, given: Mapping[str, Operand | None], node: str | None) -> str:
        floats: dict[str, str] = {}
        for each in self.inputs:
            operand = given[each.name]
            if operand is None:
                if not each.flag:
                    self._refuse(f"`{each.name}` left out", each.doc, "nothing", node)
                continue
            if len(operand.shape) != len(each.axes):
                self._refuse(f"the rank of `{each.name}`", f"[{', '.join(each.axes)}]", f"{operand.shape}", node)
            if each.kind == "float":
                floats[each.name] = DTYPES.get(operand.dtype, str(operand.dtype))
            elif operand.dtype != KINDS[each.kind]:
                self._refuse(
                    f"the type of `{each.name}`", each.kind, str(operand.dtype).removeprefix("torch."), node,
                    "insert a Cast",
                )  # fmt: skip
        if len(set(floats.values())) != 1 or not set(floats.values()) <= set(DTYPES.values()):
            self._refuse(
                "the type",
                f"one of {', '.join(DTYPES.values())} for {', '.join(floats)}",
                ", ".join(sorted(set(floats.values()))),
                node,
                "insert a Cast, or use the graph without plugins",
            )
        return next(iter(floats.values()))

    def _sizes(self, given: Mapping[str, Operand | None], node: str | None) -> dict[str, Any]:
        sizes: dict[str, Any] = {}
        for each in self.inputs:
            operand = given[each.name]
            for letter, size in zip(each.axes, operand.shape if operand else (), strict=bool(operand)):
                want = int(letter) if letter.isdigit() else sizes.setdefault(letter, size)
                if isinstance(size, int) and isinstance(want, int) and size != want:
                    self._refuse(f"axis {letter} of `{each.name}`", str(want), str(size), node)
                if isinstance(size, int) and not letter.isdigit():
                    sizes[letter] = size
        return sizes

    def _known(self, letter: str, sizes: Mapping[str, Any], node: str | None) -> int:
        size = self._known_or_none(sizes[letter])
        if size is None:
            self._refuse(
                f"a dynamic size {letter}",
                f"a fixed number: the kernel is compiled for it ({self._where(letter)})",
                str(sizes[letter]),
                node,
                "export the model with that axis fixed, or use the graph without plugins",
            )
        return size

    def _where(self, letter: str) -> str:
        number, axis = self.letters[letter]
        return f"axis {axis} of `{self.inputs[number].name}`"

    @staticmethod
    def _known_or_none(size: Any) -> int | None:
        return size if isinstance(size, int) else None

    def _refuse(self, what: str, needed: str, found: str, node: str | None = None, help: str | None = None) -> NoReturn:
        raise LoweringError(
            f"the TensorRT plugin `{self.op}` does not take {what}",
            node=node,
            needed=needed,
            found=found,
            help=help or "use the graph without plugins",
        )


def refuse_sms(op: str, sms: Sequence[int], node: str | None = None) -> None:
    """Refuse architectures that no tactic runs on.

    Raises:
        LoweringError: Naming them.
    """
    older = [sm for sm in sms if sm < BASE_ARCH]
    if older or not sms:
        raise LoweringError(
            f"the TensorRT plugin `{op}` has no tactics for " + (", ".join(f"sm_{sm}" for sm in older) or "nothing"),
            node=node,
            needed=f"sm_{BASE_ARCH} or newer: the kernels are compiled for its tensor cores",
            found=", ".join(f"sm_{sm}" for sm in sms) or "no architecture",
            help="use the graph without plugins there",
        )


def evaluate(expression: str, known: Mapping[str, Any]) -> Any:
    """Return what an expression of the description is for numbers."""
    # Expressions are written in this folder, none comes from outside.
    return eval(expression, {"__builtins__": {}, "cdiv": lambda a, b: -(-a // b)}, dict(known))
