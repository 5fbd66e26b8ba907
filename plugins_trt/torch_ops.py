"""The plugins as torch operations, for compilers that turn torch operations into plugins of the same name.

Those want tensors first and then plain numbers, all of them given, which our own operations do not have.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokcc.plugins_trt.description import Plugin
from tokcc.plugins_trt.parts import PluginUse

__all__ = ["TorchPlugins"]

_NUMBERS = {int: "int", float: "float"}


class TorchPlugins:
    """A namespace of torch operations, one for each plugin that writes its outputs only.

    Args:
        namespace: Of the operations; every object needs one of its own.
        plugins: The plugins.

    Attributes:
        namespace: Of the operations, and of the plugins that serve them.
        uses: What calls were made for, in their order.
    """

    def __init__(self, namespace: str, plugins: list[Plugin]) -> None:
        self.namespace = namespace
        self.uses: list[PluginUse] = []
        library: Any = torch.library.Library  # untyped
        self._library: Any = library(namespace, "DEF")
        for plugin in plugins:
            self._define(plugin)

    def call(self, plugin: Plugin, use: PluginUse, inputs: dict[str, Any]) -> Any:
        """Call a plugin's operation; what is left out becomes one element that is not read."""
        self.uses.append(use)
        first = inputs[plugin.inputs[0].name]
        given = [
            first.new_zeros([1], dtype=dtype) if inputs[name] is None else inputs[name]
            for name, dtype, _ in plugin.onnx_node(use)["inputs"]
        ]
        return getattr(getattr(torch.ops, self.namespace), plugin.op).default(*given, *use.attributes.values())

    def _define(self, plugin: Plugin) -> None:
        tensors = [f"Tensor {each.name}" for each in plugin.inputs]
        numbers = [f"{_NUMBERS[each.type]} {each.name}" for each in plugin.attributes]
        count = len(plugin.outputs)
        returned = "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"
        self._library.define(f"{plugin.op}({', '.join([*tensors, *numbers])}) -> {returned}")

        def split(arguments: tuple[Any, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
            attributes = dict(zip([a.name for a in plugin.attributes], arguments[len(plugin.inputs) :], strict=True))
            inputs = {
                each.name: tensor if not each.flag or attributes[each.flag] else None
                for each, tensor in zip(plugin.inputs, arguments, strict=False)
            }
            return inputs, attributes

        def compute(*arguments: Any) -> Any:
            return plugin.compute(*split(arguments))

        def shapes(*arguments: Any) -> Any:
            tensors = arguments[: len(plugin.inputs)]
            sizes = plugin.sizes([tensor.shape for tensor in tensors])
            made: list[Tensor] = [
                tensors[0].new_empty([int(axis) if axis.isdigit() else sizes[axis] for axis in each.axes])
                for each in plugin.outputs
            ]
            return made[0] if count == 1 else tuple(made)

        self._library.impl(plugin.op, compute, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{self.namespace}::{plugin.op}", shapes, lib=self._library)
