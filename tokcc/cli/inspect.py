"""``tokcc inspect``: what is in a model, and what could be done to it."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.table import Table

from tokcc.cli.compile import Dynamic, Inputs, LargestShapes, Model, SmallestShapes, Task, Unpickle, UsualShapes
from tokcc.cli.output import Json, Output, Quiet, Verbose
from tokcc.cli.shapes import shape_range
from tokcc.errors import UsageError

__all__ = ["inspect_command"]


class Builder(StrEnum):
    """Whose rules a graph can be held against."""

    TENSORRT = "tensorrt"


def inspect_command(
    model: Model,
    backend: Annotated[
        Builder | None,
        typer.Option(help="Hold every node of the graph against this builder's rules instead.", show_default=False),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option("--policy", "-p", help="With --backend: a policy file, a preset's name, or `none`."),
    ] = None,
    min_shapes: SmallestShapes = None,
    opt_shapes: UsualShapes = None,
    max_shapes: LargestShapes = None,
    inputs: Inputs = None,
    dynamic: Dynamic = None,
    task: Task = None,
    allow_pickle: Unpickle = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show blocks, sites and token spaces with sizes, and what each preset could do there, or why it cannot."""
    out = Output(json=json, quiet=quiet, verbose=verbose)
    with out.running():
        from tokcc import pipeline
        from tokcc.cli.tree import as_tree

        shapes = shape_range(min_shapes, opt_shapes, max_shapes)
        if backend is not None:
            _rules(
                out,
                model,
                policy or "none",
                inputs=tuple(inputs or ()),
                dynamic=tuple(dynamic or ()),
                shapes=shapes.by_input() if shapes else None,
                task=task,
                allow_pickle=allow_pickle,
            )
            return
        if policy is not None or shapes is not None:
            raise UsageError("--policy and shapes are for --backend", help="for instance `--backend tensorrt`")
        inspection = pipeline.inspect(
            model,
            inputs=tuple(inputs or ()),
            dynamic=tuple(dynamic or ()),
            task=task,
            allow_pickle=allow_pickle,
            progress=out.progress(),
        ).to_dict()
        out.data(inspection)
        out.show(as_tree(model, inspection))


def _rules(out: Output, model: str, policy: str, **loading: Any) -> None:
    """Show what TensorRT does not take, and fail where there is anything."""
    from tokcc.pipeline.legality import check_legality

    checked = check_legality(model, policy, **loading, progress=out.progress())
    shown = [each.to_dict() for each in checked]
    out.data(
        shown[0] if len(shown) == 1 else {"parts": {each.model: own for each, own in zip(checked, shown, strict=True)}}
    )
    for each in shown:
        nodes = sum(each["operations"].values())
        kinds = ", ".join(f"{name} {count}" for name, count in each["operations"].items())
        out.show(f"{each['model']}: {nodes} nodes for TensorRT: {kinds}")
        if each["legal"]:
            out.show("every node is within the builder's rules")
            continue
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("node", "what", "needed", "found", "policy", "help"):
            table.add_column(column, overflow="fold")
        for row in each["violations"]:
            table.add_row(row["node"], row["what"], row["needed"], row["found"], row["policy"] or "-", row["help"])
        out.show(table)
    for found in checked:
        found.refuse()
