"""Replacing a folder or a file so that a reader sees the old one or the new one, never half of either."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path

from tokcc.errors import OutputError

__all__ = ["replace_file", "replace_folder"]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def replace_file(target: Path, content: bytes) -> None:
    """Write a file, whole or not at all; its folder is made where it is missing.

    Args:
        target: Where it goes; an existing file is replaced.
        content: What it holds then.

    Raises:
        OutputError: It cannot be written.
    """
    unfinished = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            unfinished.write_bytes(content)
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{target} cannot be written", found=error.strerror or str(error)) from error


def replace_folder(new: Path, target: Path, aside: Path) -> bool:
    """Move ``new`` to ``target``; what was at ``target`` ends up at ``new`` or ``aside``.

    Args:
        new: The finished folder, in the same file system as ``target``.
        target: Where it goes; an existing folder is replaced.
        aside: A free name beside ``target`` for systems that cannot swap two folders.

    Returns:
        Whether a previous folder is left over, at ``new`` or ``aside``, for the caller to remove.
    """
    if not target.exists():
        new.rename(target)
        return False
    if _exchange(new, target):
        return True
    target.rename(aside)
    try:
        new.rename(target)
    except BaseException:
        if not target.exists():
            aside.rename(target)
        raise
    return True


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step; False where the system or file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), str(second))
