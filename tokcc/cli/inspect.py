"""``tokcc inspect``: what is in a model, and what could be done to it."""

from __future__ import annotations

from tokcc.cli.compile import Dynamic, Inputs, Model, Task, Unpickle
from tokcc.cli.output import Json, Output, Quiet, Verbose

__all__ = ["inspect_command"]


def inspect_command(
    model: Model,
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
