"""Tell what a model file is from its content, without running any of it."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from tokcc.capture.pickle_guard import PickleContent, scan_bytes, scan_stream
from tokcc.errors import LoadError

__all__ = ["FileKind", "ModelFile", "identify"]


class FileKind(Enum):
    """The kinds of file that tokcc can load."""

    EXPORTED = "torch.export archive"
    PICKLED = "pickle"


@dataclass(frozen=True)
class ModelFile:
    """A file and what it is; ``content`` describes a pickle."""

    path: Path
    kind: FileKind
    content: PickleContent | None = None


_ENGINE = "tokcc starts from the torch model, before it is exported or compiled; give that instead"
_WEIGHTS = (
    "weights alone do not say what to compute: write a factory that builds the module and loads them, "
    "and give `model.py:factory`, or save torch.export.export(model, inputs) with torch.export.save"
)
_SCRIPT = (
    "TorchScript has no torch.export graph: build the model in Python and give `model.py:factory`, "
    "or save torch.export.export(model, inputs) with torch.export.save"
)
_HEAD = 64


def identify(path: Path) -> ModelFile:
    """Say which kind of loadable model ``path`` is.

    Raises:
        LoadError: It is none, with what it is instead and what to do.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(_HEAD)
    except OSError as error:
        raise LoadError(f"cannot read {path}", found=error.strerror or str(error)) from error
    if size == 0:
        raise LoadError(
            f"{path} is empty", needed="a model file", found="0 bytes", help="was the download or the save cut off?"
        )
    if head.startswith(b"PK\x03\x04"):
        return _identify_zip(path)
    if head.startswith(b"PK"):
        raise LoadError(f"{path} is a zip archive without content", help="save the model again")
    _refuse_known(path, head, size)
    with path.open("rb") as stream:
        content = scan_stream(stream)
    if content is not None:
        return _pickle(path, content)
    if head[:1] == b"\x80":
        raise LoadError(
            f"{path} is a truncated or damaged pickle",
            found=f"{size} bytes, no complete object",
            help="download or save it again",
        )
    if path.suffix == ".py":
        raise LoadError(
            f"{path} is Python source",
            needed="the function that makes the model",
            help=f"write {path}:FUNCTION",
        )
    raise LoadError(
        f"{path} is not a model file that tokcc knows",
        needed="a torch.export archive (.pt2), a pickled nn.Module, `file.py:factory`, or a Hugging Face folder",
        found=f"{size} bytes starting with {head[:8]!r}",
    )


def _identify_zip(path: Path) -> ModelFile:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            # torch puts everything under one folder named after the file.
            inner = {name.partition("/")[2] for name in names} | set(names)
            pickles = [name for name in names if name.endswith("/data.pkl") or name == "data.pkl"]
            pickle = archive.read(pickles[0]) if len(pickles) == 1 else None
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise LoadError(
            f"{path} is a truncated or damaged archive", found=str(error), help="download or save it again"
        ) from error
    if any(name.startswith("models/") for name in inner) or "serialized_exported_program.json" in inner:
        return ModelFile(path, FileKind.EXPORTED)
    if any(name.startswith("data/aotinductor/") for name in inner):
        raise LoadError(f"{path} is an AOTInductor package: already compiled", help=_ENGINE)
    if "archive_format" in inner:
        raise LoadError(
            f"{path} is a torch.export archive without a program",
            needed="models/model.json in it",
            found=f"{len(names)} entries",
            help="save it again with torch.export.save(program, path)",
        )
    if "constants.pkl" in inner:
        raise LoadError(f"{path} is a TorchScript archive", found="code/ and constants.pkl in it", help=_SCRIPT)
    if pickle is not None:
        content = scan_bytes(pickle)
        if content is None:
            raise LoadError(f"{path} holds a damaged pickle", help="download or save it again")
        return _pickle(path, content)
    raise LoadError(
        f"{path} is a zip archive, but not one of torch's",
        needed="a torch.export archive or a file of torch.save",
        found=", ".join(names[:4]) or "no entries",
    )


def _pickle(path: Path, content: PickleContent) -> ModelFile:
    if content.is_plain:
        raise LoadError(f"{path} holds weights only", found="a state_dict or checkpoint, no module", help=_WEIGHTS)
    return ModelFile(path, FileKind.PICKLED, content)


def _refuse_known(path: Path, head: bytes, size: int) -> None:
    """Refuse formats that people mistake for models that can be compiled."""
    if _is_onnx(path, head):
        raise LoadError(f"{path} is ONNX: already exported", needed="the torch model", help=_ENGINE)
    if head[:4] == b"GGUF":
        raise LoadError(
            f"{path} is a GGUF file",
            needed="an encoder, or a torch.export archive",
            found="GGUF holds decoder weights, which this version does not load by itself",
            help="build the model in Python (transformers reads GGUF with gguf_file=...) and give `model.py:factory`",
        )
    if head[:8] == b"\x89HDF\r\n\x1a\n":
        raise LoadError(f"{path} is HDF5 (Keras)", needed="a torch model")
    if head[4:8] == b"TFL3":
        raise LoadError(f"{path} is a TensorFlow Lite model: already exported", help=_ENGINE)
    if head[4:6] == b"ET" and head[6:8].isdigit():
        raise LoadError(f"{path} is an ExecuTorch program: already compiled", help=_ENGINE)
    if _is_safetensors(head, size):
        raise LoadError(
            f"{path} holds weights only",
            found="safetensors, no module",
            help="give the folder with config.json if it is a Hugging Face model; otherwise " + _WEIGHTS,
        )


def _is_onnx(path: Path, head: bytes) -> bool:
    # ModelProto: field 1 (ir_version) as a small varint, then one of the string or message fields.
    looks = len(head) > 2 and head[0] == 0x08 and head[1] < 0x40 and head[2] in b"\x12\x1a\x22\x2a\x32\x3a\x42"
    return looks or path.suffix == ".onnx"


def _is_safetensors(head: bytes, size: int) -> bool:
    length = int.from_bytes(head[:8], "little")
    return len(head) > 8 and head[8:9] == b"{" and 0 < length <= size - 8
