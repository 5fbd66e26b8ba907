"""Let scans read filtered step sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tokcc.ir.builder import GraphBuilder
from tokcc.ir.edit import fake_mode_of
from tokcc.ir.program import PassResult, Program
from tokcc.passes.outputs import OutputPlan
from tokcc.passes.propagate import finish
from tokcc.passes.scan.cut import ScanCut
from tokcc.passes.scan.plan import PlannedFilter, ScanPlan

__all__ = ["FilterScans"]


@dataclass(frozen=True)
class FilterScans:
    """Put the plan's filters between the step sizes of scans and everything that reads these.

    Attributes:
        plan: The plan.
    """

    plan: ScanPlan

    def run(self, program: Program) -> PassResult:
        """Apply the pass."""
        planned = {self.plan.sites[each.layer].step: each for each in self.plan.filters}
        if not planned:
            return PassResult(program, False)
        b = GraphBuilder(fake_mode_of(program))
        env: dict[fx.Node, Any] = {}
        seen: Any = None
        for node in program.graph.nodes:
            if node.op == "placeholder":
                env[node] = b.placeholder(node)
        mask = next(env[node] for node in env if node.name == self.plan.seen)
        with b.inserting("text length"):
            seen = b.sum(b.cast(mask, torch.int64), 1)  # [B]
        for node in program.graph.nodes:
            if node.op != "call_function":
                continue
            b.scope = node
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
            env[node] = b.call(node.target, *args, like=node, **kwargs)
            if node.name in planned:
                with b.inserting(f"{planned[node.name].name}@{planned[node.name].layer}"):
                    env[node] = _filtered(b, planned[node.name], env[node], seen)
        values = tuple(env[value] if isinstance(value, fx.Node) else value for value in program.output_values)
        return PassResult(finish(program, b, OutputPlan(program.output_names, (), values=values)), True)


def _filtered(b: GraphBuilder, planned: PlannedFilter, step: Any, seen: Any) -> Any:
    cut = ScanCut(b, planned.layer, step, seen, planned.tokens)
    return planned.reduce.reduce(cut, planned.select.select(cut, planned.score.emit(cut)))
