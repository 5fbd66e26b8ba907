"""Every operation that can be lowered equals torch in ONNX Runtime; everything else is refused."""

from __future__ import annotations

import functools
import operator
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.lowering.cases import CASES
from tests.lowering.harness import Case, Input, check, program_of, session_of
from tests.zoo import ZOO
from tokcc.backends.onnx import build_onnx
from tokcc.errors import LoweringError
from tokcc.ir.program import Program
from tokcc.lowering.onnx.table import lowerings
from tokcc.lowering.onnx.translate import IR_VERSIONS
from tokcc.testing import reduce_program, run_program, trace

# torch's own pytree copies a deprecated class in run_decompositions.
pytestmark = pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning")

aten = torch.ops.aten


def names(case: Case) -> str:
    return case.name


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("case", CASES, ids=names)
def test_equals_torch(case: Case) -> None:
    """Symbolic axes where the case has any (run at three sizes, a batch of one among them), static otherwise."""
    check(case, dynamic=case.symbolic)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in CASES if c.symbolic], ids=names)
def test_static_equals_torch(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", [c for c in CASES if c.half], ids=names)
def test_half_equals_torch(case: Case) -> None:
    check(case, dtype=torch.float16)


def test_the_cases_cover_the_table() -> None:
    covered: set[Any] = set()
    for case in CASES:
        program = program_of(case, dtype=torch.float32, dynamic=case.symbolic)  # as `check` made it
        covered |= {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert set(lowerings()) - covered == set()


def refused(name: str, target: Any, *args: Any, shape: tuple[int | str, ...] = ("B", 4, 9, 9), **kwargs: Any) -> Case:
    return Case(name, lambda b, x: b.call(target, x, *args, **kwargs), (Input(shape),))


REFUSED = [
    refused("elu with scales", aten.elu.default, 0.5, 1.5, 0.7),
    refused("softplus with beta", aten.softplus.default, 2.0),
    refused("roll without axes", aten.roll.default, [2]),
    refused("diagonal of a wide matrix", aten.diagonal.default, 0, -2, -1, shape=("B", 4, 6)),
    refused("diagonal off the middle", aten.diagonal.default, 1, -2, -1),
    refused("average pooling with ceil_mode", aten.avg_pool2d.default, [2, 2], [2, 2], [0, 0], True),
    refused("max pooling with ceil_mode", aten.max_pool2d.default, [2, 2], [2, 2], [0, 0], [1, 1], True),
    refused("adaptive pooling to several", aten.adaptive_avg_pool2d.default, [3, 3]),
    refused("dropout in training", aten.dropout.default, 0.5, True),
    refused("vector norm of order 3", aten.linalg_vector_norm.default, 3.0, [-1]),
    refused("an unknown operation", aten.erfinv.default),
    Case("bitwise and of ints", lambda b, x: b.call(aten.bitwise_and.Tensor, x, x), (Input((3,), "int"),)),
]


@pytest.mark.parametrize("case", REFUSED, ids=names)
def test_what_has_no_form_is_refused(case: Case) -> None:
    """Rather than lowered to something else."""
    with pytest.raises(LoweringError):
        build_onnx(program_of(case))


def test_an_unknown_operation_is_named() -> None:
    with pytest.raises(LoweringError, match=r"aten\.erfinv\.default has no ONNX form"):
        build_onnx(program_of(refused("unknown", aten.erfinv.default)))


@pytest.mark.parametrize("opset", [17, 25])
def test_opsets_out_of_range_are_refused(opset: int) -> None:
    with pytest.raises(LoweringError, match=f"opset {opset} is not supported"):
        build_onnx(program_of(CASES[0]), opset=opset)


# whole graphs --------------------------------------------------------------------------------------------------------


@functools.cache
def whole_vit() -> Program:
    entry = ZOO["vit_classifier"]
    return trace(entry.build(), entry.inputs(3), entry.dynamic_shapes())


@functools.cache
def vit(preset: str) -> Program:
    return reduce_program(whole_vit(), preset)[0]


def domains_and_types(model: ir.Model) -> tuple[set[str], set[str]]:
    nodes = list(model.graph.all_nodes())
    return {node.domain for node in nodes}, {node.op_type for node in nodes}


FORBIDDEN = {"ReduceL2", "LpNormalization", "NonZero", "Compress", "OneHot", "Unique", "If", "Scan"}


@pytest.mark.parametrize("opset", [18, 20, 21, 22, 23, 24])
@pytest.mark.parametrize("preset", ["none", "tome"])
def test_every_opset(preset: str, opset: int) -> None:
    program = vit(preset)
    model = build_onnx(program, opset=opset)
    assert model.ir_version == IR_VERSIONS[opset]
    assert dict(model.graph.opset_imports) == {"": opset}
    inputs = ZOO["vit_classifier"].inputs(2, seed=4)
    (got,) = session_of(model)(list(inputs.values()))  # checks the model in full
    (want,) = run_program(program, inputs)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("preset", ["none", "tome", "evit", "uniform", "pitome", "zero-tprune"])
def test_only_portable_operations(preset: str) -> None:
    model = build_onnx(vit(preset))
    domains, types = domains_and_types(model)
    assert domains == {""}
    assert not types & (FORBIDDEN | {"Loop"})
    scatters = [n for n in model.graph.all_nodes() if n.op_type.startswith("Scatter")]
    assert all("reduction" not in node.attributes for node in scatters)


def test_greedy_selection_is_the_one_loop() -> None:
    program = vit_hidden("divprune")
    _, types = domains_and_types(build_onnx(program))
    assert "Loop" in types
    assert not types & FORBIDDEN


def vit_hidden(preset: str) -> Program:
    entry = ZOO["vit"]
    reduced, _ = reduce_program(trace(entry.build(), entry.inputs(1)), preset)
    return reduced


def test_equal_nodes_are_made_once() -> None:
    """A score's attention probabilities are the attention's own."""
    _, plain = (
        sum(1 for n in build_onnx(vit(p)).graph.all_nodes() if n.op_type == "Softmax") for p in ("evit", "none")
    )
    assert plain == ZOO["vit_classifier"].num_layers
    model = build_onnx(vit("evit"))
    keys = [(n.op_type, tuple(id(v) for v in n.inputs), str(sorted(n.attributes.items()))) for n in model.graph]
    assert len(keys) == len(set(keys))


def test_names_are_unique() -> None:
    proto = ir.to_proto(build_onnx(vit("tome")))
    made = [name for node in proto.graph.node for name in node.output] + [i.name for i in proto.graph.input]
    assert len(made) == len(set(made))
    nodes = [node.name for node in proto.graph.node]
    assert len(nodes) == len(set(nodes))
    assert any(name.startswith("tokcc/") for name in nodes)  # what the runtime's profile is read by
    assert isinstance(proto, onnx.ModelProto)


# properties ----------------------------------------------------------------------------------------------------------

_INTS = st.integers(min_value=-(2**40), max_value=2**40)
_PAIRS = st.lists(st.tuples(_INTS, _INTS.filter(bool)), min_size=1, max_size=20)


def _divisions(b: Any, x: Any, y: Any) -> Any:
    return (
        b.call(aten.div.Tensor_mode, x, y, rounding_mode="floor"),
        b.call(aten.div.Tensor_mode, x, y, rounding_mode="trunc"),
        b.call(aten.remainder.Tensor, x, y),
        b.call(aten.floor_divide.default, x, y),
    )


DIVISIONS = Case("divisions", _divisions, (Input(("N",), "int"), Input(("N",), "nonzero")))


@pytest.fixture(scope="module")
def divide() -> Any:
    return session_of(build_onnx(program_of(DIVISIONS, dynamic=True)))


@settings(max_examples=100, deadline=None)
@given(pairs=_PAIRS)
def test_integer_division_is_pythons(divide: Any, pairs: list[tuple[int, int]]) -> None:
    floor, trunc, rest, again = divide([torch.tensor([p[i] for p in pairs]) for i in (0, 1)])
    assert floor.tolist() == again.tolist() == [a // b for a, b in pairs]
    assert rest.tolist() == [a % b for a, b in pairs]
    assert trunc.tolist() == [abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1) for a, b in pairs]


@pytest.fixture(scope="module")
def size_arithmetic() -> Any:
    """``arange`` of Python arithmetic on a size, negative operands among it."""

    def body(b: Any, x: Any) -> Any:
        n, m = b.size(x, 0), b.size(x, 1)
        short = b.call(operator.sub, n, m)
        floor = b.call(operator.add, b.call(operator.floordiv, short, 3), 30)
        rest = b.call(operator.mod, short, 3)
        up = b.call(operator.neg, b.call(operator.floordiv, b.call(operator.neg, n), 4))
        return tuple(b.call(aten.arange.default, size) for size in (floor, rest, up))

    return session_of(build_onnx(program_of(Case("sizes", body, (Input(("N", "M")),)), dynamic=True)))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 64), m=st.integers(1, 64))
def test_size_arithmetic_is_pythons(size_arithmetic: Any, n: int, m: int) -> None:
    floor, rest, up = size_arithmetic([torch.zeros(n, m)])
    assert len(floor) == (n - m) // 3 + 30
    assert len(rest) == (n - m) % 3
    assert len(up) == -(-n // 4)


@pytest.fixture(scope="module")
def reshaped() -> Any:
    def body(b: Any, x: Any) -> Any:
        batch, tokens = b.size(x, 0), b.size(x, 1)
        return (
            b.reshape(x, [batch, tokens, 2, 3]),
            b.reshape(x, [b.mul_sizes(batch, tokens), 6]),
            b.reshape(x, [batch, b.mul_sizes(tokens, 2), 3]),
            b.reshape(x, [tokens, batch, 6]),
            b.reshape(x, [1, batch, tokens, 6]),
            b.reshape(b.permute(x, [2, 0, 1]), [3, 2, batch, tokens]),
            b.reshape(x, [-1]),
        )

    case = Case("reshapes", body, (Input(("B", "N", 6)),))
    return session_of(build_onnx(program_of(case, dynamic=True)))


@settings(max_examples=40, deadline=None)
@given(batch=st.integers(1, 9), tokens=st.integers(1, 9))
def test_reshapes_of_symbolic_axes(reshaped: Any, batch: int, tokens: int) -> None:
    x = torch.arange(batch * tokens * 6.0).reshape(batch, tokens, 6)
    expected = (
        x.reshape(batch, tokens, 2, 3),
        x.reshape(batch * tokens, 6),
        x.reshape(batch, tokens * 2, 3),
        x.reshape(tokens, batch, 6),
        x[None],
        x.permute(2, 0, 1).reshape(3, 2, batch, tokens),
        x.reshape(-1),
    )
    for got, want in zip(reshaped([x]), expected, strict=True):
        assert torch.equal(got, want)
