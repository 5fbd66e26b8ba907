"""The text of a plugin as a class that launches its kernels from Python."""

from __future__ import annotations

from string import Template

from tokcc.plugins_trt.description import Plugin
from tokcc.plugins_trt.module_text import TYPES, Kernels, head, letter_lines, table, tile_lines, tupled, used_names

__all__ = ["jit_module"]

_ABOUT = """\
Plugin `{name}` for TensorRT as a class that runs in Python: for where the kernel cannot go into the engine.
Import this module before the network is parsed and before the engine is loaded; never together with {op}.py,
which registers the same name. Launches go through the CUDA driver (tokcc_driver.py)."""

_MODULE = Template('''\
$head
import numpy as np
import tensorrt as trt

from tokcc_driver import Kernel

$table

# Numpy's and TensorRT's type of each attribute.
FIELDS = $fields


def cdiv(a, b):
    """Return the quotient, rounded up."""
    return -(-a // b)


def field(name, values):
    """Return an attribute as TensorRT holds it."""
    kind, label = FIELDS[name]
    return trt.PluginField(name, np.array(values, dtype=kind), getattr(trt.PluginFieldType, label))


class $title($bases):
    """The plugin; its kernels are loaded on their first launch."""

    def __init__(self, values):
$inits
        self.values = values
        self.table = kernels(*(values[name] for name in ATTRIBUTES))
        self.tactic = 0
        self.dtype = None
        self.loaded = {}
        self.plugin_name = "$op"
        self.plugin_version = "1"
        self.plugin_namespace = "$namespace"
        self.num_outputs = $outputs
        self.timing_cache_id = ""

    def get_capability_interface(self, type):
        return self

    def clone(self):
        other = $title(self.values)
        other.__dict__.update(self.__dict__)
        return other

    def get_output_data_types(self, input_types):
        return [input_types[0]] * $outputs

    def get_output_shapes(self, inputs, shape_inputs, builder):
        shapes = []
        for axes in $output_axes:
            shape = trt.DimsExprs(len(axes))
            for i, place in enumerate(axes):
                fixed = isinstance(place, int)
                shape[i] = builder.constant(place) if fixed else inputs[place[0]][place[1]]
            shapes.append(shape)
        return shapes

    def supports_format_combination(self, position, tensors, num_inputs):
        kind = $kinds[position]
        found = tensors[position].desc
        if found.format != trt.TensorFormat.LINEAR:
            return False
        if kind:
            return found.type == getattr(trt.DataType, kind)
        if position:
            return found.type == tensors[0].desc.type
        return any(found.type == TYPES[label] for label in self.table)

    def configure_plugin(self, inputs, outputs):
        self.dtype = inputs[0].desc.type

    def get_valid_tactics(self):
        return sorted(tactics_of(self.table, self.dtype))

    def set_tactic(self, tactic):
        self.tactic = tactic

    def get_workspace_size(self, inputs, outputs):
        return 0
$alias
    def on_shape_change(self, inputs, outputs):
        return None

    def attach_to_context(self, context):
        return self.clone()

    def get_fields_to_serialize(self):
        return trt.PluginFieldCollection([field(name, [self.values[name]]) for name in ATTRIBUTES])

    def enqueue(self, input_desc, output_desc, inputs, outputs, workspace, stream):
        tactics = tactics_of(self.table, input_desc[0].type)
        kernel = tactics[self.tactic or min(tactics)]
$letters
        if kernel["file"] not in self.loaded:
            self.loaded[kernel["file"]] = Kernel((HERE / kernel["file"]).read_bytes(), kernel["name"])
        self.loaded[kernel["file"]].launch(
            $grid,
            kernel["threads"],
            kernel["shared"],
            stream,
            inputs,
            $scalars,  # $scalar_names
            outputs,
        )


class ${title}Creator(trt.IPluginCreatorV3One):
    """Makes the plugin from a node's attributes."""

    def __init__(self):
        trt.IPluginCreatorV3One.__init__(self)
        self.name = "$op"
        self.plugin_version = "1"
        self.plugin_namespace = "$namespace"
        self.field_names = trt.PluginFieldCollection([field(name, []) for name in ATTRIBUTES])

    def create_plugin(self, name, fields, phase):
        given = {each.name: each.data[0].item() for each in fields if each.name in FIELDS}
        missing = [each for each in ATTRIBUTES if each not in given]
        if missing:
            raise ValueError(f"$namespace::$op: the node lacks {missing}")
        return $title(given)


trt.get_plugin_registry().register_creator(${title}Creator(), "$namespace")
''')

_ALIAS = """
    def get_aliased_input(self, output):
        return {alias}.get(output, -1)
"""


def jit_module(plugin: Plugin, kernels: Kernels, namespace: str) -> str:
    """Return the text.

    Args:
        plugin: The plugin.
        kernels: Its kernels, whose files stand beside the module.
        namespace: In TensorRT's registry.
    """
    name = f"{namespace}::{plugin.op}"
    inputs = [each.name for each in plugin.inputs]
    alias = {number: inputs.index(each.alias) for number, each in enumerate(plugin.outputs) if each.alias}
    bases = [
        "trt.IPluginV3",
        "trt.IPluginV3OneCore",
        "trt.IPluginV3OneBuildV2" if alias else "trt.IPluginV3OneBuild",
        "trt.IPluginV3OneRuntime",
    ]
    expressions = [*plugin.grid, *plugin.scalars.values()]
    used = used_names(expressions)
    value = 'self.values["{flag}"]'
    lines = [
        *tile_lines(kernels, expressions),
        *letter_lines(plugin, expressions, "input_desc[{number}].dims[{axis}]", value),
        *(f"{each.name} = {value.format(flag=each.name)}" for each in plugin.attributes if each.name in used),
    ]
    return _MODULE.substitute(
        head=head(plugin, _ABOUT.format(name=name, op=plugin.op)),
        table=table(plugin, kernels, name),
        fields={
            each.name: ("float32", "FLOAT32") if each.type is float else ("int32", "INT32")
            for each in plugin.attributes
        },
        op=plugin.op,
        namespace=namespace,
        title="".join(part.capitalize() for part in plugin.op.split("_")),
        bases=", ".join(bases),
        inits="\n".join(f"        {base}.__init__(self)" for base in bases),
        outputs=len(plugin.outputs),
        output_axes=[
            [int(axis) if axis.isdigit() else plugin.letters[axis] for axis in each.axes] for each in plugin.outputs
        ],
        kinds=[TYPES.get(each.kind, "") for each in plugin.inputs] + [""] * len(plugin.outputs),
        alias=_ALIAS.format(alias=alias) if alias else "",
        letters="\n".join(f"        {line}" for line in lines),
        grid=tupled(plugin.grid),
        scalars=tupled(plugin.scalars.values()),
        scalar_names=", ".join(plugin.scalars),
    )
