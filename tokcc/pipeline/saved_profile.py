"""What ``tokcc profile`` measures, as a file."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

from tokcc.backends.atomic import replace_file
from tokcc.errors import UsageError

__all__ = ["SavedProfile"]


class SavedProfile:
    """Numbers of a model that policies name: a frozen dataclass."""

    suffix: ClassVar[str | None] = None
    """How the file's name has to end; None = in any way."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    def summary(self) -> str:
        """Return what to say of it in one line."""
        raise NotImplementedError

    def content(self) -> bytes:
        """Return the file."""
        raise NotImplementedError

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all.

        Raises:
            UsageError: It is no name for such a file.
            OutputError: It cannot be written.
        """
        if self.suffix not in (None, Path(path).suffix):
            raise UsageError(
                "the profile of this model is a file of another kind",
                needed=f"a name that ends in {self.suffix}",
                found=Path(path).name,
                help=f"write `-o {Path(path).stem}{self.suffix}`",
            )
        replace_file(Path(path), self.content())
