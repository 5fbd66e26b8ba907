"""Look into pickles without running them.

Unpickling runs code that the file chooses. Everything here only reads opcodes: which classes and functions a pickle
would import, and whether it holds a module or merely weights.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections import deque
from dataclasses import dataclass
from typing import IO

import torch

__all__ = ["PickleContent", "scan_bytes", "scan_stream"]

_LIMIT = 512 * 1024 * 1024  # a pickle keeps its tensors outside of itself; more than this is not one of torch's
_LEGACY_FOLLOWERS = 4  # torch's old format: magic number, then version, system info, object, storage keys
_MODULE_MARKS = {"_parameters", "_modules"}
_MODULE_GLOBALS = {
    ("torch.fx.graph_module", "reduce_graph_module"),
    ("torch.fx.graph_module", "reduce_package_graph_module"),
}
_STRINGS = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE", "STRING", "BINSTRING", "SHORT_BINSTRING"}
_STORES = {"PUT", "BINPUT", "LONG_BINPUT"}
_FETCHES = {"GET", "BINGET", "LONG_BINGET"}
_UNKNOWN = ("?", "?")

_HARMLESS = {
    "builtins": {"set", "frozenset", "dict", "list", "tuple", "int", "float", "bool", "complex", "bytearray", "slice"},
    "collections": {"OrderedDict", "defaultdict"},
    "_codecs": {"encode"},
    "torch": {"Size", "device"},
    "torch.nn.parameter": {"Parameter"},
    "torch.serialization": {"_get_layout"},
    "torch.storage": {"UntypedStorage", "TypedStorage"},
    "torch._utils": {
        "_rebuild_tensor",
        "_rebuild_tensor_v2",
        "_rebuild_tensor_v3",
        "_rebuild_parameter",
        "_rebuild_parameter_with_state",
        "_rebuild_qtensor",
        "_rebuild_sparse_tensor",
        "_rebuild_meta_tensor_no_storage",
    },
}


@dataclass(frozen=True)
class PickleContent:
    """What a pickle would make.

    Attributes:
        imports: The classes and functions ("module.name") it imports beyond what tensors and plain containers need.
        is_module: It has the marks of an `nn.Module`.
    """

    imports: tuple[str, ...]
    is_module: bool

    @property
    def is_plain(self) -> bool:
        """Whether it holds tensors and plain containers only."""
        return not self.imports and not self.is_module


def scan_bytes(data: bytes) -> PickleContent | None:
    """Scan a pickle, or a torch zip archive that contains one; None when it is neither."""
    if data[:4] == b"PK\x03\x04":
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                pickles = [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
        except zipfile.BadZipFile:
            return None
        contents = [scan_stream(io.BytesIO(pickle)) for pickle in pickles]
        found = [content for content in contents if content is not None]
        if not found or len(found) != len(contents):
            return None
        imports = tuple(dict.fromkeys(name for content in found for name in content.imports))
        return PickleContent(imports, any(content.is_module for content in found))
    return scan_stream(io.BytesIO(data))


def scan_stream(stream: IO[bytes]) -> PickleContent | None:
    """Scan the pickle at the start of ``stream`` (torch's old format has five in a row); None when there is none."""
    scanner = _Scanner()
    if not scanner.run(stream):
        return None
    if scanner.integers == [torch.serialization.MAGIC_NUMBER]:
        for _ in range(_LEGACY_FOLLOWERS):
            if not scanner.run(stream):
                return None
    return scanner.content()


class _Scanner:
    """Follows the strings of a pickle closely enough to know what STACK_GLOBAL imports.

    Anything but two strings pushed right before it counts as an unknown import, so a pickle cannot hide one.
    """

    def __init__(self) -> None:
        self.globals: dict[tuple[str, str], None] = {}
        self.texts: set[str] = set()
        self.integers: list[int] = []
        self._pushed: deque[str | None] = deque(maxlen=2)  # by the last two opcodes; None = not a string
        self._memo: dict[int, str | None] = {}

    def run(self, stream: IO[bytes]) -> bool:
        """Read one pickle to its end; False when the bytes are not a pickle."""
        start = stream.tell()
        self._pushed.clear()
        self._memo.clear()
        opcodes = 0
        try:
            for opcode, argument, _ in pickletools.genops(stream):
                self._step(opcode.name, argument)
                opcodes += 1
                if stream.tell() - start > _LIMIT:
                    return False
        except (ValueError, OverflowError, MemoryError):
            return False
        return opcodes > 1

    def _step(self, name: str, argument: object) -> None:
        if name in {"PROTO", "FRAME", "STOP"}:
            return
        if name == "MEMOIZE":
            self._memo[len(self._memo)] = self._top()
        elif name in _STORES:
            self._memo[int(str(argument))] = self._top()
        elif name in _FETCHES:
            self._pushed.append(self._memo.get(int(str(argument))))
        elif name in _STRINGS:
            self.texts.add(str(argument))
            self._pushed.append(str(argument))
        else:
            if name in {"GLOBAL", "INST"}:
                module, _, attribute = str(argument).partition(" ")
                self.globals[module, attribute] = None
            elif name == "STACK_GLOBAL":
                self.globals[self._named()] = None
            elif name in {"EXT1", "EXT2", "EXT4"}:
                self.globals["copyreg extension", str(argument)] = None
            elif isinstance(argument, int):
                self.integers.append(argument)
            self._pushed.append(None)

    def _top(self) -> str | None:
        return self._pushed[-1] if self._pushed else None

    def _named(self) -> tuple[str, str]:
        if len(self._pushed) == 2 and self._pushed[0] is not None and self._pushed[1] is not None:
            return self._pushed[0], self._pushed[1]
        return _UNKNOWN

    def content(self) -> PickleContent:
        """Sum up what was seen."""
        beyond = [f"{module}.{name}" for module, name in self.globals if not _is_harmless(module, name)]
        is_module = self.texts >= _MODULE_MARKS or not _MODULE_GLOBALS.isdisjoint(self.globals)
        return PickleContent(tuple(beyond), is_module)


def _is_harmless(module: str, name: str) -> bool:
    module = "builtins" if module == "__builtin__" else module
    if name in _HARMLESS.get(module, ()):
        return True
    if module != "torch" or "." in name:
        return False
    value = getattr(torch, name, None)
    return name.endswith("Storage") or isinstance(value, torch.dtype | torch.layout | torch.memory_format)
