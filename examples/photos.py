"""Photos for calibration and for the pictures of the report.

python examples/photos.py --out photos/            # 5 well-known photos out of scikit-image's wheel
python examples/photos.py --out photos/ --imagenet # and 20 ImageNet photos out of foolbox's wheel

`tokcc compile ... --calib photos/` takes such a folder.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a plain file

from examples.assets import IMAGENET_PHOTOS, SKIMAGE_PHOTOS, AssetError, locate


def write_photos(folder: Path, *, imagenet: bool = False) -> list[Path]:
    """Copy the photos into ``folder`` and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for asset in (SKIMAGE_PHOTOS, IMAGENET_PHOTOS) if imagenet else (SKIMAGE_PHOTOS,):
        for source in locate(asset):
            written.append(folder / source.name)
            shutil.copyfile(source, written[-1])
    return written


def imagenet_label(path: Path) -> int:
    """The ImageNet class index in the name of one of foolbox's photos."""
    return int(path.stem.rsplit("_", 1)[1])


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="write photos for calibration into a folder")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--imagenet", action="store_true", help="also the 20 labelled ImageNet photos of foolbox")
    options = parser.parse_args()
    try:
        written = write_photos(options.out, imagenet=options.imagenet)
    except AssetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {len(written)} photos to {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
