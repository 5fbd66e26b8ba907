"""``manifest.json``: what a bundle holds, which versions wrote it, and the hash of every file."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from tokcc.errors import UsageError

__all__ = ["MANIFEST", "BackendEntry", "FileEntry", "Manifest", "State", "TensorContract", "hash_files"]

MANIFEST = "manifest.json"

State = Literal["ok", "accuracy_gate_missed", "speed_gate_missed"]


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"`{name}` is not a path inside the bundle")
    return name


InBundle = Annotated[str, AfterValidator(_inside)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorContract(_Frozen):
    """An input or output of the engine.

    Attributes:
        name: As in the original export.
        dtype: numpy's name, such as ``float32``.
        shape: A number, or a symbol for a dynamic axis.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class BackendEntry(_Frozen):
    """One engine.

    Attributes:
        engine: The file to load, relative to the bundle.
        details: What a user may want to know, such as the opset.
    """

    engine: InBundle
    details: dict[str, str | int | float | bool] = Field(default_factory=dict)


class FileEntry(_Frozen):
    """A file's identity."""

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0)]


class Manifest(_Frozen):
    """The contents of a bundle.

    Attributes:
        manifest_version: The version of this format.
        tokcc: The version that wrote the bundle.
        created: UTC, ISO 8601.
        model: What was compiled.
        policy: The policy's name.
        state: Whether a gate was missed.
        inputs: What the engines take, in order.
        outputs: What the engines give, in order.
        ranges: Smallest and largest value of each symbol in the shapes; None = unbounded.
        backends: The engines.
        versions: Of the packages that took part.
        files: Every file but the manifest itself.
    """

    manifest_version: Literal[1] = 1
    tokcc: str
    created: str
    model: str
    policy: str
    state: State = "ok"
    inputs: tuple[TensorContract, ...] = ()
    outputs: tuple[TensorContract, ...] = ()
    ranges: dict[str, tuple[int, int | None]] = Field(default_factory=dict)
    backends: dict[str, BackendEntry] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    files: dict[InBundle, FileEntry] = Field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of a bundle.

        Raises:
            UsageError: The folder is no bundle, or one that this version cannot read.
        """
        path = folder / MANIFEST
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            found = f"no `{MANIFEST}` in it" if folder.is_dir() else "no such folder"
            raise UsageError(
                f"`{folder}` is not a tokcc bundle", found=found, help="give the folder that `tokcc compile -o` wrote"
            ) from error
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise UsageError(
                f"`{folder}` has a manifest that this tokcc cannot read",
                found=f"{where}: {first['msg']}" if where else first["msg"],
                help="compile the model again, or use the tokcc that wrote the bundle",
            ) from error

    def save(self, folder: Path) -> None:
        """Write the manifest into a bundle's folder."""
        path = folder / MANIFEST
        path.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


def hash_files(folder: Path, *, flush: bool = False) -> dict[str, FileEntry]:
    """Return the entries of all files of a bundle but the manifest.

    Args:
        folder: The bundle.
        flush: Also ask the system to put each file on the disk.
    """
    entries = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or name == MANIFEST:
            continue
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if flush:
                os.fsync(file.fileno())
            entries[name] = FileEntry(sha256=digest, bytes=os.fstat(file.fileno()).st_size)
    return entries
