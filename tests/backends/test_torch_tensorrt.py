"""Torch-TensorRT: the program with plugins' operations is run for real, the compiler is a stand-in that records."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.kernels.installed import needs_triton
from tests.plugins_trt.standin import needs_wheel
from tests.plugins_trt.standin import tensorrt as stand_in
from tests.zoo import ZOO
from tokcc.backends import torch_tensorrt as backend
from tokcc.backends.torch_tensorrt import Profile, compile_engine, lacking, with_plugins
from tokcc.errors import LoweringError
from tokcc.ir.program import Program
from tokcc.plugins_trt.parts import single
from tokcc.testing import reduce_program, run_program, trace

# torch's own pytree copies a deprecated class in run_decompositions.
pytestmark = pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning")

VIT = ZOO["vit_classifier"]
((NAME, EXAMPLE),) = VIT.inputs(3).items()
SHAPE = tuple(EXAMPLE.shape)


@cache
def reduced(dynamic: bool = True) -> Program:
    """A program that merges; nothing here changes it."""
    shapes = VIT.dynamic_shapes() if dynamic else None
    program, _ = reduce_program(trace(VIT.build(), VIT.inputs(3), shapes), "tome")
    return program


def plugin_calls(exported: torch.export.ExportedProgram, namespace: str) -> list[str]:
    return [
        node.target._opname
        for node in exported.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == namespace
    ]


def test_the_program_with_plugins_computes_the_same() -> None:
    program = reduced()
    exported, operations, native = with_plugins(program, "tokcc_test_same")
    calls = plugin_calls(exported, "tokcc_test_same")
    assert calls == [use.op for use in operations.uses]
    assert set(calls) == {"merge_tokens"}
    assert native == []
    for batch in (1, 4):
        inputs = VIT.inputs(batch, seed=batch)
        with torch.no_grad():
            got = pytree.tree_leaves(exported.module(check_guards=False)(**inputs))
        for value, want in zip(got, run_program(program, inputs), strict=True):
            torch.testing.assert_close(value, want, rtol=1e-5, atol=1e-5)


def test_what_a_plugin_does_not_take_stays_native_and_is_said() -> None:
    program = reduced()
    exported, operations, native = with_plugins(program, "tokcc_test_native", sms=(75,))
    assert plugin_calls(exported, "tokcc_test_native") == []
    assert operations.uses == []
    assert native
    assert all(op == "merge_tokens" and "sm_75" in why for op, why in native)
    inputs = VIT.inputs(2)
    got = pytree.tree_leaves(exported.module(check_guards=False)(**inputs))
    for value, want in zip(got, run_program(program, inputs), strict=True):
        torch.testing.assert_close(value, want, rtol=1e-5, atol=1e-5)


def test_a_loop_is_refused() -> None:
    program, _ = reduce_program(trace(VIT.build(), VIT.inputs(3), VIT.dynamic_shapes()), "divprune")
    with pytest.raises(LoweringError, match="the torch_tensorrt backend cannot run"):
        with_plugins(program, "tokcc_test_loop")


class Attending(torch.nn.Module):
    """Lists of 64-bit integers, and no padding."""

    def forward(self, query: Tensor, key: Tensor, index: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        attended = torch.ops.tokcc.block_sparse_attention(query, key, key, index, count, 16, 16, True, 0.3)
        capped = torch.ops.tokcc.block_sparse_attention(
            query, key, key, index, count, 16, 16, True, 0.3, count[:, 0, :1] > 0, 0.5, key[..., 0]
        )
        return attended, capped


def test_inputs_become_what_a_plugin_takes() -> None:
    g = torch.Generator().manual_seed(0)
    inputs = {
        "query": torch.randn(2, 4, 7, 24, generator=g),
        "key": torch.randn(2, 2, 40, 24, generator=g),
        "index": torch.tensor([2, 0]).expand(2, 1, 1, 2).contiguous(),
        "count": torch.full((2, 1, 1), 2),
    }
    program = trace(Attending(), inputs)
    exported, operations, native = with_plugins(program, "tokcc_test_inputs")
    assert plugin_calls(exported, "tokcc_test_inputs") == ["block_sparse_attention"]
    assert [dict(use.attributes)["scale"] for use in operations.uses] == [single(0.3)]
    assert [why for _, why in native if "bias" in why] == [why for _, why in native] != []
    (node,) = (node for node in exported.graph.nodes if node.name.startswith("block_sparse_attention"))
    assert [argument.meta["val"].dtype for argument in node.args[3:6]] == [torch.int32, torch.int32, torch.bool]
    with torch.no_grad():
        attended, capped = exported.module(check_guards=False)(**inputs)
        for found, want in zip((attended, capped), run_program(program, inputs), strict=True):
            torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


class Recorder(ModuleType):
    """``torch_tensorrt``: it keeps what it is asked."""

    def __init__(self, fail: bool = False) -> None:
        super().__init__("torch_tensorrt")
        self.events: list[tuple[str, Any]] = []
        self.fail = fail
        self.Input = lambda **given: SimpleNamespace(**given)
        plugins = SimpleNamespace(generate_plugin_converter=self._converter)
        self.dynamo = SimpleNamespace(compile=self._compile, conversion=SimpleNamespace(plugins=plugins))

    def _converter(self, plugin: str, **options: Any) -> None:
        registry = sys.modules["tensorrt.plugin._lib"].QDP_REGISTRY  # type: ignore[attr-defined]
        # What the real one asserts, and uses.
        assert registry[plugin].aot_impl_func is not None
        namespace, name = plugin.split("::")
        schema = getattr(getattr(torch.ops, namespace), name).default._schema
        names = [argument.name for argument in schema.arguments]
        assert names == [*registry[plugin].input_tensor_names, *registry[plugin].input_attrs]
        assert all(argument.default_value is None for argument in schema.arguments)
        assert len(schema.returns) == registry[plugin].num_outputs
        self.events.append(("converter", (plugin, options)))

    def _compile(self, exported: Any, **options: Any) -> str:
        self.events.append(("compile", (exported, options)))
        if self.fail:
            raise RuntimeError("no converter\n  for  aten.odd")
        return "module"

    def save(self, module: str, path: str, **options: Any) -> None:
        Path(path).write_text(module)
        self.events.append(("save", options))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    made = Recorder()
    with stand_in() as tensorrt:
        tensorrt.__version__ = "11.0.0.5"
        monkeypatch.setitem(sys.modules, "torch_tensorrt", made)
        monkeypatch.setattr(backend, "lacking", list)
        yield made


def profile(batch: tuple[int, int, int]) -> Profile:
    return Profile(*((n, *SHAPE[1:]) for n in batch))


@needs_triton
@needs_wheel
def test_plugins_are_registered_then_converters_then_it_compiles_and_saves(recorder: Recorder, tmp_path: Path) -> None:
    program = reduced()
    for number in range(2):  # twice in a process
        recorder.events.clear()
        path = tmp_path / f"model{number}.ep"
        profiles = {NAME: profile((1, 4, 8))}
        engine = compile_engine(program, path, VIT.inputs(3), profiles=profiles, settings={"optimization_level": 1})
        (first, (plugin, options)), (second, (exported, asked)), (third, saved) = recorder.events
        assert (first, second, third) == ("converter", "compile", "save")
        namespace = plugin.split("::")[0]
        assert plugin == f"{namespace}::merge_tokens"
        assert options == {"supports_dynamic_shapes": True}
        assert set(plugin_calls(exported, namespace)) == {"merge_tokens"}
        assert asked.pop("kwarg_inputs") == {
            NAME: SimpleNamespace(
                min_shape=(1, *SHAPE[1:]), opt_shape=(4, *SHAPE[1:]), max_shape=(8, *SHAPE[1:]), dtype=torch.float32
            )
        }
        assert asked == {"require_full_compilation": True, "min_block_size": 1, "optimization_level": 1}
        assert saved == {"output_format": "exported_program", "retrace": False}
        assert engine.path.read_text() == "module"
        assert engine.plugins == {"merge_tokens": len(plugin_calls(exported, namespace))}
        assert engine.native == ()
        assert (tmp_path / f"model{number}.plugins" / "merge_tokens.fp32.ptx").is_file()


@needs_triton
@needs_wheel
def test_a_fixed_program_needs_no_profile(recorder: Recorder, tmp_path: Path) -> None:
    compile_engine(reduced(dynamic=False), tmp_path / "model.ep", VIT.inputs(3))
    options = recorder.events[1][1][1]
    assert options["kwarg_inputs"] == {NAME: SimpleNamespace(shape=SHAPE, dtype=torch.float32)}


@needs_wheel
def test_sizes_that_do_not_fit_are_refused(recorder: Recorder, tmp_path: Path) -> None:
    program, path = reduced(), tmp_path / "model.ep"
    with pytest.raises(LoweringError, match="no sizes are given for the dynamic input") as error:
        compile_engine(program, path, VIT.inputs(3))
    assert error.value.exit_code == 5
    with pytest.raises(LoweringError, match="smallest <= usual <= largest"):
        compile_engine(program, path, VIT.inputs(3), profiles={NAME: profile((2, 1, 4))})
    wrong = Profile((1, 9, *SHAPE[2:]), (2, 9, *SHAPE[2:]), (4, 9, *SHAPE[2:]))
    with pytest.raises(LoweringError, match=f"needed  {SHAPE[1]} three times"):
        compile_engine(program, path, VIT.inputs(3), profiles={NAME: wrong})
    assert recorder.events == []


@needs_triton
@needs_wheel
def test_what_torch_tensorrt_refuses_is_said(recorder: Recorder, tmp_path: Path) -> None:
    recorder.fail = True
    with pytest.raises(LoweringError, match=r"no converter for aten\.odd"):
        compile_engine(reduced(dynamic=False), tmp_path / "model.ep", VIT.inputs(3))


@needs_wheel
@pytest.mark.parametrize("version", ["10.6.0", "10.14.1.48", "9.3"])
def test_a_tensorrt_without_plugins_is_refused(recorder: Recorder, tmp_path: Path, version: str) -> None:
    sys.modules["tensorrt"].__version__ = version  # type: ignore[attr-defined]
    with pytest.raises(LoweringError, match=r"10\.7 or newer, and not 10\.14") as error:
        compile_engine(reduced(dynamic=False), tmp_path / "model.ep", VIT.inputs(3))
    assert error.value.found == version


def test_what_is_missing_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = backend.importlib.util.find_spec
    gone = {"torch_tensorrt", "tensorrt"}
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None if name in gone else find(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(backend, "has_triton", lambda: False)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    said = lacking()
    assert len(said) == 4
    assert said[0] == "torch_tensorrt is not installed: pip install torch_tensorrt==2.13.0"
    with pytest.raises(LoweringError) as error:
        compile_engine(reduced(dynamic=False), tmp_path / "model.ep", VIT.inputs(3))
    assert "pip install torch_tensorrt==2.13.0" in str(error.value.found)
    assert "no CUDA device" in str(error.value.found)


def test_a_torch_tensorrt_of_another_torch_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backend, "has_triton", lambda: True)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    monkeypatch.setattr(metadata, "version", lambda name: "2.14.0")
    assert lacking() == ["torch_tensorrt 2.14.0 is for another torch than 2.13.0+cpu: install 2.13.0"]
    monkeypatch.setattr(metadata, "version", lambda name: "2.13.1")
    assert lacking() == []


def test_a_package_that_does_not_load_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(name: str) -> Any:
        raise OSError("libnvinfer.so.11: cannot open shared object file")

    monkeypatch.setattr(backend, "lacking", list)
    monkeypatch.setattr(backend.importlib, "import_module", broken)
    with pytest.raises(LoweringError, match="torch_tensorrt does not load") as error:
        compile_engine(reduced(dynamic=False), tmp_path / "model.ep", VIT.inputs(3))
    assert "libnvinfer" in str(error.value.found)
