"""The most used presets on models of real sizes, as TensorRT users get them: a folder, and engines built from it.

    python benchmarks/tensorrt_real.py                           # everything: about an hour
    python benchmarks/tensorrt_real.py --models vit-s16 --dtypes fp16 --presets tome evit
    python benchmarks/tensorrt_real.py --again failed            # cells that are so in the file

Each cell is one ``tokcc compile ... --backend tensorrt``, whose graph is held against the reduced model in ONNX
Runtime, and then the folder's own ``build_engine.py --rtx``, without a GPU. Engines are built, not run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a plain file

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import tokcc
from benchmarks import vits
from benchmarks.environment import RESULTS, describe, write_results
from examples import assets, text_encoder
from tests.tensorrt.rtx import TARGETS, build
from tokcc.errors import TokccError

NAME = "tensorrt_real"
BATCHES = (1, 4, 8)
DTYPES = ("fp32", "fp16", "bf16")
ENCODERS = ("tome", "pitome", "evit", "visionzip", "power-bert")
DECODERS = ("streaming-llm", "h2o", "snapkv", "tova", "quest")


@dataclass(frozen=True)
class Subject:
    """A model and the shapes that its engine is made for.

    Attributes:
        what: Said of it in the results.
        presets: Tried on it.
        options: Arguments of ``tokcc.compile``.
        layouts: Of caches.
        parameters: Of presets, where their defaults do not suit it.
        shapes: Of presets that are not for all calls.
        kv: Of layouts that want to know more.
    """

    what: str
    presets: tuple[str, ...]
    options: Callable[[], dict[str, Any]]
    layouts: tuple[str | None, ...] = (None,)
    parameters: dict[str, dict[str, Any]] = field(default_factory=dict)
    shapes: dict[str, dict[str, Any]] = field(default_factory=dict)
    kv: dict[tuple[str, str | None], dict[str, Any]] = field(default_factory=dict)


def _vit() -> dict[str, Any]:
    pixels = torch.randn(BATCHES[0] + 1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    return {
        "model": vits.classifier("vit-s"),
        "example_inputs": {"pixel_values": pixels},
        "shapes": {"pixel_values": tuple((batch, 3, 224, 224) for batch in BATCHES)},
    }


def _clip() -> dict[str, Any]:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=16
    )
    pixels = torch.randn(BATCHES[0] + 1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    return {
        "model": CLIPVisionModelWithProjection(config).eval(),
        "example_inputs": {"pixel_values": pixels},
        "shapes": {"pixel_values": tuple((batch, 3, 224, 224) for batch in BATCHES)},
    }


class _FirstToken(nn.Module):
    """BERT as a classifier reads it."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden[:, 0]


def _bert() -> dict[str, Any]:
    model = _FirstToken(text_encoder.build()[0].bert).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (2, 64), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 50:] = 0
    axes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("tokens", min=16, max=256)}
    shapes = tuple((batch, length) for batch, length in zip(BATCHES, (64, 128, 256), strict=True))
    return {
        "model": model,
        "example_inputs": {"input_ids": ids, "attention_mask": mask},
        "dynamic_shapes": {"input_ids": axes, "attention_mask": axes},
        "shapes": {"input_ids": shapes, "attention_mask": shapes},
    }


def _decoder() -> dict[str, Any]:
    (weights,) = assets.locate(assets.LANGUAGE_MODEL)
    return {
        "model": str(weights.parent),
        "task": "text-generation",
        "shapes": {
            "input_ids": ((1, 1), (1, 1), (1, 512)),
            "attention_mask": ((1, 1), (1, 1024), (1, 4096)),
        },
    }


_KEPT = {"tokens": 256}
SUBJECTS = {
    "vit-s16": Subject("ViT-S/16 at 224, random weights", ENCODERS, _vit),
    "clip-vision": Subject("CLIP's ViT-B/16 image tower at 224, random weights", ENCODERS, _clip),
    "bert": Subject(
        "all-MiniLM-L6-v2 (BERT), real weights, its first token, 64 to 256 tokens",
        ENCODERS,
        _bert,
        parameters={"tome": {"r": 8}},
    ),
    "smollm2": Subject(
        "SmolLM2-135M-Instruct, real weights, texts of 1 to 4,096 tokens; snapkv of 1 to 2,048, "
        "quest single tokens in texts of 2,048 and more",
        DECODERS,
        _decoder,
        ("merged", "slots"),
        {"streaming-llm": _KEPT, "h2o": _KEPT, "snapkv": _KEPT, "tova": _KEPT},
        {
            "snapkv": {"input_ids": ((1, 1), (1, 1), (1, 512)), "attention_mask": ((1, 1), (1, 1024), (1, 2048))},
            "quest": {"input_ids": ((1, 1),) * 3, "attention_mask": ((1, 2048), (1, 3072), (1, 4096))},
        },
        {("quest", "slots"): {"tokens": 4096}},
    ),
}
"""Models by name. BERT takes what keeps a share of its tokens."""


def policy_of(subject: Subject, preset: str, layout: str | None) -> dict[str, Any]:
    """Return the policy of a cell."""
    policy = {"version": 1, "name": preset, "steps": [{"preset": preset, **subject.parameters.get(preset, {})}]}
    return policy if layout is None else {**policy, "kv": {"layout": layout, **subject.kv.get((preset, layout), {})}}


def run(subject: Subject, preset: str, layout: str | None, dtype: str) -> dict[str, Any]:
    """Compile and build one cell."""
    with tempfile.TemporaryDirectory(prefix="tensorrt-real-") as name:
        try:
            options = subject.options()
            options["shapes"] = subject.shapes.get(preset, options["shapes"])
            bundle = tokcc.compile(
                **options,
                policy=policy_of(subject, preset, layout),
                dtype=dtype,
                backends=("tensorrt",),
                output=Path(name) / "out",
                calibrate=False,
            )
        except TokccError as error:
            return {"status": "refused", "reason": f"{type(error).__name__}: {error.what}", "help": error.help}
        checks = bundle.report.parity.checks
        made = build(Path(name) / "out" / "tensorrt", timeout=1800)
        worst = max(check.max_abs_diff / max(check.scale, 1e-6) for check in checks)
        if not made["ok"]:
            return {"status": "failed", "max_rel_diff": worst, "reason": made["error"][:400]}
        found = {"status": "built", "max_rel_diff": worst, "build_seconds": made["seconds"]}
        return {**found, "engine_mib": round(made["bytes"] / 2**20, 1), "layers": made["layers"]}


def main() -> int:
    """Run cells and write the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--models", nargs="*", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--presets", nargs="*", choices=[*ENCODERS, *DECODERS], default=[*ENCODERS, *DECODERS])
    parser.add_argument("--dtypes", nargs="*", choices=DTYPES, default=DTYPES)
    parser.add_argument("--again", nargs="*", help="only cells that are so in the file: refused, failed")
    parser.add_argument("--new", action="store_true", help="only cells that are not in the file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    path = RESULTS / f"{NAME}.json"
    cells: dict[str, dict[str, Any]] = json.loads(path.read_text())["cells"] if path.is_file() else {}
    failed = 0
    for dtype in options.dtypes:
        for model in options.models:
            subject = SUBJECTS[model]
            for preset in (preset for preset in subject.presets if preset in options.presets):
                for layout in subject.layouts:
                    key = "/".join(filter(None, (model, preset, layout, dtype)))
                    known = cells.get(key, {}).get("status")
                    if (options.again is not None and known not in options.again) or (options.new and known):
                        continue
                    start = time.perf_counter()
                    cells[key] = run(subject, preset, layout, dtype)
                    failed += cells[key]["status"] == "failed"
                    print(f"{key:40} {time.perf_counter() - start:6.1f} s  {cells[key]}", flush=True)
                    write_results(NAME, _table(cells))
    return int(failed > 0)


def _table(cells: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        "what": "compile --backend tensorrt, its graph against the reduced model in ONNX Runtime (bf16 in float32), "
        f"and engines for compute capabilities {', '.join(TARGETS)} by the folder's own script; engines were not run",
        "command": "python benchmarks/tensorrt_real.py",
        "environment": describe(1),
        "builder": f"TensorRT for RTX {importlib.metadata.version('tensorrt-rtx-cu13')}",
        "models": {name: subject.what for name, subject in SUBJECTS.items()},
        "cells": dict(sorted(cells.items())),
    }


if __name__ == "__main__":
    raise SystemExit(main())
