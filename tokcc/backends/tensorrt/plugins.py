"""The second graph for TensorRT: operations that kernels of ours do in one launch are plugin nodes in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from tokcc.lowering.onnx.translate import Translator, ir_dtype
from tokcc.plugins_trt import NAMESPACE, PLUGINS, Operand, Plugin, PluginUse

__all__ = ["DOMAINS", "PluginNodes"]

DOMAINS = (NAMESPACE,)
"""Of plugin nodes."""


class PluginNodes:
    """Lowers operations to plugin nodes, and remembers which plugins that needs.

    Args:
        names: The plugins to use.
        sms: Architectures that the engine is for.
    """

    def __init__(self, names: Sequence[str], sms: Sequence[int]) -> None:
        self.sms = tuple(sms)
        self.uses: list[PluginUse] = []
        self._plugins = [PLUGINS[name] for name in names]

    def forms(self) -> Mapping[Any, Callable[..., Any]]:
        """Return the lowerings by operation."""
        return {_operation(plugin.replaces): self._lowering(plugin) for plugin in self._plugins}

    def _lowering(self, plugin: Plugin) -> Callable[..., Any]:
        def lower(t: Translator, node: fx.Node, *args: Any, **kwargs: Any) -> Any:
            call = plugin.arguments(*args, **kwargs)
            given = {name: _operand(plugin, name, value) for name, value in call.inputs.items()}
            place = f"{node.name} ({node.meta.get('tokcc') or 'the model'})"
            use = plugin.takes(given, call.attributes, sms=self.sms, node=place)
            self.uses.append(use)
            form = plugin.onnx_node(use)
            inputs = [
                t.op.constant([0], ir_dtype(dtype))
                if call.inputs.get(name) is None
                else t.value(call.inputs[name], dtype)
                for name, dtype, _ in form["inputs"]
            ]
            made = t.op(
                form["op_type"], *inputs, outputs=len(form["outputs"]), domain=form["domain"], **form["attributes"]
            )
            values = made if isinstance(made, tuple) else (made,)
            for value, (_, dtype, _) in zip(values, form["outputs"], strict=True):
                value.type = ir.TensorType(ir_dtype(dtype))
            return made

        return lower


def _operation(name: str) -> Any:
    namespace, _, operation = name.partition("::")
    return getattr(getattr(torch.ops, namespace), operation).default


def _operand(plugin: Plugin, name: str, value: Any) -> Operand | None:
    if value is None:
        return None
    fake = value.meta["val"]
    sizes: Sequence[Any] = fake.shape  # ints and SymInts; the stubs know ints only
    return Operand(plugin.wanted(name) or fake.dtype, tuple(sizes))
