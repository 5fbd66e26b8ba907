"""Which C++ compiler the aoti backend uses. Nothing here needs torch."""

from __future__ import annotations

import os
import shutil

__all__ = ["CXX_HELP", "cxx_compiler", "cxx_missing"]

CXX_HELP = "install g++ (Debian and Ubuntu: apt install g++) or clang++, or let CXX name another compiler"


def cxx_compiler() -> str | None:
    """Return the compiler's name or path, or None where there is none."""
    given = os.environ.get("CXX")
    names = [given] if given else ["g++", "clang++"]
    return next((name for name in names if shutil.which(name)), None)


def cxx_missing() -> str:
    """Say what was looked for."""
    given = os.environ.get("CXX")
    return f"no C++ compiler: CXX={given} is not there" if given else "no C++ compiler (g++ or clang++) on the PATH"
