"""The written modules under NVIDIA's own Python code: they register, and their shapes and launches are right."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu_check_plugins import SMALL, Prepared, prepare
from tests.kernels.installed import needs_triton
from tests.plugins_trt.standin import Builder, Dim, DimsExprs, DynamicDesc, Field, Setter, TensorDesc, needs_wheel
from tests.plugins_trt.standin import tensorrt as stand_in
from tokcc.kernels.configs import Config
from tokcc.plugins_trt import PLUGINS, Plugin, PluginUse, write_plugins
from tokcc.plugins_trt.ptx import assemble, compile_tactics, parameters

pytestmark = [needs_triton, needs_wheel]

LABELS = {"fp16": "HALF", "bf16": "BF16", "fp32": "FLOAT"}
TORCH = {torch.float16: "HALF", torch.bfloat16: "BF16", torch.float32: "FLOAT"}
KINDS = {"int32": "INT32", "int64": "INT64", "bool": "BOOL"}
ONNX = {int: (np.int32, "INT32"), float: (np.float32, "FLOAT32")}
BOTH_TYPES = ("kv_update", "merge_tokens")
SMS = (80, 86, 89, 90, 100, 120)


def prepared(op: str, number: int = 0, dtype: torch.dtype = torch.float16) -> Prepared:
    torch.manual_seed(0)
    return prepare(op, SMALL[op][number](dtype))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every plugin's first two cases in fp16, and the first of some in fp32."""
    path = tmp_path_factory.mktemp("plugins")
    calls = [prepared(op, n, dtype) for op in PLUGINS for n, dtype in ((0, torch.float16), (1, torch.float16))]
    calls += [prepared(op, 0, torch.float32) for op in BOTH_TYPES]
    files = write_plugins([call.use for call in calls], path)
    assert sorted(path.iterdir()) == sorted(files)
    return path


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(folder))
    with stand_in() as module:
        yield module
    sys.modules.pop("tokcc_driver", None)


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"written_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fields(trt: Any, use: PluginUse) -> list[Field]:
    """Attributes as the ONNX parser hands them on: 32-bit integers and floats."""
    made = []
    for name, value in use.attributes.items():
        kind, label = ONNX[type(value)]
        made.append(Field(name, np.array([value], dtype=kind), trt.PluginFieldType[label]))
    return made


class Driven:
    """A plugin that the builder's calls were made to, in the builder's order."""

    def __init__(self, trt: Any, plugin: Plugin, use: PluginUse, shapes: Sequence[Sequence[int | str]], tactic: int):
        creator = trt.registry.get_creator(plugin.op, "1", "tokcc")
        request = trt.QuickPluginCreationRequest.STRICT_AOT
        own = creator.create_plugin(plugin.op, "tokcc", fields(trt, use), trt.TensorRTPhase.BUILD, request)
        kinds = [KINDS.get(each.kind, LABELS[use.dtype]) for each in plugin.inputs] + [LABELS[use.dtype]] * len(
            plugin.outputs
        )
        types = [trt.DataType[kind] for kind in kinds]
        count = len(plugin.inputs)
        self.types = [each.name for each in own.get_output_data_types(types[:count], [len(s) for s in shapes])]
        builder = Builder()
        dims = [DimsExprs([Dim(size) for size in shape]) for shape in shapes]
        self.shapes = own.get_output_shapes(dims, [], builder)
        described = [
            DynamicDesc(TensorDesc(kind, trt.TensorFormat.LINEAR, (-1,) * n))
            for kind, n in zip(types, [*map(len, shapes), *map(len, self.shapes)], strict=True)
        ]
        combinations = own.get_supported_format_combinations(described, count)
        self.combinations = [
            [each.type.name for each in combinations[at : at + len(types)]]
            for at in range(0, len(combinations), len(types))
        ]
        own.configure_plugin(described[:count], described[count:])
        self.tactics = own.get_valid_tactics()
        self.aliases = [own.get_aliased_input(number) for number in range(len(plugin.outputs))]
        own.set_tactic(tactic)
        self.launch, self.sizes = Setter(), Setter()
        own.get_launch_params(dims, described, count, self.launch, self.sizes, builder)
        plain = [each.desc for each in described]
        name, ptx = own.get_kernel(plain[:count], plain[count:])
        self.name, self.ptx = name, ptx.decode()

    def numbers(self, binding: Mapping[str, int]) -> dict[str, Any]:
        """Shapes, grid and 32-bit sizes for a binding of the symbols."""
        assert all(each.dtype.name == "INT32" for each in self.sizes.items.values())
        return {
            "shapes": [tuple(size.number(binding) for size in shape) for shape in self.shapes],
            "grid": tuple(getattr(self.launch, f"grid_{axis}").expr.number(binding) for axis in "xyz"),
            "sizes": tuple(self.sizes.items[i].expr.number(binding) for i in range(self.sizes.nbSymExprs)),
        }


def letters(call: Prepared) -> list[tuple[int | str, ...]]:
    """The shapes of a call with symbols for the sizes that the kernel is not compiled for."""
    fixed = {each.axis for each in call.plugin.attributes if each.axis}
    return [
        tuple(
            size if letter in fixed or letter.isdigit() else letter
            for letter, size in zip(each.axes, tensor.shape, strict=True)
        )
        if tensor.ndim == len(each.axes) and (not each.flag or call.use.attributes[each.flag])
        else (1,)
        for each, tensor in zip(call.plugin.inputs, call.inputs, strict=True)
    ]


CASES = [(op, number) for op in sorted(PLUGINS) for number in (0, 1)]


@pytest.mark.parametrize(("op", "number"), CASES)
def test_shapes_and_launches_are_those_of_the_operation(trt: Any, folder: Path, op: str, number: int) -> None:
    call = prepared(op, number)
    load(folder / f"{op}.py")
    tactics = compile_tactics(call.plugin, call.use)
    for tactic, compiled in enumerate(tactics, 1):
        driven = Driven(trt, call.plugin, call.use, letters(call), tactic)
        found = driven.numbers(call.sizes)
        assert found["shapes"] == [tuple(each.shape) for each in call.expected]
        grid, sizes = call.plugin.launch(call.use, compiled.config, call.sizes)
        assert (found["grid"], found["sizes"]) == (grid, sizes)
        assert set(driven.types) == {"HALF"}
        assert driven.tactics == list(range(1, len(tactics) + 1))
        block = (driven.launch.block_x.expr, driven.launch.block_y.expr, driven.launch.shared_mem.expr)
        assert [each.number({}) for each in block] == [compiled.threads, 1, compiled.shared]
        assert (driven.name, driven.ptx) == (compiled.name, compiled.ptx)
    # Without a choice of TensorRT's, the first.
    assert Driven(trt, call.plugin, call.use, letters(call), 0).ptx == tactics[0].ptx


@pytest.mark.parametrize("op", BOTH_TYPES)
def test_types_come_from_what_was_written(trt: Any, folder: Path, op: str) -> None:
    load(folder / f"{op}.py")
    half, full = prepared(op), prepared(op, 0, torch.float32)
    kinds = [KINDS.get(each.kind) for each in half.plugin.inputs] + [None] * len(half.plugin.outputs)
    expected = [[kind or own for kind in kinds] for own in ("HALF", "FLOAT")]
    driven = Driven(trt, half.plugin, half.use, letters(half), 1)
    assert sorted(driven.combinations) == sorted(expected)
    other = Driven(trt, full.plugin, full.use, letters(full), 1)
    assert set(other.types) == {"FLOAT"}
    assert other.ptx == compile_tactics(full.plugin, full.use)[0].ptx != driven.ptx


def test_aliases(trt: Any, folder: Path) -> None:
    aliases = {}
    for op in PLUGINS:
        load(folder / f"{op}.py")
        call = prepared(op)
        aliases[op] = Driven(trt, call.plugin, call.use, letters(call), 1).aliases
    assert aliases == {
        "block_sparse_attention": [-1],
        "kv_update": [0],
        "merge_tokens": [-1, -1],
        "sparse_decode": [-1],
    }


def test_a_kernel_that_was_not_written_is_refused(trt: Any, folder: Path) -> None:
    load(folder / "merge_tokens.py")
    call = prepared("merge_tokens")
    other = call.plugin.use("fp16", {**call.use.attributes, "channels": 99})
    with pytest.raises(ValueError, match="tokcc::merge_tokens: no kernel was written for channels=99"):
        Driven(trt, call.plugin, other, letters(call), 1)
    with pytest.raises(ValueError, match=r"no kernel was written for DataType\.BF16"):
        Driven(trt, call.plugin, call.plugin.use("bf16", call.use.attributes), letters(call), 1)


class Grid:
    """What launches a kernel: it keeps the grid."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __call__(self, kernel: Any) -> Grid:
        return self

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        self.grids.append(grid)
        return lambda *args, **options: None


def launched(call: Prepared, config: Config, args: tuple[Any, ...]) -> tuple[int, ...]:
    """The grid of the operation's own launch."""
    launch = import_module(call.plugin.kernel[0]).launch
    grid = Grid()
    if call.plugin.op == "kv_update":
        launch(args[0].clone(), args[3], args[2], run=grid)
    elif call.plugin.op == "sparse_decode":
        launch(*args, run=grid, parts=1)
    elif call.plugin.op == "block_sparse_attention":
        launch(*args, run=grid, config=config)
    else:
        launch(*args, run=grid)
    return (*grid.grids[0], 1, 1)[:3]


@pytest.mark.parametrize(("op", "number"), CASES)
def test_the_grid_is_that_of_the_operations_own_launch(op: str, number: int) -> None:
    torch.manual_seed(0)
    args = SMALL[op][number](torch.float16)
    call = prepare(op, args)
    config = call.plugin.tactics(call.use.dtype, call.use.attributes)[0]
    assert call.plugin.launch(call.use, config, call.sizes)[0] == launched(call, config, args)


@pytest.mark.parametrize("op", sorted(PLUGINS))
def test_kernels_assemble_and_take_the_documented_arguments(folder: Path, op: str) -> None:
    plugin = PLUGINS[op]
    expected = ["u64"] * len(plugin.inputs) + ["u32"] * len(plugin.scalars) + ["u64"] * len(plugin.outputs)
    texts = sorted(folder.glob(f"{op}.*.ptx"))
    assert len(texts) >= 2
    for text in (path.read_text() for path in texts):
        assert parameters(text, plugin.kernel[1]) == expected
        assert ".target sm_80" in text
        # Nothing of the machine that wrote it.
        assert not re.search(r"\.file|\.loc|\.section|triton\.py|/", re.sub(r"//.*", "", text))
        assert len(re.findall(r"\.entry ", text)) == 1
    for arch in SMS:
        said = assemble(texts[0].read_text(), arch)
        assert re.search(r"Used \d+ registers", said)
        assert arch != 80 or "0 bytes spill stores, 0 bytes spill loads" in said


BLOCKED = """
import importlib.abc, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.plugins_trt.standin import tensorrt
class Refused(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        assert name.split(".")[0] not in ("tokcc", "torch", "triton", "onnx"), name
with tensorrt() as trt:
    for name in [name for name in sys.modules if name.split(".")[0] in ("tokcc", "torch", "triton", "onnx")]:
        del sys.modules[name]
    sys.meta_path.insert(0, Refused())
    sys.path.insert(0, {folder!r})
    for path in sorted(Path({folder!r}).glob("*.py")):
        if path.stem.endswith("_jit") or path.stem == "tokcc_driver":
            continue
        __import__(path.stem)
    print(sorted(trt.registry.creators))
"""


def test_the_modules_need_nothing_of_ours(folder: Path) -> None:
    code = BLOCKED.format(root=str(Path(__file__).resolve().parents[2]), folder=str(folder))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str([(op, "tokcc") for op in sorted(PLUGINS)])
