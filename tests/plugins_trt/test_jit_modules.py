"""The plugins as Python classes: the creator, the calls of the builder, and the launch, on a driver that records."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu_check_plugins import SMALL, Prepared, prepare
from tests.kernels.installed import needs_triton
from tests.plugins_trt.standin import Builder, Dim, DimsExprs, DynamicDesc, Field, TensorDesc, needs_wheel
from tests.plugins_trt.standin import tensorrt as stand_in
from tokcc.plugins_trt import PLUGINS, write_plugins
from tokcc.plugins_trt.driver import DriverError, Kernel
from tokcc.plugins_trt.ptx import compile_tactics

KINDS = {torch.float16: "HALF", torch.int32: "INT32", torch.int64: "INT64", torch.bool: "BOOL"}


class Driver:
    """``libcuda``: what it is called with, arguments read back through their addresses."""

    def __init__(self, kinds: list[type], context: int | None = 7, code: int = 0) -> None:
        self.kinds, self.context, self.code = kinds, context, code
        self.calls: list[str] = []
        self.loaded: list[tuple[bytes | None, bytes | None]] = []
        self.launches: list[dict[str, Any]] = []

    def cuCtxGetCurrent(self, context: Any) -> int:  # noqa: N802
        ctypes.cast(context, ctypes.POINTER(ctypes.c_void_p))[0] = self.context or 0
        return 0

    def cuModuleLoadData(self, module: Any, text: ctypes.c_char_p) -> int:  # noqa: N802
        self.calls.append("load")
        self.loaded.append((text.value, None))
        ctypes.cast(module, ctypes.POINTER(ctypes.c_void_p))[0] = 11
        return self.code

    def cuModuleGetFunction(self, function: Any, module: ctypes.c_void_p, name: ctypes.c_char_p) -> int:  # noqa: N802
        assert module.value == 11
        self.loaded[-1] = (self.loaded[-1][0], name.value)
        ctypes.cast(function, ctypes.POINTER(ctypes.c_void_p))[0] = 13
        return 0

    def cuLaunchKernel(self, function: ctypes.c_void_p, *given: Any) -> int:  # noqa: N802
        *shape, stream, arguments, extra = given
        assert function.value == 13
        assert extra is None
        read = [ctypes.cast(at, ctypes.POINTER(kind))[0] for at, kind in zip(arguments, self.kinds, strict=True)]
        self.launches.append({"shape": [n.value for n in shape], "stream": stream.value, "arguments": read})
        return self.code


def call_of(op: str, number: int = 0) -> Prepared:
    torch.manual_seed(0)
    return prepare(op, SMALL[op][number](torch.float16))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plugins")
    write_plugins([call_of(op, n).use for op in PLUGINS for n in (0, 1)], path)
    return path


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(folder))
    with stand_in() as module:
        for op in PLUGINS:
            spec = importlib.util.spec_from_file_location(f"{op}_jit", folder / f"{op}_jit.py")
            assert spec is not None
            assert spec.loader is not None
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        yield module
    sys.modules.pop("tokcc_driver", None)


def created(trt: Any, call: Prepared) -> Any:
    creator = trt.registry.get_creator(call.plugin.op, "1", "tokcc")
    assert [each.name for each in creator.field_names] == list(call.use.attributes)
    fields = [
        Field(name, np.array([value], dtype=np.float32 if isinstance(value, float) else np.int32), None)
        for name, value in call.use.attributes.items()
    ]
    plugin = creator.create_plugin("node", fields, trt.TensorRTPhase.BUILD)
    again = creator.create_plugin("node", plugin.get_fields_to_serialize(), trt.TensorRTPhase.RUNTIME)
    assert again.values == plugin.values == dict(call.use.attributes)
    return plugin


def described(trt: Any, tensors: Any) -> list[TensorDesc]:
    linear = trt.TensorFormat.LINEAR
    return [TensorDesc(trt.DataType[KINDS[tensor.dtype]], linear, tuple(tensor.shape)) for tensor in tensors]


pytestmark = needs_triton


@needs_wheel
@pytest.mark.parametrize(("op", "number"), [(op, number) for op in sorted(PLUGINS) for number in (0, 1)])
def test_builds_and_launches(trt: Any, folder: Path, op: str, number: int) -> None:
    call = call_of(op, number)
    own = created(trt, call)
    for base in type(own).__mro__[1:-1]:
        assert base.__name__ in own._initialised
    half = trt.DataType.HALF
    assert own.get_output_data_types([half] * len(call.inputs)) == [half] * len(call.expected)
    symbols = [DimsExprs([Dim(size) for size in tensor.shape]) for tensor in call.inputs]
    shapes = own.get_output_shapes(symbols, [], Builder())
    assert [tuple(d.number({}) for d in s) for s in shapes] == [tuple(each.shape) for each in call.expected]
    outputs = call.outputs(call.inputs)
    tensors = [DynamicDesc(each) for each in described(trt, (*call.inputs, *outputs))]
    count = len(call.inputs)
    assert all(own.supports_format_combination(i, tensors, count) for i in range(len(tensors)))
    for other in (TensorDesc(trt.DataType.INT8, trt.TensorFormat.LINEAR), TensorDesc(half, trt.TensorFormat.HWC)):
        wrong = [DynamicDesc(other), *tensors[1:]]
        assert not own.supports_format_combination(0, wrong, count)
    own.configure_plugin(tensors[:count], tensors[count:])
    tactics = compile_tactics(call.plugin, call.use)
    assert own.get_valid_tactics() == list(range(1, len(tactics) + 1))
    assert own.get_workspace_size([], []) == 0
    if call.plugin.functional:
        assert not hasattr(own, "get_aliased_input")
    else:
        assert [own.get_aliased_input(0), own.get_aliased_input(1)] == [0, -1]

    kinds = [ctypes.c_uint64] * count + [ctypes.c_int32] * len(call.plugin.scalars) + [ctypes.c_uint64] * len(outputs)
    for tactic, compiled in enumerate(tactics, 1):
        running = own.attach_to_context(None)
        running.set_tactic(tactic)
        driver = Driver(kinds)
        addresses = [0x7F00_0000_0000 + 256 * i for i in range(count + len(outputs))]
        sys.modules["tokcc_driver"].libcuda = lambda driver=driver: driver  # type: ignore[attr-defined]
        running.loaded = {}
        for _ in range(2):
            running.enqueue(
                described(trt, call.inputs), described(trt, outputs), addresses[:count], addresses[count:], 0, 99
            )
        grid, sizes = call.plugin.launch(call.use, compiled.config, call.sizes)
        assert driver.calls == ["load"]  # once
        assert driver.loaded == [(compiled.ptx.encode(), compiled.name.encode())]
        assert driver.launches == 2 * [
            {
                "shape": [*grid, compiled.threads, 1, 1, compiled.shared],
                "stream": 99,
                "arguments": [*addresses[:count], *sizes, *addresses[count:]],
            }
        ]


@needs_wheel
def test_a_node_without_an_attribute_is_refused(trt: Any) -> None:
    creator = trt.registry.get_creator("merge_tokens", "1", "tokcc")
    with pytest.raises(ValueError, match=r"lacks \['channels', 'first', 'weighted'\]"):
        creator.create_plugin("node", [], trt.TensorRTPhase.BUILD)


def test_the_driver_says_what_failed() -> None:
    kernel = Kernel(b"ptx", "own", Driver([ctypes.c_uint64], code=700))
    with pytest.raises(DriverError, match="own: cuModuleLoadData failed with CUDA error 700"):
        kernel.launch((1, 1, 1), 32, 0, 0, [1], [], [])
    with pytest.raises(DriverError, match="no CUDA context"):
        Kernel(b"ptx", "own", Driver([], context=None)).launch((1, 1, 1), 32, 0, 0, [], [], [])


def test_an_empty_grid_launches_nothing() -> None:
    driver = Driver([])
    Kernel(b"ptx", "own", driver).launch((0, 1, 1), 32, 0, 0, [], [], [])
    assert driver.launches == []


def test_without_a_driver_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(DriverError, match="no CUDA driver"):
        Kernel(b"ptx", "own").launch((1, 1, 1), 32, 0, 0, [], [], [])
