"""Progress of long steps: bars on a terminal, plain lines elsewhere, nothing for library calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars

__all__ = ["Advance", "Progress", "rich_progress", "silent"]

Advance = Callable[[int], None]
"""Reports that so many more units of a stage are done."""

# A log should show that a long stage is alive without filling up.
_SECONDS_BETWEEN_LINES = 10.0


class Progress(Protocol):
    """Receives the stages of a long job."""

    def stage(self, name: str, total: int | None = None) -> AbstractContextManager[Advance]:
        """Open a stage.

        Args:
            name: What is going on, for people.
            total: How many units of work there are, if that is known.

        Returns:
            A context manager that gives a function to call with the units done since the last call.
        """
        ...


class _Silent:
    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Advance]:
        """Show nothing."""
        yield lambda units: None


class _Lines:
    """One line when a stage begins, one when it ends, and one now and then between."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Advance]:
        """Print lines."""
        start = shown = time.monotonic()
        done = 0

        def advance(units: int) -> None:
            nonlocal done, shown
            done += units
            now = time.monotonic()
            if now - shown >= _SECONDS_BETWEEN_LINES:
                shown = now
                self._print(f"{name}: {done}/{total}" if total else f"{name}: {done}")

        self._print(f"{name} ...")
        try:
            yield advance
        except BaseException:
            self._print(f"{name}: stopped after {time.monotonic() - start:.1f} s")
            raise
        self._print(f"{name}: {time.monotonic() - start:.1f} s")

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class _Terminal:
    """A bar for each stage; stages inside a stage share the display."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: Bars | None = None

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Advance]:
        """Show a bar, or a spinner where the amount of work is not known."""
        with self._display() as bars:
            task = bars.add_task(name, total=total)
            yield lambda units: bars.advance(task, units)
            if total is None:
                bars.update(task, total=1, completed=1)

    @contextmanager
    def _display(self) -> Iterator[Bars]:
        if self._bars is not None:
            yield self._bars
            return
        from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        columns = (
            SpinnerColumn(finished_text="[green]✓[/green]"),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with RichProgress(*columns, console=self._console) as bars:
            self._bars = bars
            try:
                yield bars
            finally:
                self._bars = None


def silent() -> Progress:
    """Return a progress that shows nothing."""
    return _Silent()


def rich_progress(console: Console | None = None) -> Progress:
    """Return a progress for people: bars where ``console`` is a terminal, plain lines elsewhere.

    Args:
        console: Where to show it; standard error by default.
    """
    if console is None:
        from rich.console import Console

        console = Console(stderr=True)
    return _Terminal(console) if console.is_terminal else _Lines(console)
