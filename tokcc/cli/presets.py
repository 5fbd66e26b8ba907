"""``tokcc presets``: the library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from tokcc.cli.output import Json, Output, Quiet, Verbose
from tokcc.errors import UsageError

if TYPE_CHECKING:
    from tokcc.config import Preset

__all__ = ["presets"]


def presets(
    show: Annotated[
        str | None, typer.Option("--show", metavar="NAME", help="Print one preset in the long form.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """List the methods of the library, or spell one out as a policy file."""
    output = Output(json=json, quiet=quiet, verbose=verbose)
    with output.running():
        from tokcc.passes.methods import library

        if show is not None:
            _show(output, show, dict(library()))
            return
        output.data([_row(preset) for preset in library().values()])
        output.show(_table(list(library().values()), verbose))


def _row(preset: Preset) -> dict[str, Any]:
    return {
        "name": preset.name,
        "title": preset.title,
        "nodes": list(preset.nodes),
        "needs": list(preset.needs),
        "fidelity": preset.fidelity,
        "paper": preset.paper,
        "notes": preset.notes,
        "params": {name: spec.model_dump(mode="json") for name, spec in preset.params.items()},
    }


def _table(every: list[Preset], verbose: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = ["name", "nodes", "needs", "fidelity", "paper", *(["notes"] if verbose else [])]
    for column in columns:
        table.add_column(column, no_wrap=column == "name")
    for preset in every:
        row = [preset.name, ", ".join(preset.nodes), ", ".join(preset.needs) or "-", preset.fidelity, preset.paper]
        table.add_row(*row, *([preset.notes] if verbose else []))
    return table


def _show(output: Output, name: str, every: dict[str, Preset]) -> None:
    preset = every.get(name)
    if preset is None:
        from tokcc.config.checks import nearest

        close = nearest(name, every)
        raise UsageError(
            f"unknown preset `{name}`",
            help=f"did you mean `{close}`?" if close else "`tokcc presets` lists the library",
        )
    output.data({**_row(preset), "policy": preset.long_form()})
    output.plain(_as_file(preset))


def _as_file(preset: Preset) -> str:
    """Return a policy file with what a reader should know as comments."""
    import textwrap

    import yaml

    from tokcc.config.checks import show as shown

    head = [
        f"{preset.title}, {preset.paper} (written after: {preset.fidelity})",
        *textwrap.wrap(preset.notes, 110),
        f"needs: {', '.join(preset.needs) or 'nothing special'}",
        f"short form: `- preset: {preset.name}`" + (" with" if preset.params else ""),
        *(
            f"  {name}: {spec.needed()}; default {shown(spec.default)}; {spec.doc}"
            for name, spec in preset.params.items()
        ),
    ]
    body = yaml.dump(preset.long_form(), Dumper=_dumper(), sort_keys=False, allow_unicode=True, width=110)
    return "".join(f"# {line}\n" for line in head) + body.rstrip("\n")


def _dumper() -> type[Any]:
    """Return a YAML dumper that writes small mappings and lists on one line, as people do."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> yaml.MappingNode:
            flat = all(not isinstance(value, dict) for value in mapping.values()) and "node" not in mapping
            return super().represent_mapping(tag, mapping, flow_style=flat and "version" not in mapping)

    return Dumper
