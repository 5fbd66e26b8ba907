"""Programs in aten operations only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from tests.zoo import ZOO
from tokcc.errors import LoweringError
from tokcc.ir.program import Program
from tokcc.lowering.aten import decompose, large_sizes, refuse_loops, refuse_unwritten, tokcc_calls
from tokcc.testing import reduce_program, run_program, trace

# torch's own pytree copies a deprecated class in run_decompositions.
pytestmark = pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning")

aten = torch.ops.aten


def reduced(model: str, policy: Any) -> Program:
    entry = ZOO[model]
    program, _ = reduce_program(trace(entry.build(), entry.inputs(3), entry.dynamic_shapes()), policy)
    return program


@pytest.mark.parametrize(("model", "policy"), [("vit_classifier", "tome"), ("bert", "power-bert")])
def test_no_operation_of_ours_is_left_and_the_numbers_are_the_same(model: str, policy: str) -> None:
    program = reduced(model, policy)
    assert list(tokcc_calls(program.graph))
    before = [str(node) for node in program.graph.nodes]
    exported = decompose(program)
    assert list(tokcc_calls(exported.graph)) == []
    assert [str(node) for node in program.graph.nodes] == before
    entry = ZOO[model]
    for batch, length in ((1, 9), (4, 15)):
        inputs = entry.inputs(batch, length if entry.has_length else None, seed=batch)
        got = torch.utils._pytree.tree_leaves(exported.module(check_guards=False)(**inputs))
        for value, want in zip(got, run_program(program, inputs), strict=True):
            torch.testing.assert_close(value, want, rtol=1e-5, atol=1e-5)


def test_a_loop_is_refused_with_its_step() -> None:
    program = reduced("vit_classifier", "divprune")
    with pytest.raises(LoweringError) as error:
        refuse_loops(program, "aoti", "--backend onnx")
    assert error.value.exit_code == 5
    assert "tokcc::greedy_select" in error.value.what
    assert "divprune" in str(error.value.policy)
    assert error.value.found is not None
    assert "one token after another" in error.value.found
    with pytest.raises(LoweringError):
        decompose(program)


def test_a_count_that_depends_on_a_length_in_many_ways_is_refused() -> None:
    entry = ZOO["bert"]
    dynamic = reduced("bert", "tome")
    with pytest.raises(LoweringError, match="depends on a dynamic length"):
        decompose(dynamic)
    static, _ = reduce_program(trace(entry.build(), entry.inputs(3)), "tome")
    assert list(tokcc_calls(decompose(static).graph)) == []


class TestSizes:
    """What is supposed of dynamic sizes while they are traced. (A method that counts pages: test_aoti_methods.)"""

    def exported(self) -> Any:
        length = torch.export.Dim("length", min=2, max=10**6)
        return trace(torch.nn.ReLU(), {"input": torch.ones(2, 5)}, {"input": {1: length}}).to_exported()

    def size(self, exported: Any) -> Any:
        return next(node.meta["val"].shape[1] for node in exported.graph.nodes if node.op == "placeholder")

    def ask(self, exported: Any, number: int) -> None:
        with large_sizes(exported):
            assert bool(self.size(exported) == number) is (self.size(exported).node.hint == number)

    def test_they_are_large_and_as_before_afterwards(self) -> None:
        exported = self.exported()
        with large_sizes(exported):
            assert self.size(exported).node.hint > 1000
        assert self.size(exported).node.hint == 5
        self.ask(exported, 1)  # it is not: which holds of others, too

    def test_one_that_tracing_fixes_is_refused(self) -> None:
        exported = self.exported()
        with large_sizes(exported):
            supposed = self.size(exported).node.hint
        with pytest.raises(LoweringError, match="cannot keep a size dynamic") as error:
            self.ask(exported, supposed)
        assert str(supposed) in str(error.value.found)


def graph(build: Any) -> fx.Graph:
    made = fx.Graph()
    x = made.placeholder("x")
    made.output((build(made, x),))
    return made


def test_memory_that_nothing_wrote_is_not_read() -> None:
    """What is left of a kernel whose launch nobody saw: an output that is allocated, and used."""

    def lost(g: fx.Graph, x: fx.Node) -> fx.Node:
        out = g.call_function(aten.empty_like.default, (x,))
        return g.call_function(aten.mul.Tensor, (out, 2.0))

    with pytest.raises(LoweringError, match="nothing wrote"):
        refuse_unwritten(graph(lost))
    with pytest.raises(LoweringError, match="nothing wrote"):
        refuse_unwritten(graph(lambda g, x: g.call_function(aten.new_empty.default, (x, [3]))))

    def read_as_source(g: fx.Graph, x: fx.Node) -> fx.Node:
        return g.call_function(aten.copy.default, (x, g.call_function(aten.empty_like.default, (x,))))

    with pytest.raises(LoweringError, match="nothing wrote"):
        refuse_unwritten(graph(read_as_source))


def test_memory_that_is_written_first_is_fine() -> None:
    def written(g: fx.Graph, x: fx.Node) -> fx.Node:
        out = g.call_function(aten.empty_like.default, (x,))
        g.call_function(aten.full_like.default, (out, 1.0))
        return g.call_function(aten.copy.default, (out, x))

    refuse_unwritten(graph(written))

    def nothing(g: fx.Graph, x: fx.Node) -> fx.Node:
        out = g.call_function(aten.new_empty.default, (x, [0, 3]))
        out.meta["val"] = torch.empty(0, 3)
        return out

    refuse_unwritten(graph(nothing))
