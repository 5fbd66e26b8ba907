"""Insert the planned reductions and rewrite everything downstream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    TensorArgument,
)
from torch.export.graph_signature import OutputSpec as ExportOutputSpec

from tokcc.analysis.walk import Action, Walk
from tokcc.errors import AxisError
from tokcc.ir.builder import Builder, GraphBuilder
from tokcc.ir.edit import fake_mode_of, remove_dead
from tokcc.ir.program import PassResult, Program
from tokcc.ir.value import Value
from tokcc.passes.bypassing import bypassed_layers, narrowing
from tokcc.passes.give_back import GiveBack
from tokcc.passes.inputs import refuse_taken_names
from tokcc.passes.outputs import OutputPlan, contract_outputs, plan_outputs
from tokcc.passes.plan import Plan

__all__ = ["Propagate", "finish", "reduce_walk", "refuse_fixed_sizes"]


def reduce_walk(
    program: Program, plan: Plan, builder: Builder, inputs: dict[str, Any] | None = None
) -> tuple[Walk, OutputPlan]:
    """Walk a program with the plan's reductions and sparse attentions, on a graph or eagerly.

    Returns:
        The walk and the output values, contracts applied, with their names appended for new ones.
    """
    refuse_taken_names(program, plan.inputs)
    actions: dict[str, list[Action]] = {}
    for reduction in plan.reductions:
        actions.setdefault(reduction.cut, []).append(reduction)
    for planned in plan.sparse:
        actions.setdefault(planned.site.output, []).append(planned)
    bypassed = bypassed_layers(program, plan.sites, plan.reductions)
    for name, layer in bypassed.items():
        actions[name] = [layer, *actions.get(name, ())]  # what else is cut there is cut of all tokens
    outputs = plan_outputs(program, plan)
    if outputs.restore_at is not None:
        actions.setdefault(outputs.restore_at, []).append(GiveBack())
    walk = Walk(program, builder, plan.sites.entry, actions=actions, inputs=inputs, on_operand=narrowing(bypassed))
    made = len(plan.made)
    try:
        values = walk.run()
    except AxisError as error:
        # What a node behind a reduction refuses is about that reduction: the last one that was made.
        if error.policy is not None or len(plan.made) == made:
            raise
        raise plan.reductions[len(plan.made) - made - 1].refused(error) from error
    if not any(space.reduced for space in plan.made[made:]):
        outputs = replace(
            outputs, mapped=frozenset(outputs.names)
        )  # nothing was removed: as with a policy without steps
    return walk, contract_outputs(walk, outputs, values)


@dataclass(frozen=True)
class Propagate:
    """The insertion and propagation pass.

    Scores read values of the token space that earlier reductions made, so insertion happens during the forward walk:
    when the walk reaches a cut it emits the reduction, and every later node is rewritten by its axis rule.

    Attributes:
        plan: What to do.
    """

    plan: Plan

    def run(self, program: Program) -> PassResult:
        """Apply the pass."""
        if not self.plan.reductions and not self.plan.sparse and not self.plan.outputs:
            return PassResult(program, False)
        builder = GraphBuilder(fake_mode_of(program))
        _, outputs = reduce_walk(program, self.plan, builder)
        return PassResult(finish(program, builder, outputs), True)


def refuse_fixed_sizes(program: Program, builder: GraphBuilder) -> None:
    """Check that every size that the caller wants to vary still varies.

    Raises:
        AxisError: When evaluating the rebuilt graph fixed or narrowed one.
    """
    loss = builder.inputs.loss()
    if loss is None:
        return
    name = program.size_names.get(loss.symbol, str(loss.symbol))
    node = loss.node
    label = None if node is None else node.meta.get("tokcc") or node.meta.get("origin")
    raise AxisError(
        f"the dynamic size `{name}` ({loss.axis}) would not be dynamic any more",
        node=None if node is None else f"{node.name} ({label})" if label else node.name,
        needed=f"{loss.wanted}, as the model was exported",
        found=loss.left,
        help="export with another example size on this axis, give it this range, or make it static; please report it",
    )


def finish(
    program: Program,
    builder: GraphBuilder,
    outputs: OutputPlan,
    *,
    inputs: Sequence[InputSpec] = (),
    input_names: Mapping[str, str] | None = None,
) -> Program:
    """Close a rebuilt graph: outputs, constants and signature.

    Args:
        program: The program that was rebuilt.
        builder: Holds the new graph.
        outputs: What leaves it.
        inputs: New inputs, behind the program's own.
        input_names: What the caller calls them, by placeholder.

    Raises:
        AxisError: When rebuilding it fixed or narrowed a size that the caller wants to vary.
    """
    refuse_fixed_sizes(program, builder)
    graph = builder.graph
    handles = [value.handle if isinstance(value, Value) else value for value in outputs.values]
    node = graph.output(tuple(handles))
    node.meta["val"] = tuple(h.meta["val"] if isinstance(h, fx.Node) else h for h in handles)
    state = [spec for spec in program.signature.input_specs if spec.kind is not InputKind.USER_INPUT]
    users = [spec for spec in program.signature.input_specs if spec.kind is InputKind.USER_INPUT]
    placeholders = {n.name: n for n in graph.nodes if n.op == "placeholder"}
    first_user = next((placeholders[n.name] for n in program.user_inputs), None)
    specs = [*state]
    for constant in builder.constant_nodes:
        if first_user is not None:
            first_user.prepend(constant)
        specs.append(
            InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(name=constant.name), str(constant.target), None)
        )
    out_specs: list[ExportOutputSpec] = []
    for i, handle in enumerate(handles):
        known = program.signature.output_specs[i] if i < len(program.signature.output_specs) else None
        kind = known.kind if known is not None else OutputKind.USER_OUTPUT
        argument: Any = (
            TensorArgument(name=handle.name) if isinstance(handle, fx.Node) else ConstantArgument("", handle)
        )
        out_specs.append(ExportOutputSpec(kind, argument, known.target if known is not None else None))
    remove_dead(graph)
    named = {}
    added = []
    for name, input_ in builder.new_inputs.items():
        if not input_.users:  # read by a reduction that removes nothing after all
            graph.erase_node(input_)
            continue
        named[input_.name] = name
        added.append(InputSpec(InputKind.USER_INPUT, TensorArgument(name=input_.name), None))
    signature = ExportGraphSignature(input_specs=[*specs, *users, *inputs, *added], output_specs=out_specs)
    result = replace(
        program,
        graph=graph,
        signature=signature,
        constants={**program.constants, **builder.constants},
        output_names=outputs.names,
        input_names={**program.input_names, **(input_names or {}), **named},
        size_names={**program.size_names, **builder.size_names},
        symbols={**program.symbols, **builder.definitions},
    )
    return result.refreshed()
