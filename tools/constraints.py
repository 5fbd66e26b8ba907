"""Write constraints.txt: the exact versions of what the extras need here, installed or not, without machine paths.

python tools/constraints.py
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("cpu", "hf", "report", "gguf", "openvino", "triton", "tensorrt", "dev")
HEAD = """\
# Exact versions that the tests pass with; written by tools/constraints.py.
# pip install -c constraints.txt -e ".[cpu,hf,report,openvino,triton,tensorrt,dev]"
"""


def canonical(name: str) -> str:
    """Return a distribution's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def missing() -> dict[str, str]:
    """Return what pip would install for the extras, by name."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--no-build-isolation", "--report", "-"]
    done = subprocess.run(
        [*command, "-e", f"{ROOT}[{','.join(EXTRAS)}]"], check=True, stdout=subprocess.PIPE, text=True
    )
    items = [item["metadata"] for item in json.loads(done.stdout)["install"]]
    return {canonical(item["name"]): item["version"] for item in items}


def needed(name: str, extras: tuple[str, ...], seen: dict[str, str]) -> None:
    """Collect the installed distributions that ``name`` needs, with their versions."""
    for requirement in metadata.requires(name) or ():
        text, _, marker = requirement.partition(";")
        wanted = re.search(r"extra\s*==\s*['\"]([^'\"]+)", marker)
        match = re.match(r"\s*([A-Za-z0-9._-]+)", text)
        if match is None or (wanted is not None and wanted[1] not in extras):
            continue
        child = canonical(match[1])
        if child in seen:
            continue
        try:
            version = metadata.version(child)
        except metadata.PackageNotFoundError:  # for another platform, or not installed yet: see `missing`
            continue
        seen[child] = version
        inner = re.search(r"\[([^\]]*)\]", text)
        needed(child, tuple(part.strip() for part in inner[1].split(",")) if inner else (), seen)


def main() -> None:
    """Write the file."""
    versions: dict[str, str] = {}
    needed("tokcc", EXTRAS, versions)
    versions |= missing()
    versions.pop("tokcc", None)
    # A local label names a build (+cpu), not a version; the plain version matches every build.
    lines = [f"{name}=={version.partition('+')[0]}\n" for name, version in sorted(versions.items())]
    (ROOT / "constraints.txt").write_text(HEAD + "".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
