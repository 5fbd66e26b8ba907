"""``manifest.json``: what a bundle holds, which versions wrote it, and the hash of every file."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from tokcc.errors import UsageError

__all__ = [
    "MANIFEST",
    "BackendEntry",
    "FieldEntry",
    "FileEntry",
    "Manifest",
    "Media",
    "PartEntry",
    "State",
    "TensorContract",
    "hash_files",
]

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
        doc: What it holds, where the policy added the input.
        unguided: What to feed to such an input, in all places, where the method is not to be guided.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    doc: str | None = None
    unguided: float | None = None

    def __str__(self) -> str:
        return f"{self.name}={self.dtype}[{', '.join(map(str, self.shape))}]"


class BackendEntry(_Frozen):
    """One engine.

    Attributes:
        engine: The file to load, relative to the bundle.
        details: What a user may want to know, such as the opset.
    """

    engine: InBundle
    details: dict[str, str | int | float | bool] = Field(default_factory=dict)


class PartEntry(_Frozen):
    """One of several engines that work together.

    Attributes:
        folder: Where its report, reference and applied policy are.
        inputs: As of :class:`Manifest`.
        outputs: The same.
        ranges: The same.
        backends: The same.
    """

    folder: InBundle
    inputs: tuple[TensorContract, ...] = ()
    outputs: tuple[TensorContract, ...] = ()
    ranges: dict[str, tuple[int, int | None]] = Field(default_factory=dict)
    backends: dict[str, BackendEntry] = Field(default_factory=dict)


class FieldEntry(_Frozen):
    """A field of a file that runtimes read, and what it has to be for this engine."""

    file: InBundle
    field: str
    value: int | str


class Media(_Frozen):
    """How images or sounds come into a prompt.

    Attributes:
        task: What the model does.
        family: Its family.
        part: The part that encodes them.
        input: Its main input.
        output: Its features ``[n, tokens, H]``.
        index: Its output that says which of the `stock_tokens` they are, int64 ``[n, tokens]``, if there is one.
        token_id: The placeholder in prompts.
        unit: What n counts: ``image``, ``tile`` or ``sound``.
        stock_tokens: Placeholders of a unit as the model was made.
        tokens: Placeholders of a unit that this engine wants.
        positions: ``rows`` = one number a token, ``grid`` = frame, row and column.
        assign: Its output int64 ``[n, stock_tokens]``, which feature each of them reads, where the decoder attends to
            merged tokens one by one: prompts then have all of the placeholders.
        masks: Inputs of the decoder that say which of its tokens are placeholders, int64 ``[B, S]``: policies add them.
        valid: Its output bool ``[n, tokens]`` that says which of them are there, where that depends on the image.
        lengths: Its output that says how many rows of a unit count, int64 ``[n]``, where units are padded.
        packing: How units become an image's rows: ``flat`` or ``anyres``.
        pixels: Height and width of the images that an engine for one shape is made for.
        pinpoints: Heights and widths that images are scaled to before they are cut into tiles.
        grid: Frames, rows and columns of a unit's `stock_tokens`, where positions are a grid.
        line_end: File with the row at the end of a line of tiles, if there is one.
        edits: What was changed in the processor's files, so that it writes `tokens` placeholders.
        javascript: What transformers.js needs there instead.
        refusal: Why no field of a stock processor makes it write that number.
    """

    task: str
    family: str
    part: str
    input: str
    output: str
    index: str | None = None
    assign: str | None = None
    masks: tuple[str, ...] = ()
    valid: str | None = None
    lengths: str | None = None
    token_id: int
    unit: str
    stock_tokens: int
    tokens: int
    positions: Literal["rows", "grid"] = "rows"
    packing: Literal["flat", "anyres"] = "flat"
    pixels: tuple[int, int] | None = None
    pinpoints: tuple[tuple[int, int], ...] = ()
    grid: tuple[int, int, int] | None = None
    line_end: InBundle | None = None
    edits: tuple[FieldEntry, ...] = ()
    javascript: tuple[FieldEntry, ...] = ()
    refusal: str | None = None


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
        parts: Engines that work together, by name; then there are no `inputs`, `outputs` and `backends` of the whole.
        media: How images or sounds come into a prompt, for such engines.
        notes: What a caller of several parts should know.
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
    parts: dict[str, PartEntry] = Field(default_factory=dict)
    media: Media | None = None
    notes: tuple[str, ...] = ()
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
