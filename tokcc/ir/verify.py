"""The structural verifier that runs after every pass."""

from __future__ import annotations

import torch
from torch import fx
from torch.export.graph_signature import InputKind

from tokcc.errors import VerifyError
from tokcc.ir.program import Program

__all__ = ["verify"]


def verify(program: Program, after: str) -> None:
    """Check that a program is well formed.

    Checks: the graph is topologically ordered and lints; every call is functional and has a fake; placeholders agree
    with the signature in number, order and name; every state placeholder has its tensor, of the recorded shape and
    dtype; state comes before user inputs; the output agrees with the signature.

    Args:
        program: The program.
        after: Name of the pass, for the message.

    Raises:
        VerifyError: Naming the pass and the node.
    """

    def refuse(what: str, node: fx.Node | None = None) -> None:
        raise VerifyError(f"{what} after {after}", node=None if node is None else node.format_node())

    try:
        program.graph.lint()
    except RuntimeError as error:
        raise VerifyError(f"malformed graph after {after}", found=str(error)) from error
    specs = list(program.input_specs())
    seen_user = False
    for node, spec in specs:
        name = getattr(spec.arg, "name", None)
        if name != node.name:
            refuse(f"placeholder {node.name} is called {name} in the signature", node)
        if spec.kind is InputKind.USER_INPUT:
            seen_user = True
        elif seen_user:
            refuse("a state placeholder follows a user input", node)
        elif spec.target is not None:
            value = program.state_dict.get(spec.target, program.constants.get(spec.target))
            fake = node.meta.get("val")
            if value is None:
                refuse(f"no tensor for {spec.target}", node)
            elif isinstance(value, torch.Tensor) and isinstance(fake, torch.Tensor) and not _same_kind(value, fake):
                refuse(f"{spec.target} is {tuple(value.shape)} {value.dtype}, recorded otherwise", node)
    for node in program.graph.nodes:
        if node.op not in ("placeholder", "call_function", "output"):
            refuse(f"a node of kind {node.op}", node)
        if node.op != "call_function":
            continue
        schema = getattr(node.target, "_schema", None)
        if "val" not in node.meta and (schema is None or schema.returns):  # asserts return nothing
            refuse("a call without a fake value", node)
        if schema is not None and schema.is_mutable:
            refuse(f"an operation that mutates its operands ({node.target})", node)
    if len(program.output_values) != len(program.signature.output_specs):
        refuse("outputs and signature disagree", program.output_node)
    for value, output in zip(program.output_values, program.signature.output_specs, strict=True):
        if isinstance(value, fx.Node) and getattr(output.arg, "name", None) != value.name:
            refuse(f"output {value.name} is called {getattr(output.arg, 'name', None)} in the signature", value)


def _same_kind(value: torch.Tensor, fake: torch.Tensor) -> bool:
    return tuple(value.shape) == tuple(fake.shape) and value.dtype == fake.dtype
