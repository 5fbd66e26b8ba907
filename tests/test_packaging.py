"""Everything that is written ends up in a wheel, under the right names."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import tokcc

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"tokcc": "tokcc", "passes": "tokcc/passes", "kernels": "tokcc/kernels", "plugins_trt": "tokcc/plugins_trt"}
DATA = (".yaml", ".typed", ".html", ".css", ".js", ".j2", ".svg")


def sources(root: Path = ROOT) -> list[Path]:
    files = [path for folder in FOLDERS for path in (root / folder).rglob("*") if "__pycache__" not in path.parts]
    return [path for path in files if path.suffix == ".py" or path.name == "py.typed" or path.suffix in DATA]


def test_every_folder_with_modules_is_a_package() -> None:
    folders = {path.parent for path in sources() if path.suffix == ".py"}
    assert [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_top_level_folders_are_importable_from_elsewhere(tmp_path: Path) -> None:
    code = "import tokcc.passes.methods, tokcc.kernels, tokcc.plugins_trt; print(tokcc.passes.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_version_is_said_once_in_each_place() -> None:
    assert f'version = "{tokcc.__version__}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.slow
def test_the_wheel_holds_every_file(tmp_path: Path) -> None:
    copy = tmp_path / "source"
    for name in (*FOLDERS, "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        # A copy, since building leaves folders behind.
        copy.mkdir(exist_ok=True)
        subprocess.run(["cp", "-r", str(ROOT / name), str(copy / name)], check=True)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "-q",
        "-w",
        str(tmp_path / "dist"),
    ]
    subprocess.run([*build, str(copy)], check=True, stderr=subprocess.DEVNULL)
    (wheel,) = (tmp_path / "dist").glob("tokcc-*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = set()
    for path in sources(copy):
        folder, *rest = path.relative_to(copy).parts
        wanted.add("/".join((FOLDERS[folder], *rest)))
    assert wanted - held == set()
