"""The text of a quick-deployable plugin whose kernel goes into the engine."""

from __future__ import annotations

from string import Template

from tokcc.plugins_trt.description import Plugin
from tokcc.plugins_trt.module_text import TYPES, Kernels, head, letter_lines, table, tile_lines, tupled

__all__ = ["aot_module"]

_ABOUT = """\
Plugin `{name}` for TensorRT, quick-deployable, ahead of time: import this module before the network is
parsed, and its kernel goes into the engine, which needs no Python. Needs TensorRT 10.7 or newer (not 10.14)."""

_ABOUT_ALIAS = """
An output is the memory of an input: the builder needs PreviewFeature.ALIASED_PLUGIN_IO_10_03. Give the engine's
input and output one address: else, or where the input is read by others too, TensorRT copies it first."""

_MODULE = Template('''\
$head
from typing import List, Tuple

import tensorrt as trt
import tensorrt.plugin as trtp

$table

def cdiv(a, b):
    """Return the quotient, rounded up."""
    return -(-a // b) if isinstance(a, int) and isinstance(b, int) else trtp.cdiv(a, b)


@trtp.register("$name")
def $op(
$arguments
) -> $returned:
    """Return what comes out, in symbols."""
$shape_letters    return $shapes


@trtp.autotune("$name")
def ${op}_autotune(
$arguments
    outputs: $several,
) -> List[trtp.AutoTuneCombination]:
    """Return the types and the tactics that TensorRT may time."""
    table = kernels($values)
    tactics_of(table, $first.dtype)  # says what is missing better than TensorRT does
    return [
        trtp.AutoTuneCombination(f"$types", "LINEAR", sorted(tactics))
        for label, tactics in table.items()
    ]


@trtp.aot_impl("$name")
def ${op}_aot(
$arguments
    outputs: $several,
    tactic: int,
) -> Tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]:
    """Return the kernel, its launch and its sizes, in symbols."""
    tactics = tactics_of(kernels($values), $first.dtype)
    kernel = tactics[tactic or min(tactics)]
$letters
    launch = trtp.KernelLaunchParams()
    launch.grid_x = $grid_x
    launch.grid_y = $grid_y
    launch.grid_z = $grid_z
    launch.block_x = kernel["threads"]
    launch.shared_mem = kernel["shared"]
    # $scalar_names
    sizes = $scalars
    extra = trtp.SymIntExprs.from_tuple(tuple(trtp.SymInt32(size) for size in sizes))
    return kernel["name"], (HERE / kernel["file"]).read_text(encoding="utf-8"), launch, extra
''')


def aot_module(plugin: Plugin, kernels: Kernels, namespace: str) -> str:
    """Return the text.

    Args:
        plugin: The plugin.
        kernels: Its kernels, whose files stand beside the module.
        namespace: In TensorRT's registry.
    """
    name, first = f"{namespace}::{plugin.op}", plugin.inputs[0].name
    arguments = [f"{each.name}: trtp.TensorDesc" for each in plugin.inputs]
    arguments += [f"{each.name}: {each.type.__name__}" for each in plugin.attributes]
    several = f"Tuple[{', '.join(['trtp.TensorDesc'] * len(plugin.outputs))}]"
    shapes = [
        f"{each.alias}.aliased()" if each.alias else f"trtp.from_shape_expr({tupled(each.axes)}, {first}.dtype)"
        for each in plugin.outputs
    ]
    fresh = [axis for each in plugin.outputs if not each.alias for axis in each.axes]
    expressions = [*plugin.grid, *plugin.scalars.values()]
    types = [TYPES.get(each.kind, "{label}") for each in plugin.inputs] + ["{label}"] * len(plugin.outputs)
    form, flag = "{name}.shape_expr[{axis}]", "{flag}"
    letters = tile_lines(kernels, expressions) + letter_lines(plugin, expressions, form, flag)
    return _MODULE.substitute(
        head=head(plugin, _ABOUT.format(name=name) + ("" if plugin.functional else _ABOUT_ALIAS)).rstrip("\n"),
        table=table(plugin, kernels, name),
        name=name,
        op=plugin.op,
        first=first,
        arguments="\n".join(f"    {each}," for each in arguments),
        values=", ".join(each.name for each in plugin.attributes),
        several=several,
        returned=several if len(plugin.outputs) > 1 else "trtp.TensorDesc",
        shapes=tupled(shapes) if len(shapes) > 1 else shapes[0],
        shape_letters="".join(f"    {line}\n" for line in letter_lines(plugin, fresh, form, flag)),
        letters="\n".join(f"    {line}" for line in letters),
        types=", ".join(types),
        grid_x=plugin.grid[0],
        grid_y=plugin.grid[1],
        grid_z=plugin.grid[2],
        scalar_names=", ".join(plugin.scalars),
        scalars=tupled(plugin.scalars.values()),
    )
