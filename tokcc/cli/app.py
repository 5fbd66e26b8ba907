"""The program: its commands, and what happens around every one of them."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer

from tokcc.cli.bundles import bench, calibrate, report, verify
from tokcc.cli.compile import compile_command
from tokcc.cli.doctor import doctor
from tokcc.cli.gallery import gallery_command
from tokcc.cli.inspect import inspect_command
from tokcc.cli.presets import presets
from tokcc.cli.profile import profile_command
from tokcc.cli.run import run

__all__ = ["app", "main"]

app = typer.Typer(
    name="tokcc",
    help="Bake token reduction into exported transformer models: smaller graphs that an unmodified runtime loads.",
    epilog="Example: `tokcc compile model.pt --policy tome -o out/`",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _command(function: Any, name: str, example: str) -> None:
    app.command(name, epilog=f"Example: `{example}`")(function)


_command(compile_command, "compile", "tokcc compile model.pt --policy tome -o out/ --calib photos/")
_command(inspect_command, "inspect", "tokcc inspect model.pt")
_command(gallery_command, "gallery", "tokcc gallery --image photo.jpg -o gallery.html")
_command(presets, "presets", "tokcc presets --show tome > policy.yaml")
_command(profile_command, "profile", "tokcc profile smollm2/ -o heads.json")
_command(verify, "verify", "tokcc verify out/")
_command(run, "run", "tokcc run out/ 'Once upon a time' --max-new-tokens 64")
_command(bench, "bench", "tokcc bench out/ --against baseline.onnx")
_command(report, "report", "tokcc report out/ --open")
_command(calibrate, "calibrate", "tokcc calibrate out/ --data photos/ --gate 'cosine>=0.98'")
_command(doctor, "doctor", "tokcc doctor --json")


def _show_version(wanted: bool) -> None:
    if wanted:
        from tokcc import __version__

        typer.echo(f"tokcc {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Bake token reduction into exported transformer models: smaller graphs that an unmodified runtime loads."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code.

    Args:
        arguments: What follows the program's name; by default that of this process.
    """
    _stop_cleanly_when_terminated()
    try:
        app(args=None if arguments is None else list(arguments), prog_name="tokcc")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        return 130
    return 0


def _stop_cleanly_when_terminated() -> None:
    """Let SIGTERM unwind the stack like Ctrl-C, so that a half-written bundle is removed."""

    def stop(number: int, frame: object) -> NoReturn:
        sys.exit(128 + number)

    try:
        signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread: whoever runs us there handles signals
        return
