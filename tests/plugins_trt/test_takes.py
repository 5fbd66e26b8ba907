"""What the plugins take, what they refuse and in which words, and what their ONNX nodes are."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from benchmarks.gpu_check_plugins import SMALL, prepare
from tests.kernels.installed import needs_triton
from tokcc.errors import LoweringError
from tokcc.plugins_trt import PLUGINS, SMS, Operand, PluginUse, plugin_for, write_plugins
from tokcc.plugins_trt.description import evaluate
from tokcc.plugins_trt.emit import file_name
from tokcc.plugins_trt.parts import single
from tokcc.plugins_trt.ptx import compile_tactics, stripped

HALF = torch.float16


def ints(*shape: Any) -> Operand:
    return Operand(torch.int64, shape)


def merge(**changed: Any) -> dict[str, Operand | None]:
    inputs: dict[str, Operand | None] = {
        "x": Operand(HALF, ("batch", 197, 384)),
        "weight": Operand(HALF, ("batch", 197)),
        "keep": ints("batch", 184),
        "source": ints("batch", 13),
        "slot": ints("batch", 13),
    }
    return {**inputs, **changed}


def prompt(width: Any = 128, dtype: torch.dtype = HALF, **changed: Any) -> dict[str, Operand | None]:
    inputs: dict[str, Operand | None] = {
        "query": Operand(dtype, ("B", 32, "S", width)),
        "key": Operand(dtype, ("B", 8, "L", width)),
        "value": Operand(dtype, ("B", 8, "L", width)),
        "index": Operand(torch.int32, ("B", 8, "M", 16)),
        "count": Operand(torch.int32, ("B", 8, "M")),
        "valid": None,
    }
    return {**inputs, **changed}


PROMPT = {"block_q": 128, "block_k": 128, "causal": 1, "scale": 0.125, "softcap": 0.0}


def test_a_use_has_the_numbers_that_the_kernel_is_compiled_for() -> None:
    use = PLUGINS["merge_tokens"].takes(merge(), {"first": 1})
    assert use == PluginUse("merge_tokens", "fp16", {"channels": 384, "first": 1, "weighted": 1})
    use = PLUGINS["merge_tokens"].takes(merge(weight=None), {"first": 0})
    assert use.attributes["weighted"] == 0
    use = PLUGINS["block_sparse_attention"].takes(prompt(), PROMPT)
    assert use.key == (128, 128, 1, 0.125, 0.0, 0, 128, 128)
    scaled = PLUGINS["block_sparse_attention"].takes(prompt(), {**PROMPT, "scale": 0.1})
    assert scaled.attributes["scale"] == single(0.1) != 0.1


def test_heads_that_share_a_list_follow_from_the_sizes() -> None:
    args = SMALL["sparse_decode"]
    assert [prepare("sparse_decode", make(HALF)).use.attributes["sharing"] for make in args] == [2, 1, 2]
    dynamic = {**prompt(index=Operand(torch.int32, ("B", 8, 16)), count=Operand(torch.int32, ("B", 8)))}
    dynamic["query"] = Operand(HALF, ("B", "heads", 1, 128))
    with pytest.raises(LoweringError, match="sharing"):
        PLUGINS["sparse_decode"].takes(dynamic, {"page": 16, "scale": 0.1, "softcap": 0.0})


REFUSED: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    (
        merge(x=Operand(torch.float64, ("B", 197, 384)), weight=None),
        {},
        ["does not take the type", "fp16, bf16, fp32", "float64"],
    ),
    (merge(weight=Operand(torch.float32, ("B", 197))), {}, ["does not take the type", "fp16, fp32", "insert a Cast"]),
    (
        merge(keep=Operand(torch.int32, ("B", 184))),
        {},
        ["does not take the type of `keep`", "needed  int64", "found   int32", "Cast"],
    ),
    (
        merge(x=Operand(HALF, ("B", 197, "width"))),
        {},
        ["does not take a dynamic size C", "axis 2 of `x`", "found   width", "axis fixed"],
    ),
    (merge(slot=ints("B", 12)), {}, ["axis R of `slot`", "needed  13", "found   12"]),
    (merge(keep=ints("B", 184, 1)), {}, ["the rank of `keep`", "[B, K]"]),
    (merge(source=None), {}, ["`source` left out", "merged away"]),
    (merge(), {"sms": (75,)}, ["has no tactics for sm_75", "needed  sm_80 or newer"]),
    (merge(), {"sms": ()}, ["has no tactics for nothing"]),
    (merge(), {"node": "merge_3", "sms": (70, 90)}, ["node    merge_3", "has no tactics for sm_70", "sm_70, sm_90"]),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_what_it_does_not_take_is_said(number: int) -> None:
    inputs, options, words = REFUSED[number]
    with pytest.raises(LoweringError) as caught:
        PLUGINS["merge_tokens"].takes(inputs, {"first": 1}, **options)
    assert caught.value.exit_code == 5
    for word in words:
        assert word in str(caught.value)


def test_sizes_that_no_kernel_takes() -> None:
    attention, decode, update = (PLUGINS[op] for op in ("block_sparse_attention", "sparse_decode", "kv_update"))
    with pytest.raises(LoweringError, match="heads of at most 256 numbers"):
        attention.takes(prompt(width=320), PROMPT)
    with pytest.raises(LoweringError, match="blocks of at least 1"):
        attention.takes(prompt(), {**PROMPT, "block_k": 0})
    use = prepare("sparse_decode", SMALL["sparse_decode"][0](HALF)).use
    for changed, words in (({"page": 0}, "pages of at least 1"), ({"sharing": 65}, "1 to 64 query heads")):
        with pytest.raises(LoweringError, match=words):
            decode.use("fp16", {**use.attributes, **changed})
    with pytest.raises(LoweringError, match="heads of at most 1024"):
        update.use("fp32", {"width": 1025})
    with pytest.raises(LoweringError, match="channels >= 1"):
        PLUGINS["merge_tokens"].use("fp16", {"channels": 384, "first": -1, "weighted": 0})
    with pytest.raises(LoweringError, match="does not take the attributes"):
        update.use("fp32", {"width": 8, "height": 8})
    with pytest.raises(LoweringError, match="does not take the type"):
        update.use("int8", {"width": 8})
    one, config = update.use("fp32", {"width": 8}), update.tactics("fp32", {})[0]
    with pytest.raises(LoweringError, match="a grid of"):
        update.launch(one, config, {"B": 1, "H": 2**20, "N": 1, "S": 2**12})


def test_what_the_operations_do_and_the_plugins_do_not() -> None:
    q = torch.randn(1, 2, 1, 8)
    with pytest.raises(LoweringError, match="does not add a bias"):
        PLUGINS["block_sparse_attention"].arguments(q, q, q, q, q, 1, 1, True, 0.1, None, 0.0, q)
    with pytest.raises(LoweringError, match="writes slots only"):
        PLUGINS["kv_update"].arguments(q, 1, q, q)
    assert PLUGINS["kv_update"].arguments(q, -2, "place", "new").inputs["new"] == "new"


def test_a_letter_is_read_from_a_tensor_that_is_given() -> None:
    plugin = PLUGINS["block_sparse_attention"]
    assert plugin.letters["B"] == (0, 0)
    assert plugin.letters["T"] == (5, 1)
    assert "T" not in plugin.sizes([(1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 6), (1, 2, 1, 1), (1, 2, 1), (1,)])
    assert evaluate("B * cdiv(K, BT)", {"B": 3, "K": 17, "BT": 16}) == 6


@pytest.mark.parametrize("op", sorted(PLUGINS))
def test_the_node_is_valid_onnx_and_holds_what_the_plugin_reads(op: str) -> None:
    call = prepare(op, SMALL[op][0](HALF))
    node = call.plugin.onnx_node(call.use)
    elements = {HALF: TensorProto.FLOAT16, torch.int32: TensorProto.INT32, torch.int64: TensorProto.INT64}
    elements[torch.bool] = TensorProto.BOOL
    inputs = [helper.make_tensor_value_info(n, elements[dtype], axes) for n, dtype, axes in node["inputs"]]
    outputs = [helper.make_tensor_value_info(n, elements[dtype], axes) for n, dtype, axes in node["outputs"]]
    made = helper.make_node(
        node["op_type"], [n for n, *_ in node["inputs"]], [n for n, *_ in node["outputs"]], domain=node["domain"],
        **node["attributes"],
    )  # fmt: skip
    graph = helper.make_graph([made], "one", inputs, outputs)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("tokcc", 1)]
    onnx.checker.check_model(helper.make_model(graph, opset_imports=opsets), full_check=True)
    attributes = {each.name: helper.get_attribute_value(each) for each in made.attribute}
    assert attributes.pop("plugin_namespace") == b"tokcc"
    assert attributes.pop("plugin_version") == b"1"
    assert attributes.pop("aot") == 1
    assert attributes == dict(call.use.attributes)
    kinds = {each.name: onnx.AttributeProto.FLOAT if each.type is float else onnx.AttributeProto.INT
             for each in call.plugin.attributes}  # fmt: skip
    assert {each.name: each.type for each in made.attribute if each.name in kinds} == kinds
    left_out = [each.name for each in call.plugin.inputs if each.flag and not call.use.attributes[each.flag]]
    assert [name for name, _, axes in node["inputs"] if axes == ("1",)] == left_out


def test_a_plugin_is_found_by_its_operation() -> None:
    assert plugin_for("tokcc::merge_tokens") is PLUGINS["merge_tokens"]
    assert plugin_for("aten::index_copy") is PLUGINS["kv_update"]
    assert plugin_for("tokcc::gather_tokens") is None
    decode = PLUGINS["sparse_decode"]
    wanted = {name: decode.wanted(name) for name in ("query", "index", "valid")}
    assert wanted == {"query": None, "index": torch.int32, "valid": torch.bool}


def test_files_are_named_by_what_is_in_them() -> None:
    assert file_name("merge_tokens", "fp16", 0, 1) == "merge_tokens.fp16.ptx"
    assert file_name("merge_tokens", "fp32", 2, 3) == "merge_tokens.fp32.v2.t3.ptx"


@needs_triton
def test_several_numbers_are_several_kernels(tmp_path: Path) -> None:
    plugin = PLUGINS["kv_update"]
    uses = [plugin.use("fp16", {"width": n}) for n in (64, 20, 64)]
    files = [path.name for path in write_plugins(uses, tmp_path / "new")]
    assert files == [
        "kv_update.fp16.ptx", "kv_update.fp16.t2.ptx", "kv_update.fp16.v1.ptx", "kv_update.fp16.v1.t2.ptx",
        "kv_update.py", "kv_update_jit.py", "tokcc_driver.py",
    ]  # fmt: skip
    assert "    (20,): {" in (tmp_path / "new" / "kv_update.py").read_text()
    assert write_plugins([], tmp_path / "none") == []


def test_nothing_is_written_for_an_architecture_without_tactics(tmp_path: Path) -> None:
    use = PLUGINS["kv_update"].use("fp16", {"width": 64})
    with pytest.raises(LoweringError, match="sm_75"):
        write_plugins([use], tmp_path, sms=(*SMS, 75))
    assert list(tmp_path.iterdir()) == []


def test_without_triton_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokcc.plugins_trt.ptx.has_triton", lambda: False)
    with pytest.raises(LoweringError, match=r"tokcc\[triton\]"):
        write_plugins([PLUGINS["kv_update"].use("fp16", {"width": 64})], tmp_path)


@needs_triton
def test_no_tactic_left_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokcc.plugins_trt.ptx.SHARED_LIMIT", 100)
    use = PLUGINS["merge_tokens"].takes(merge(), {"first": 1})
    with pytest.raises(LoweringError, match="no tactic left"):
        compile_tactics(PLUGINS["merge_tokens"], use)


PTX = """
.visible .entry own(
	.param .u64 .ptr .global .align 16 own_param_0,
	.param .u32 own_param_1,
	.param .u64 .ptr .global .align 1 own_param_2,
	.param .u64 .ptr .global .align 1 own_param_3
)
.reqntid 128
{ ld.param.u64 %rd1, [own_param_0]; BODY }
"""


def test_hidden_parameters_go_and_may_not_be_read() -> None:
    found = stripped(PTX, "own", 2)
    assert "own_param_1" in found
    assert "own_param_2" not in found
    assert "own_param_3" not in found
    with pytest.raises(AssertionError, match="own_param_2 is read"):
        stripped(PTX.replace("BODY", "ld.param.u64 %rd2, [own_param_2];"), "own", 2)
    with pytest.raises(AssertionError, match="4 parameters, not 3 and 2"):
        stripped(PTX, "own", 3)


def test_the_kernels_own_sizes_are_the_plugins() -> None:
    pytest.importorskip("triton")
    plugin = PLUGINS["merge_tokens"]
    use = plugin.takes(merge(), {"first": 1})
    with pytest.raises(AssertionError, match="the sizes of merge_tokens_plugin"):
        replace(plugin, scalars={"kept": "K", "tokens": "N", "gone": "R"}).case(use)


def test_describing_needs_neither_triton_nor_tensorrt() -> None:
    code = (
        "import sys; sys.modules['triton'] = sys.modules['tensorrt'] = None\n"
        "from tokcc.plugins_trt import PLUGINS; print(sorted(PLUGINS))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['block_sparse_attention', 'kv_update', 'merge_tokens', 'sparse_decode']"
