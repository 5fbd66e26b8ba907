"""What is left of an image in half, a quarter, a tenth of its tokens: linear probes of presets that need no text.

    python benchmarks/visual_tokens.py                                 # all presets, three budgets
    python benchmarks/visual_tokens.py --preset tome --preset divprune --keep 0.25

The encoder of the examples (257 tokens) with two readouts: the *mean* of the tokens that are left, which is what comes
to a model behind the encoder, and the class token, which only methods inside the encoder can change. Every method
leaves the same number of tokens at the end. *Drop-in* is a probe that was trained on all tokens and does not know of
the reduction, *retrained* one on the method's own features. ``random`` and ``uniform`` are the floors, inside and
behind.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a plain file

import torch
from torch import nn

from benchmarks import probe
from benchmarks.accuracy import BASELINE, Data, build_engines, compare, extract
from benchmarks.engines import Feeds, Model
from benchmarks.environment import RESULTS, describe, write_results
from benchmarks.grid import Policy, short
from benchmarks.op_profile import matrix_flops
from examples import image_encoder, labelled_data
from examples.assets import IMAGE_ENCODER, cache_root, locate

PATCHES = 256
LAYERS = 12
KEEPS = (0.5, 0.25, 0.1)
RESULT = "visual_tokens"
INSIDE, BEHIND = "inside", "behind"
_STAGES = 3
"""Cuts of the methods that drop at a quarter, half and three quarters of the depth."""
_OUTPUT = {"site": "encoder_output"}

Arguments = Callable[[float], dict[str, Any]]


class Readouts(nn.Module):
    """The encoder as two readers see it: ``cls`` and the ``mean`` of the patch tokens, ``[B, 384]`` each."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encode normalised images ``[B, 3, S, S]``."""
        hidden = self.backbone(pixel_values).last_hidden_state
        return {"cls": hidden[:, 0], "mean": hidden[:, 1:].mean(1)}


class Images:
    """The encoder, and what `accuracy.extract` asks of one."""

    batch = 4

    def __init__(self) -> None:
        module = Readouts(image_encoder.load_backbone(locate(IMAGE_ENCODER)[0])).eval()
        side = image_encoder.IMAGE_SIZE
        example = torch.zeros(2, 3, side, side)
        batch = {0: torch.export.Dim("batch", min=1, max=256)}
        self.model = Model(
            "dinov2-visual", module, (example,), ("pixel_values",), ("cls", "mean"), {"pixel_values": batch}
        )

    def datasets(self, train: int, test: int) -> Iterable[Data]:
        """Fashion-MNIST: the harder of the two labelled sets."""
        split = labelled_data.fashion_mnist(train, test)
        yield Data(split.name, split.train, split.test, split.train_labels, split.test_labels)

    def feeds(self, items: Any) -> Feeds:
        """Resize and normalise."""
        return {"pixel_values": image_encoder.preprocess(items)}


def count(keep: float) -> int:
    """Tokens that are left."""
    return round(keep * PATCHES)


def by_stage(keep: float) -> dict[str, Any]:
    """The share of each of three cuts that leaves ``keep`` behind the last."""
    return {"keep": keep ** (1 / _STAGES)}


def by_tier(keep: float) -> dict[str, Any]:
    """The same for three tiers: what is condensed goes, too, and twice as much as what is removed."""
    return {"rate": (2 + keep ** (1 / _STAGES)) / 3}


def by_layer(keep: float) -> dict[str, Any]:
    """Tokens to merge in each layer."""
    return {"r": round((PATCHES - count(keep)) / LAYERS)}


def share(keep: float) -> dict[str, Any]:
    """``keep`` as it is."""
    return {"keep": keep}


def tokens(keep: float) -> dict[str, Any]:
    """A number of tokens."""
    return {"tokens": count(keep)}


def contextual(keep: float) -> dict[str, Any]:
    """A number of tokens, one in six of them contextual as in the paper."""
    return {"tokens": count(keep), "contextual": max(1, count(keep) // 6)}


def schedule(keep: float) -> dict[str, Any]:
    """Equal shares behind every second layer."""
    layers = list(range(1, LAYERS, 2))
    left = [round(PATCHES * keep ** ((i + 1) / len(layers))) for i in range(len(layers))]
    return {"at": {"layers": layers, "site": "block_output"}, "schedule": left}


def duplicates_and_share(keep: float, duplicates: int = 4, cuts: int = 5) -> dict[str, Any]:
    """Few duplicates at each of five cuts, and the share that leaves the wanted number behind the last."""
    low, high = 0.01, 1.0
    for _ in range(40):
        middle, left = (low + high) / 2, float(PATCHES)
        for _ in range(cuts):
            left = max(0.0, left - duplicates) * middle
        low, high = (middle, high) if left < count(keep) else (low, middle)
    return {"keep": round(high, 4), "duplicates": duplicates}


METHODS: dict[str, dict[str, Arguments]] = {
    INSIDE: {
        "random": by_stage,
        "uniform": by_stage,
        "evit": by_stage,
        "tca": by_tier,
        "token-transforming": by_stage,
        "tome": by_layer,
        "dymu": by_layer,
        "pitome": lambda keep: {"ratio": keep ** (1 / LAYERS)},
        "a-tome": lambda keep: {"total": 1 - keep},
        "ats": share,
        "ltp": share,
        "power-bert": share,
        "spatten-topk": share,
        "zero-tprune": duplicates_and_share,
        "flowcut": schedule,
    },
    BEHIND: {
        "random": lambda keep: {"at": _OUTPUT, **share(keep)},
        "uniform": lambda keep: {"at": _OUTPUT, **share(keep)},
        "divprune": share,
        "fastervlm": tokens,
        "hiprune": tokens,
        "prumerge": tokens,
        "prumerge-plus": lambda keep: {**tokens(keep), "stride": round(1.5 / keep)},
        "todre": share,
        "var-sink": share,
        "visiondrop": contextual,
        "visionzip": contextual,
        "vflowopt": share,
        "vispruner": tokens,
        "vqtoken": tokens,
        "vtc-cls": tokens,
        "zoo-prune": tokens,
    },
}


def policies(keeps: Iterable[float], presets: Iterable[str] | None) -> dict[str, Policy]:
    """Name a policy for each place, preset and budget."""
    chosen = None if presets is None else set(presets)
    return {
        f"{place}/{preset}/{keep:g}": short(preset, **arguments(keep))
        for place, methods in METHODS.items()
        for preset, arguments in methods.items()
        if chosen is None or preset in chosen
        for keep in keeps
    }


def measure(encoder: Images, engines: dict[str, Path], data: Data, threads: int, cache: Path) -> list[dict[str, Any]]:
    """Probe both readouts of every engine."""
    base_flops = matrix_flops(engines[BASELINE], encoder.model.feeds())
    rows: list[dict[str, Any]] = []
    before: dict[str, dict[str, probe.Features]] = {}
    width = 0
    for name, engine in engines.items():
        parts = {"train": data.train, "test": data.test}
        features = {part: extract(encoder, engine, items, threads, cache) for part, items in parts.items()}
        width = width or features["test"].shape[1] // 2
        readouts = {"cls": slice(0, width), "mean": slice(width, None)}
        row: dict[str, Any] = {"engine": name, "flops_ratio": matrix_flops(engine, encoder.model.feeds()) / base_flops}
        for readout, columns in readouts.items():
            own = {part: value[:, columns] for part, value in features.items()}
            found = compare(data, before.setdefault(readout, own), own)
            kept = ("cosine_mean", "probe_drop_in", "probe_retrained", "top1_agreement", "standard_error")
            row[readout] = {key: round(found[key], 4) for key in kept}
        rows.append(row)
        print(line(row), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """One line of the table."""
    cells = [row["engine"], f"{row['flops_ratio']:.2f}"]
    for readout in ("mean", "cls"):
        found = row[readout]
        cells += [f"{found['cosine_mean']:.3f}", *(f"{found[k]:.1%}" for k in ("probe_drop_in", "probe_retrained"))]
    return f"| {' | '.join(cells)} |"


def joined(new: dict[str, Any], path: Path, data: Data, options: argparse.Namespace) -> dict[str, Any]:
    """Keep what an earlier run found on the same data of engines that this one did not make."""
    if not path.is_file():
        return new
    old = json.loads(path.read_text(encoding="utf-8"))
    if old["data"] != {"name": data.name, "train": options.train, "test": options.test}:
        return new
    made = {*new["policies"], BASELINE}
    return {
        "policies": {**old["policies"], **new["policies"]},
        "failures": {k: v for k, v in old["failures"].items() if k not in made} | new["failures"],
        "rows": [*(row for row in old["rows"] if row["engine"] not in made), *new["rows"]],
    }


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="linear probes on the tokens that presets leave")
    parser.add_argument("--preset", action="append", help="only these (repeatable)")
    parser.add_argument("--keep", action="append", type=float, help="default: 0.5, 0.25, 0.1")
    parser.add_argument("--train", type=int, default=300)
    parser.add_argument("--test", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=cache_root() / "engines", help="where engines are written")
    options = parser.parse_args()
    encoder = Images()
    (data,) = encoder.datasets(options.train, options.test)
    failures: dict[str, str] = {}
    chosen = policies(options.keep or KEEPS, options.preset)
    engines = build_engines(encoder.model, chosen, options.work, failures)
    print("| engine | FLOPs | mean: cosine | drop-in | retrained | cls: cosine | drop-in | retrained |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    rows = measure(encoder, engines, data, options.threads, cache_root() / "features")
    content = {
        "what": "linear probe (L2 logistic regression) on the mean of the tokens left and on the class token",
        "environment": describe(options.threads),
        "model": encoder.model.name,
        "data": {"name": data.name, "train": options.train, "test": options.test},
        **joined({"policies": chosen, "failures": failures, "rows": rows}, RESULTS / f"{RESULT}.json", data, options),
    }
    print(f"\nwrote {write_results(RESULT, content)}")
    print(json.dumps(failures, indent=1) if failures else "no failures")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
