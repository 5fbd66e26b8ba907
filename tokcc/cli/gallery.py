"""``tokcc gallery``: what each method keeps of a photo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from tokcc.cli.compile import Dynamic, Inputs, Task, Unpickle
from tokcc.cli.output import Json, Output, Quiet, Verbose
from tokcc.errors import UsageError

if TYPE_CHECKING:
    from tokcc.report.gallery import Gallery

__all__ = ["gallery_command"]

_EXAMPLE = Path("examples", "image_encoder.py")
_BATCH = "pixel_values:0=1..8"


def gallery_command(
    image: Annotated[Path, typer.Option("--image", "-i", metavar="PHOTO", help="The photo.", show_default=False)],
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="An image encoder, as for `compile`. In a checkout of tokcc: the encoder of `make demo`.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="A page (.html) or one picture (.png).")
    ] = Path("gallery.html"),
    preset: Annotated[
        list[str] | None,
        typer.Option("--preset", "-p", metavar="NAME", help="A preset or a policy file; repeatable. Default: all."),
    ] = None,
    inputs: Inputs = None,
    dynamic: Dynamic = None,
    task: Task = None,
    allow_pickle: Unpickle = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show on one page what each method keeps of a photo, and which methods do not fit the model, and why.

    No engine is built: the model is captured once, and every policy runs in the eager oracle.
    """
    out = Output(json=json, quiet=quiet, verbose=verbose)
    with out.running():
        if model is None:
            model, dynamic = _example(), [_BATCH]
        from tokcc import pipeline
        from tokcc.report.gallery import check_gallery_path

        check_gallery_path(output)
        made = pipeline.gallery(
            model,
            image,
            presets=tuple(preset or ()),
            inputs=tuple(inputs or ()),
            dynamic=tuple(dynamic or ()),
            task=task,
            allow_pickle=allow_pickle,
            progress=out.progress(),
        )
        made.save(output)
        out.data({"output": str(output), **made.to_dict()})
        out.show(_table(made), *_refused(made, verbose), *(f"note: {note}" for note in made.notes), str(output))
        if quiet:
            out.plain(str(output))


def _example() -> str:
    """Return the encoder of the examples.

    Raises:
        UsageError: tokcc is installed without them.
    """
    import tokcc

    file = Path(tokcc.__file__).resolve().parents[1] / _EXAMPLE
    if not file.is_file():
        raise UsageError(
            "MODEL is missing",
            needed="an image encoder; only a checkout of tokcc has one of its own",
            help="`tokcc gallery model.pt --image photo.jpg`",
        )
    return f"{file}:features"


def _table(made: Gallery) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("preset", no_wrap=True)
    table.add_column("kept", justify="right", no_wrap=True)
    table.add_column("where", no_wrap=True)
    table.add_column("method")
    for picture in made.pictures:
        table.add_row(picture.name, f"{picture.kept}/{picture.total}", picture.where, picture.title)
    return table


def _refused(made: Gallery, verbose: bool) -> list[str]:
    if not made.refusals:
        return []
    if not verbose:
        return ["", f"{len(made.refusals)} presets do not fit the model: the page says why (--verbose: here too)"]
    return ["", "not shown:", *(f"  {', '.join(names)}: {why}" for why, names in made.refused())]
