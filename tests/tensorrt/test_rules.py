"""Every node against TensorRT's rules: what is refused, at which shape, and with what advice."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.tensorrt.models import WIDTH, encoder, policy_of
from tests.zoo import ZOO
from tests.zoo.arguments import arguments
from tokcc.backends.tensorrt.graph import lower, refuse_violations
from tokcc.backends.tensorrt.profiles import make_profiles
from tokcc.backends.tensorrt.rules import LARGEST_K, OPERATIONS, Violation, violations
from tokcc.errors import LoweringError
from tokcc.lowering.onnx.recorder import Recorder
from tokcc.pipeline.reducing import reduce_program
from tokcc.pipeline.stages import Stages
from tokcc.testing import trace

EXAMPLE = {"src": (2, 21, WIDTH)}


def model_of(make: Any, dtype: ir.DataType = ir.DataType.FLOAT, opset: int = 18) -> ir.Model:
    """A graph of what is recorded from one input ``[4, 5]``."""
    op = Recorder(opset)
    x = ir.Value(name="x", shape=ir.Shape([4, 5]), type=ir.TensorType(dtype))
    made = make(op, x)
    made = made[0] if isinstance(made, tuple) else made
    made.name = "y"
    graph = ir.Graph([x], [made], nodes=op.nodes, initializers=list(op.initializers.values()),
                     opset_imports={"": opset}, name="g")  # fmt: skip
    return ir.Model(graph, ir_version=8)


def found(make: Any, **given: Any) -> list[Violation]:
    return violations(model_of(make, **given), {})


class TestOperations:
    @pytest.mark.parametrize("name", ["NonZero", "Compress", "Unique", "BitShift"])
    def test_unknown_ones_are_refused(self, name: str) -> None:
        (one,) = found(lambda op, x: op(name, x))
        assert one.op == name
        assert one.help

    def test_a_scatter_with_a_reduction(self) -> None:
        def scatter(op: Recorder, x: Any) -> Any:
            return op("ScatterElements", x, op.constant([[0]], np.int64), op.constant([[1.0]], np.float32),
                      axis=0, reduction="add")  # fmt: skip

        (one,) = found(scatter)
        assert "reduction=add" in one.found

    def test_a_scatter_without_is_taken(self) -> None:
        def scatter(op: Recorder, x: Any) -> Any:
            return op("ScatterElements", x, op.constant([[0]], np.int64), op.constant([[1.0]], np.float32), axis=0)

        assert found(scatter) == []

    @pytest.mark.parametrize(
        ("name", "dtype"),
        [
            ("Softmax", ir.DataType.DOUBLE),
            ("MatMul", ir.DataType.INT64),
            ("ReduceMax", ir.DataType.BOOL),
            ("Reshape", ir.DataType.UINT8),
            ("Add", ir.DataType.INT16),
        ],
    )
    def test_types(self, name: str, dtype: ir.DataType) -> None:
        (one,) = found(lambda op, x: op(name, x, x), dtype=dtype)
        assert dtype.name in one.what

    def test_the_fused_attention_in_fp32(self) -> None:
        (one,) = found(lambda op, x: op("Attention", x, x, x), opset=23)
        assert "float16" in one.help
        assert found(lambda op, x: op("Attention", x, x, x), opset=23, dtype=ir.DataType.FLOAT16) == []

    def test_what_a_branch_holds_is_looked_at(self) -> None:
        def choose(op: Recorder, x: Any) -> Any:
            inner = ir.Node("", "NonZero", [x], name="inside")
            graph = ir.Graph([], list(inner.outputs), nodes=[inner], opset_imports={"": 18}, name="b")
            other = ir.Node("", "Identity", [x], name="other")
            second = ir.Graph([], list(other.outputs), nodes=[other], opset_imports={"": 18}, name="c")
            return op("If", op.constant(True, ir.DataType.BOOL), then_branch=graph, else_branch=second)

        assert [one.node for one in found(choose)] == ["inside"]

    def test_every_operation_of_the_matrix_is_known(self) -> None:
        for name in ("TopK", "GatherND", "Scan", "Loop", "CumSum", "LayerNormalization", "Erf", "Trilu"):
            assert name in OPERATIONS


class TestK:
    @pytest.mark.parametrize(("k", "legal"), [(1, True), (LARGEST_K, True), (LARGEST_K + 1, False), (0, False)])
    def test_a_number(self, k: int, legal: bool) -> None:
        assert (found(lambda op, x: op("TopK", x, op.ints([k]), outputs=2, axis=1)) == []) is legal

    def test_a_value_that_follows_from_no_shape(self) -> None:
        def choose(op: Recorder, x: Any) -> Any:
            count = op("Cast", op("ReduceSum", x, keepdims=0), to=int(ir.DataType.INT64))
            return op("TopK", x, op("Reshape", count, op.ints([1])), outputs=2, axis=1)

        (one,) = found(choose)
        assert "does not follow from shapes" in one.what

    @pytest.mark.parametrize(("longest", "k"), [(5120, None), (8000, 5600)])
    def test_a_share_of_the_tokens_at_the_longest_shape(self, longest: int, k: int | None) -> None:
        policy = policy_of({"version": 1, "steps": [{"preset": "evit", "budget": {"keep": 0.7}, "at": {"layers": [0]},
                                                     "score": {"kind": "norm"}}]})  # fmt: skip
        reduced, _ = encoder(policy.policy)
        given = {"src": ((1, 64, WIDTH), (2, 128, WIDTH), (4, longest, WIDTH))}
        profiles = make_profiles(reduced.sliced, EXAMPLE, given)
        if k is None:
            assert lower(reduced.sliced, profiles, policy).legal(policy).model.graph.inputs[0].name == "src"
            return
        with pytest.raises(LoweringError) as caught:
            lower(reduced.sliced, profiles, policy).legal(policy)
        assert f"{k} at the max shapes" in (caught.value.found or "")
        assert "step 1 `evit`" in (caught.value.policy or "")
        assert "tokens: 3840" in (caught.value.help or "")


class TestMessages:
    def test_what_a_step_brought_is_told_first(self) -> None:
        policy = policy_of("evit")
        of_model = Violation("view", "NonZero", None, "of the model", "a", "b", "c")
        of_step = Violation("tokcc/evit@3/TopK", "TopK", "evit@3", "of the step", "a", "b", "c")
        with pytest.raises(LoweringError, match="of the step") as caught:
            refuse_violations([of_model, of_step], policy)
        assert "`evit`" in (caught.value.policy or "")
        assert "1 more" in caught.value.what

    def test_nothing_found_is_nothing_raised(self) -> None:
        refuse_violations([], policy_of("none"))


@pytest.mark.parametrize("preset", ["power-bert", "evit", "tome"])
def test_texts_of_any_length_with_padding(preset: str) -> None:
    """How many tokens are kept follows from shapes: masks say which."""
    entry = ZOO["bert"]
    policy = policy_of({"version": 1, "steps": [arguments(preset)]})
    program = trace(entry.build(), entry.inputs(2), entry.dynamic_shapes())
    reduced = reduce_program(program, policy, Stages())
    shapes = {name: tuple((batch, n) for batch, n in ((1, 12), (2, 21), (4, 32))) for name in entry.inputs(2)}
    assert lower(reduced.sliced, make_profiles(reduced.sliced, {}, shapes), policy).violations == ()
