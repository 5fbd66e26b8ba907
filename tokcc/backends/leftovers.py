"""Temporary folders that say whose they are, so that those of killed processes can be removed."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path

__all__ = ["make_temporary", "remove_leftovers"]


def make_temporary(target: Path) -> Path:
    """Make a hidden folder beside ``target``, named after it and this process."""
    return Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-{_world() or 'x'}-{os.getpid()}-", dir=target.parent))


def remove_leftovers(target: Path) -> None:
    """Remove temporary folders beside ``target`` whose process is dead.

    Only those of this machine, boot and process namespace: a number says nothing about processes elsewhere, which may
    share the folder. Where these cannot be told apart, everything stays.
    """
    world = _world()
    if world is None or not os.access(target.parent, os.R_OK):
        return
    name = re.compile(rf"\.{re.escape(target.name)}\.tmp-{world}-(\d{{1,9}})-\w+")
    for folder in target.parent.iterdir():
        found = name.fullmatch(folder.name)
        if found and folder.is_dir() and not folder.is_symlink() and not _alive(int(found[1])):
            shutil.rmtree(folder, ignore_errors=True)


def _world() -> str | None:
    """Return what the numbers of processes are relative to, in short; None where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        return None
    return hashlib.sha256(f"{os.uname().nodename} {boot} {namespace}".encode()).hexdigest()[:12]


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
