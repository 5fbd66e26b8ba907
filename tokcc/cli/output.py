"""What a command prints: results to standard output, progress and errors to standard error."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.text import Text

from tokcc.errors import TokccError
from tokcc.progress import Progress, rich_progress, silent

if TYPE_CHECKING:
    from tokcc.report.schema import Report

__all__ = ["Json", "Output", "Quiet", "Verbose"]

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for programs.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no tables; errors still show.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="More detail, and a traceback when tokcc crashes.")]

_INTERRUPTED = 130
_CRASHED = 1


class Output:
    """The output of one command.

    Args:
        json: Whether standard output is for a program.
        quiet: Whether to print nothing but errors.
        verbose: Whether to print more.
    """

    def __init__(self, *, json: bool, quiet: bool, verbose: bool) -> None:
        self.json = json
        self.quiet = quiet
        self.verbose = verbose
        self._stdout = sys.stdout
        self._out = Console(file=self._stdout, highlight=False)
        self._err = Console(stderr=True, highlight=False)
        self._data: Any = None

    def progress(self) -> Progress:
        """Return where to show progress."""
        return silent() if self.quiet else rich_progress(self._err)

    def show(self, *parts: RenderableType) -> None:
        """Print parts of the result for people."""
        if self.json or self.quiet:
            return
        for part in parts:
            self._out.print(part, soft_wrap=isinstance(part, str | Text))

    def report(self, report: Report, bundle: Path) -> None:
        """Print the table that a compile ends with."""
        if self.json or self.quiet:
            return
        from tokcc.report.terminal import print_report

        print_report(report, bundle=bundle, console=self._out)

    def plain(self, text: str) -> None:
        """Print text exactly as it is: what another program may read, with ``--quiet`` too."""
        if not self.json:
            self._out.print(Text(text), soft_wrap=True)

    def write(self, text: str) -> None:
        """Print a piece of text at once and exactly as it is, with ``--quiet`` too."""
        if self.json or not text:
            return
        encoding = getattr(self._stdout, "encoding", None) or "utf-8"
        self._stdout.write(text.encode(encoding, "replace").decode(encoding))
        self._stdout.flush()

    def data(self, value: Any) -> None:
        """Set the result for programs; under ``--json`` it is printed when the command ends."""
        self._data = value

    def note(self, text: str) -> None:
        """Print a remark that is not part of the result."""
        if not self.quiet:
            self._err.print(Text(text), soft_wrap=True)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Turn every way in which a command can fail into a message and an exit code."""
        try:
            # What libraries print on the way (the ONNX exporter does) is not the result.
            with redirect_stdout(sys.stderr):
                yield
        except TokccError as error:
            self.error(error)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt:
            self._err.print("interrupted; nothing half-written is left behind")
            raise typer.Exit(_INTERRUPTED) from None
        except BrokenPipeError:
            raise  # the reader has gone (`tokcc presets | head`): typer ends quietly
        except Exception as error:  # the outermost frame: a defect of tokcc or of a library
            if isinstance(error, typer.Exit):
                raise
            self._crash(error)
            raise typer.Exit(_CRASHED) from error
        finally:
            if self.json and self._data is not None:
                self._stdout.write(json.dumps(self._data, indent=2, ensure_ascii=False) + "\n")

    def error(self, error: TokccError) -> None:
        """Print an error that a user can act on."""
        text = Text(f"error[{type(error).__name__}]", style="bold red").append(f": {error.what}", style="bold")
        for key, value in error.details().items():
            text.append(f"\n  {key:<7} ", style="cyan").append(value.replace("\n", "\n" + " " * 10), style="not bold")
        self._err.print(text, soft_wrap=True)
        if self.verbose:
            self._err.print(Text("".join(traceback.format_exception(error))), soft_wrap=True)
        self._failed(type(error).__name__, error.what, error.exit_code, error.details())

    def _crash(self, error: Exception) -> None:
        name = type(error).__name__
        text = Text("tokcc crashed", style="bold red").append(f": {name}: {error}", style="not bold")
        text.append("\n  this is a defect of tokcc or of a library under it, not of your input", style="not bold")
        if self.verbose:
            text.append("\n\n" + "".join(traceback.format_exception(error)), style="not bold")
        else:
            text.append("\n  run it again with --verbose for the traceback", style="not bold")
        self._err.print(text, soft_wrap=True)
        self._failed("Crash", f"{name}: {error}", _CRASHED, {})

    def _failed(self, kind: str, what: str, exit_code: int, details: Mapping[str, str]) -> None:
        so_far = self._data if isinstance(self._data, dict) else {}
        self._data = {**so_far, "error": {"type": kind, "what": what, **details, "exit_code": exit_code}}
