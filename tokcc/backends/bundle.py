"""The bundle: engines, report and manifest in one folder, written all or nothing."""

from __future__ import annotations

import errno
import os
import shutil
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from tokcc.backends.atomic import replace_folder
from tokcc.backends.contract import check_feeds, check_shapes
from tokcc.backends.leftovers import make_temporary, remove_leftovers
from tokcc.backends.manifest import (
    MANIFEST,
    BackendEntry,
    FileEntry,
    Manifest,
    PartEntry,
    State,
    TensorContract,
    hash_files,
)
from tokcc.backends.sessions import AOTI
from tokcc.errors import OutputError, UsageError
from tokcc.report.schema import Report

__all__ = ["BackendEntry", "Bundle", "BundleWriter", "FileEntry", "Manifest", "State", "TensorContract"]

REPORT = "report.json"
_ENDINGS = {"onnx": ".onnx", "aoti": AOTI}
"""Engines that run here, and how their names end."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISK = (*_NO_ROOM, errno.EROFS, errno.EIO)


class Bundle:
    """What a compile wrote.

    Args:
        path: The bundle's folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = Manifest.read(self.path)

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Open an existing bundle.

        Raises:
            UsageError: The folder is no bundle.
        """
        return cls(path)

    def part(self, name: str) -> Bundle:
        """Return one of several engines that work together, as a bundle of its own.

        Raises:
            UsageError: There is no such part.
        """
        entry = self.manifest.parts.get(name)
        if entry is None:
            raise UsageError(
                f"the bundle has no part `{name}`",
                needed=f"one of {', '.join(self.manifest.parts)}"
                if self.manifest.parts
                else "a bundle of several parts",
            )
        return _Part(self, name, entry)

    @property
    def root(self) -> Path:
        """The folder that the engines' paths are relative to."""
        return self.path

    @property
    def baseline(self) -> Path:
        """Where the ONNX engine without reduction is, if it was kept."""
        return self.baseline_of("onnx")

    def baseline_of(self, backend: str) -> Path:
        """Return where the engine without reduction is that a backend made, if it was kept."""
        return self.root / f"baseline{_ENDINGS[backend]}"

    @property
    def runnable(self) -> tuple[str, ...]:
        """The backends whose engines run here, the first one first."""
        entries = self.manifest.backends
        return tuple(n for n, e in _ENDINGS.items() if n in entries and entries[n].engine.endswith(e))

    @property
    def verifiable(self) -> tuple[str, ...]:
        """The backends whose files can be held against the reference here: TensorRT's graph runs on the CPU, too."""
        return (*self.runnable, *(name for name in ("tensorrt",) if name in self.manifest.backends))

    def chosen(self, backend: str | None = None) -> str:
        """Return a backend whose engine runs here: the given one, else the first.

        Raises:
            UsageError: There is no such engine, or it does not run here.
        """
        there = (name for name in _ENDINGS if name in self.manifest.backends)
        name = backend or next(iter(self.runnable), None) or next(there, "onnx")
        path = self.engine(name)
        if name in self.runnable:
            return name
        if name == "aoti":
            raise UsageError(
                "the bundle has no aoti package yet",
                needed="a machine with a GPU to make it on",
                help=f"run `python build_cuda.py` there, in `{path.parent}`, and load what it writes with torch",
            )
        raise UsageError(f"tokcc does not run engines of `{name}`", needed=" or ".join(_ENDINGS))

    def __repr__(self) -> str:
        return f"Bundle({str(self.path)!r}, state={self.manifest.state!r}, backends={sorted(self.manifest.backends)})"

    def engine(self, backend: str) -> Path:
        """Return the file of an engine, such as ``engine("onnx")``.

        Raises:
            UsageError: The bundle has no such engine.
        """
        entry = self.manifest.backends.get(backend)
        if entry is None and self.manifest.parts:
            raise UsageError(
                "the bundle has an engine for each of its parts",
                found=", ".join(self.manifest.parts),
                help=f'choose one: `bundle.part("{next(iter(self.manifest.parts))}").engine("{backend}")`',
            )
        if entry is None:
            raise UsageError(
                f"the bundle has no engine for `{backend}`",
                found=", ".join(sorted(self.manifest.backends)) or "no engine",
                help=f"compile with `--backend {backend}`",
            )
        return self.root / entry.engine

    @cached_property
    def report(self) -> Report:
        """The typed report, equal to ``report.json``.

        Raises:
            UsageError: The bundle has several parts, with a report each.
        """
        if self.manifest.parts:
            raise UsageError(
                "the bundle has a report for each of its parts",
                found=", ".join(self.manifest.parts),
                help=f'choose one: `bundle.part("{next(iter(self.manifest.parts))}").report`',
            )
        return Report.load(self.path / REPORT)

    def run(self, feeds: dict[str, npt.NDArray[Any]], backend: str | None = None) -> dict[str, npt.NDArray[Any]]:
        """Run an engine once on the CPU; a convenience, not a server.

        Args:
            feeds: The inputs by name.
            backend: ``onnx`` or ``aoti``; None = the first that the bundle has.

        Raises:
            UsageError: An input is missing, unknown, of another dtype, or of a shape that the engine was not made for;
                or the engine does not run here.
        """
        name = self.chosen(backend)
        contracts = self.manifest.inputs
        arrays = {key: np.asarray(value) for key, value in feeds.items()}
        if contracts:
            check_feeds(contracts, arrays)
            # Beyond the range of the export an ONNX engine may still be right; a package is not made for it.
            check_shapes(contracts, self.manifest.ranges if name == "aoti" else {}, arrays)
        if name == "aoti":
            found: dict[str, npt.NDArray[Any]] = self._package.run(arrays)
            return found
        session = self._session
        if not contracts:
            check_feeds([TensorContract(name=v.name, dtype="", shape=()) for v in session.get_inputs()], arrays)
        names = [value.name for value in session.get_outputs()]
        return dict(zip(names, session.run(names, arrays), strict=True))

    @cached_property
    def _package(self) -> Any:
        from tokcc.backends.aoti import AotiSession, lacking

        details = self.manifest.backends["aoti"].details
        missing = lacking(str(details.get("isa", "")))
        if missing is not None:
            raise UsageError(
                "the aoti package was compiled for a CPU with more instructions",
                needed=missing,
                found="a CPU without them",
                help="compile it on this machine, or on one like it",
            )
        return AotiSession(self.engine("aoti"))

    @cached_property
    def _session(self) -> Any:
        try:
            import onnxruntime
        except ImportError as error:
            raise UsageError("onnxruntime is not installed", help='pip install "tokcc[cpu]"') from error
        return onnxruntime.InferenceSession(str(self.engine("onnx")), providers=["CPUExecutionProvider"])

    def damage(self) -> dict[str, str]:
        """Return what is wrong with the bundle's files: name -> ``missing``, ``changed`` or ``not in the manifest``."""
        present = hash_files(self.path)
        listed = self.manifest.files
        found = {name: "missing" for name in listed if name not in present}
        found |= {name: "changed" for name, entry in listed.items() if name in present and present[name] != entry}
        return found | {name: "not in the manifest" for name in present if name not in listed}

    def verify(self) -> None:
        """Check every file against its hash.

        Raises:
            OutputError: A file is missing, changed or not listed.
        """
        damage = self.damage()
        if damage:
            name, what = next(iter(damage.items()))
            more = f" and {len(damage) - 1} more" if len(damage) > 1 else ""
            raise OutputError(
                f"the bundle `{self.path}` is damaged",
                needed="the files that the compile wrote",
                found=f"`{name}` is {what}{more}",
                help="compile the model again with --force",
            )


class _Part(Bundle):
    """A part of a bundle: its own report and reference, engines of the whole's folder."""

    def __init__(self, whole: Bundle, name: str, entry: PartEntry) -> None:
        self.path = whole.path / entry.folder
        self._root = whole.path
        own = entry.model_dump(exclude={"folder"})
        self.manifest = whole.manifest.model_copy(
            update={**{key: getattr(entry, key) for key in own}, "parts": {}, "media": None, "files": {}}
        )
        self.name = name

    @property
    def root(self) -> Path:
        return self._root

    def baseline_of(self, backend: str) -> Path:
        engine = self.engine(backend)
        return engine.with_name(f"baseline.{engine.name}")


class BundleWriter:
    """Writes a bundle into a temporary sibling and renames it when all is there.

    Leaving the ``with`` block without ``commit`` (by an error, by Ctrl-C, or on purpose) removes the temporary folder
    and leaves a previous bundle untouched. What a killed process left is removed by the next writer of the same bundle.

    Args:
        output: The bundle's folder.
        force: Replace a bundle that is already there.
        base: Start from the files of an existing bundle, to change some of them.
    """

    def __init__(self, output: str | Path, *, force: bool = False, base: Bundle | None = None) -> None:
        self.output = Path(output)
        self._force = force
        self._base = base
        # A link to a bundle stays a link: what it points to is replaced.
        self._target = Path(os.path.realpath(output))
        self._temporary: Path | None = None
        self._made_parents: list[Path] = []

    @property
    def path(self) -> Path:
        """The temporary folder to write into."""
        if self._temporary is None:
            raise RuntimeError("the bundle writer is not open")
        return self._temporary

    def __enter__(self) -> Self:
        self._refuse_existing()
        try:
            self._make_temporary()
            if self._base is not None:
                shutil.copytree(self._base.path, self.path, dirs_exist_ok=True)
        except OSError as error:
            self._discard()
            raise self._output_error(error) from error
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._temporary is None:
            return
        temporary = self.path
        self._discard()
        if error is not None and _is_disk_error(error, temporary):
            raise self._output_error(error) from error

    def commit(self, manifest: Manifest) -> Bundle:
        """Hash the files, write the manifest and put the bundle in its place.

        Args:
            manifest: The manifest; its ``files`` are filled in here.

        Raises:
            OutputError: The disk refuses.
        """
        new = self.path
        try:
            manifest.model_copy(update={"files": hash_files(new, flush=True)}).save(new)
            aside = new.with_name(new.name.replace(".tmp-", ".tmp-old-"))
            replace_folder(new, self._target, aside)
        except OSError as error:
            raise self._output_error(error) from error
        self._temporary, self._made_parents = None, []
        # The bundle is complete here: a previous one that cannot be removed is only a waste of space.
        for left_over in (new, aside):
            shutil.rmtree(left_over, ignore_errors=True)
        return Bundle(self.output)

    def _refuse_existing(self) -> None:
        target = self._target
        if not target.exists():
            return
        if not target.is_dir():
            raise UsageError(f"the output `{self.output}` is a file", needed="a folder", help="choose another --output")
        if not any(target.iterdir()):
            return
        if not (target / MANIFEST).is_file():
            raise UsageError(
                f"the output `{self.output}` is a folder with other things in it",
                needed="a new or empty folder, or an earlier bundle",
                help="choose another --output; --force replaces bundles only",
            )
        if not self._force:
            raise UsageError(f"the output `{self.output}` exists", help="pass --force to replace the bundle")

    def _make_temporary(self) -> None:
        parent = self._target.parent
        for folder in (parent, *parent.parents):
            if folder.is_dir():
                break
            if folder.exists():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
            self._made_parents.append(folder)
        parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self._target)
        self._temporary = make_temporary(self._target)
        mask = os.umask(0)
        os.umask(mask)
        self._temporary.chmod(0o777 & ~mask)

    def _discard(self) -> None:
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary = None
        for folder in self._made_parents:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        self._made_parents = []

    def _output_error(self, error: BaseException) -> OutputError:
        code = error.errno if isinstance(error, OSError) else errno.ENOSPC
        hint = "choose a folder that you may write to"
        if code in _NO_ROOM:
            hint = "free some space, or choose an --output on another disk"
        elif code in (errno.EBUSY, errno.EXDEV):
            hint = "choose a folder inside the mount point instead of the mount point itself"
        found = (error.strerror if isinstance(error, OSError) else None) or str(error)
        return OutputError(f"cannot write the bundle `{self.output}`", found=found, help=hint)


def _is_disk_error(error: BaseException, folder: Path) -> bool:
    """Tell a full or broken disk from other errors; writers in C++ wrap it in errors of their own."""
    if isinstance(error, OSError):
        inside = any(
            isinstance(name, str | bytes) and Path(os.fsdecode(name)).is_relative_to(folder)
            for name in (error.filename, error.filename2)
        )
        return inside or error.errno in _DISK
    return isinstance(error, Exception) and os.strerror(errno.ENOSPC) in str(error)
