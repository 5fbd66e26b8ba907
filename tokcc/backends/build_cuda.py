"""Compile ``model.pt2`` beside this file for the GPU of this machine.

    python build_cuda.py [model.cuda.aoti.pt2]

Needs a CUDA build of the torch version that wrote the file. Where the program has Triton kernels, tokcc and triton are
needed here, too; the package that is made needs neither.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

SETTINGS = "inductor.json"
"""Where the archive has Inductor's options."""


def settings_text(settings: dict[str, Any]) -> str:
    """Return Inductor's options as text."""
    return json.dumps(settings)


def main() -> int:
    """Compile, run once and compare with the program itself."""
    import torch
    from torch._inductor import aoti_compile_and_package, aoti_load_package
    from torch.export.passes import move_to_device_pass

    if not torch.cuda.is_available():
        print("torch sees no CUDA device here", file=sys.stderr)
        return 1
    try:
        from tokcc.kernels.decompositions import triton_forms

        triton_forms()  # registers them
    except ImportError:
        print("tokcc is not installed: fine, unless the program has Triton kernels", file=sys.stderr)
    extra = {SETTINGS: ""}
    program = torch.export.load(Path(__file__).with_name("model.pt2"), extra_files=extra)
    program = move_to_device_pass(program, "cuda")
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "model.cuda.aoti.pt2").resolve()
    aoti_compile_and_package(program, package_path=str(target), inductor_configs=json.loads(extra[SETTINGS] or "{}"))
    assert program.example_inputs is not None
    feeds = {name: value.cuda() for name, value in program.example_inputs[1].items()}
    with torch.no_grad():
        wanted, found = program.module()(**feeds), aoti_load_package(str(target))(**feeds)
    for name, value in wanted.items():
        difference = (found[name].double() - value.double()).abs().max().item() if value.numel() else 0.0
        print(f"{name}: largest difference from the program as it is {difference:.3g}")
    print(f"wrote {target}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
