"""The demo: a real image encoder, real photos, one policy, one `tokcc compile`. About two minutes on two cores.

    python examples/demo.py            # what `make demo` runs
    python examples/demo.py --policy examples/policies/evit.yaml
    python examples/demo.py --prepare  # write the inputs, print the command, do not run it

Everything lands in ``demo/``: the model, the policy, the photos, and in ``demo/out/`` the bundle with its report.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a plain file

from examples import image_encoder, photos
from examples.assets import ROOT, AssetError

POLICY = ROOT / "examples" / "policies" / "tome.yaml"


def prepare(folder: Path, policy: Path) -> list[str]:
    """Write model, policy and photos, and return the arguments of the compile command."""
    model, copied, images = folder / "model.pt", folder / "policy.yaml", folder / "photos"
    if not model.is_file():
        # Under another name first: a run that is interrupted leaves no half model that the next run would take.
        unfinished = folder / "model.unfinished.pt"
        image_encoder.save(unfinished)
        unfinished.replace(model)
    shutil.copyfile(policy, copied)
    photos.write_photos(images, imagenet=True)
    paths = {"--policy": copied, "--calib": images, "-o": folder / "out"}
    options = [part for flag, path in paths.items() for part in (flag, str(path))]
    return ["compile", str(model), *options, "--force"]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="compile a real image encoder with real photos")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder to write (default: demo)")
    parser.add_argument("--policy", type=Path, default=POLICY)
    parser.add_argument("--prepare", action="store_true", help="only write the inputs")
    options = parser.parse_args()
    try:
        arguments = prepare(options.out, options.policy)
    except (AssetError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"$ tokcc {shlex.join(arguments)}", flush=True)
    if options.prepare:
        return 0
    # `-m`, so that it is the tokcc of this interpreter and not another one on the path.
    return subprocess.run([sys.executable, "-m", "tokcc", *arguments], check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
