"""What the engines lose: features and linear-probe accuracy, baseline engine against compiled ones, on real data.

    python benchmarks/accuracy.py                       # 12 image policies on three data sets
    python benchmarks/accuracy.py --text                # 12 text policies on tweets
    python benchmarks/accuracy.py --only 'tome r=13' --train 200 --test 200
    python benchmarks/accuracy.py --engine mine=out/model.onnx          # an engine that exists already

Two situations are reported. *Drop-in*: the probe was trained on the baseline's features and stays as it is; the engine
is swapped under it. *Retrained*: a new probe is trained on the engine's own features. Extracted features are cached by
the engine's hash in ``.weights/features``, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a plain file

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from benchmarks import probe
from benchmarks.engines import Feeds, Model, compile_tokcc, export_plain, open_session
from benchmarks.environment import describe, write_results
from benchmarks.grid import IMAGE, TEXT, Policy
from benchmarks.op_profile import matrix_flops
from examples import image_encoder, labelled_data, text_encoder
from examples.assets import IMAGENET_PHOTOS, AssetError, cache_root, locate

BASELINE = "baseline"
Items = Sequence[Any] | npt.NDArray[Any]


class Encoder(Protocol):
    """A real model with its data."""

    model: Model
    batch: int

    def datasets(self, train: int, test: int) -> Iterable[Data]:
        """The data sets that can be had here."""
        ...

    def feeds(self, items: Items) -> Feeds:
        """The model's inputs for a batch of items."""
        ...


@dataclass(frozen=True)
class Data:
    """A data set as the benchmark uses it; without labels only feature differences are reported.

    Attributes:
        name: Data set.
        train: Items that the probe is trained on.
        test: Items that everything is reported on.
        train_labels: Their classes, None without labels.
        test_labels: Their classes.
    """

    name: str
    train: Items
    test: Items
    train_labels: npt.NDArray[np.int64] | None = None
    test_labels: npt.NDArray[np.int64] | None = None


class Images:
    """The image encoder: CLS features of Fashion-MNIST, MNIST-5k and 20 ImageNet photos."""

    batch = 4  # larger ones are slower per image on a CPU: the activations leave the cache

    def __init__(self) -> None:
        module, args = image_encoder.build()
        batch = torch.export.Dim("batch", min=1, max=256)
        self.model = Model("dinov2-small", module, args, ("pixel_values",), ("features",), {"pixel_values": {0: batch}})

    def datasets(self, train: int, test: int) -> Iterator[Data]:
        """Both labelled sets, and the photos for features on natural images."""
        for asset, load in labelled_data.IMAGES.values():
            try:
                split = load(train, test)
            except AssetError as error:
                print(f"left out: {asset.name}: {error}", file=sys.stderr)
                continue
            yield Data(split.name, split.train, split.test, split.train_labels, split.test_labels)
        photos = [np.asarray(Image.open(path).convert("RGB")) for path in locate(IMAGENET_PHOTOS)]
        yield Data("imagenet-photos", [], photos)

    def feeds(self, items: Items) -> Feeds:
        """Resize and normalise."""
        return {"pixel_values": image_encoder.preprocess(items)}


class Texts:
    """The text encoder: sentence embeddings of tweets."""

    batch = 16

    def __init__(self) -> None:
        module, args = text_encoder.build()
        axes = {0: torch.export.Dim("batch", min=1, max=256), 1: torch.export.Dim("tokens", min=4, max=256)}
        inputs = ("input_ids", "attention_mask")
        self.model = Model("minilm-l6", module, args, inputs, ("sentence_embedding",), dict.fromkeys(inputs, axes))
        self.tokenizer = text_encoder.tokenizer_file()

    def datasets(self, train: int, test: int) -> Iterator[Data]:
        """The tweets."""
        split = labelled_data.tweets(train, test)
        yield Data(split.name, split.train, split.test, split.train_labels, split.test_labels)

    def feeds(self, items: Items) -> Feeds:
        """Tokenise, padded to the longest of the batch."""
        return dict(text_encoder.tokenize(self.tokenizer, list(items)))


def extract(encoder: Encoder, engine: Path, items: Items, threads: int, cache: Path) -> probe.Features:
    """Run an engine over all items, or read what an earlier run of the same engine gave: its outputs side by side."""
    if len(items) == 0:
        return np.zeros((0, 0), dtype=np.float32)
    key = hashlib.sha256(engine.read_bytes())
    for item in items:
        key.update(item.encode() if isinstance(item, str) else np.ascontiguousarray(item).tobytes())
    stored = cache / f"{key.hexdigest()[:24]}.npy"
    if stored.is_file():
        return np.asarray(np.load(stored), dtype=np.float32)
    session = open_session(engine, threads)
    parts = [
        session.run(list(encoder.model.outputs), encoder.feeds(items[start : start + encoder.batch]))
        for start in range(0, len(items), encoder.batch)
    ]
    features: probe.Features = np.concatenate([np.concatenate(part, axis=-1) for part in parts])
    cache.mkdir(parents=True, exist_ok=True)
    np.save(stored, features)
    return features


def compare(data: Data, baseline: dict[str, probe.Features], reduced: dict[str, probe.Features]) -> dict[str, Any]:
    """Feature and probe differences of one engine on one data set."""
    similarity = probe.cosine(baseline["test"], reduced["test"])
    row: dict[str, Any] = {
        "dataset": data.name,
        "cosine_mean": float(similarity.mean()),
        "cosine_p5": float(np.percentile(similarity, 5)),
        "test_items": len(similarity),
    }
    if data.train_labels is None or data.test_labels is None:
        return row
    before = probe.train(baseline["train"], data.train_labels)
    accuracy = before.accuracy(baseline["test"], data.test_labels)
    if "train" in reduced:
        after = probe.train(reduced["train"], data.train_labels)
        row["probe_retrained"] = after.accuracy(reduced["test"], data.test_labels)
    return {
        **row,
        "train_items": len(data.train_labels),
        "probe_baseline": accuracy,
        "probe_drop_in": before.accuracy(reduced["test"], data.test_labels),
        "top1_agreement": float((before.predict(baseline["test"]) == before.predict(reduced["test"])).mean()),
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / len(similarity)),
    }


def evaluate(
    encoder: Encoder,
    engines: dict[str, Path],
    datasets: Sequence[Data],
    threads: int,
    cache: Path,
    *,
    retrain: bool = True,
) -> list[dict[str, Any]]:
    """Compare every engine with the first one on every data set.

    Args:
        encoder: The encoder.
        engines: By name; the first is the baseline.
        datasets: The data.
        threads: Threads of the runtime.
        cache: Folder for features.
        retrain: Also train a probe on each engine's own features, which takes the training items through every engine.
    """
    example = encoder.model.feeds()
    rows: list[dict[str, Any]] = []
    baseline: dict[str, dict[str, probe.Features]] = {}
    base_flops = matrix_flops(engines[BASELINE], example)
    for name, engine in engines.items():
        gflops = matrix_flops(engine, example)
        for data in datasets:
            before, start = _entries(cache), time.perf_counter()
            parts = {"train": data.train, "test": data.test} if retrain or name == BASELINE else {"test": data.test}
            features = {part: extract(encoder, engine, items, threads, cache) for part, items in parts.items()}
            # Only a time in which everything was run is worth keeping; parts that were read from the cache are not.
            fresh = _entries(cache) - before == sum(len(items) > 0 for items in parts.values())
            seconds = round(time.perf_counter() - start, 1) if fresh else None
            baseline.setdefault(data.name, features)
            row = {"engine": name, **compare(data, baseline[data.name], features)}
            rows.append({**row, "flops_ratio": gflops / base_flops, "seconds": seconds})
            print(markdown_row(rows[-1]), flush=True)
    return rows


def _entries(folder: Path) -> int:
    return sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0


def markdown_row(row: dict[str, Any]) -> str:
    """One line of the table."""

    def percent(key: str) -> str:
        return f"{row[key]:.1%}" if key in row else "-"

    cells = [row["engine"], row["dataset"], f"{row['flops_ratio']:.2f}", f"{row['cosine_mean']:.4f}"]
    cells += [f"{row['cosine_p5']:.4f}"]
    cells += [percent(key) for key in ("probe_baseline", "probe_drop_in", "probe_retrained", "top1_agreement")]
    return f"| {' | '.join(cells)} |"


HEADER = """\
| engine | data | FLOPs | cosine | cosine p5 | probe before | drop-in | retrained | agreement |
|---|---|---:|---:|---:|---:|---:|---:|---:|"""


def build_engines(model: Model, policies: dict[str, Policy], folder: Path, failures: dict[str, str]) -> dict[str, Path]:
    """Export the baseline and compile the policies; one that cannot be compiled is noted, not fatal."""
    engines = {BASELINE: export_plain(model, folder / model.name / "baseline.onnx")}
    for name, policy in policies.items():
        slug = "".join(letter if letter.isalnum() else "-" for letter in name)
        print(f"compiling {name}", file=sys.stderr, flush=True)
        try:
            engines[name] = compile_tokcc(model, policy, folder / model.name / slug)
        except Exception as error:  # the whole grid must not die of one policy; the failure is in the results
            failures[name] = f"{type(error).__name__}: {error}"
            print(f"failed: {name}\n{error}", file=sys.stderr)
    return engines


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="feature and probe accuracy of reduced engines on real data")
    parser.add_argument("--text", action="store_true", help="the text encoder on tweets, not the image encoder")
    parser.add_argument("--only", action="append", metavar="POLICY", help="a policy of the grid (repeatable)")
    parser.add_argument("--baseline-only", action="store_true", help="no compiled engines")
    parser.add_argument("--engine", action="append", default=[], metavar="NAME=FILE", help="add an existing engine")
    parser.add_argument("--train", type=int, help="training items (500 images, 3000 tweets)")
    parser.add_argument("--test", type=int, help="test items (500 images, 1200 tweets)")
    parser.add_argument("--drop-in-only", action="store_true", help="only the probe trained on the baseline's features")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=cache_root() / "engines", help="where engines are written")
    parser.add_argument("--name", help="results file name")
    options = parser.parse_args()

    grid = TEXT if options.text else IMAGE
    unknown = set(options.only or ()) - set(grid)
    if unknown:
        parser.error(f"no such policy: {', '.join(sorted(unknown))}; there are: {', '.join(grid)}")
    if any("=" not in item for item in options.engine):
        parser.error("--engine wants NAME=FILE")
    chosen = {} if options.baseline_only else {name: grid[name] for name in (options.only or grid)}

    encoder: Encoder = Texts() if options.text else Images()
    sizes = (3000, 1200) if options.text else (500, 500)
    datasets = list(encoder.datasets(options.train or sizes[0], options.test or sizes[1]))
    failures: dict[str, str] = {}
    engines = build_engines(encoder.model, chosen, options.work, failures)
    engines |= {name: Path(path) for name, path in (item.split("=", 1) for item in options.engine)}
    print(HEADER)
    cache = cache_root() / "features"
    rows = evaluate(encoder, engines, datasets, options.threads, cache, retrain=not options.drop_in_only)
    content = {
        "what": "linear probe (L2 logistic regression) and cosine on frozen features, engine against baseline engine",
        "environment": describe(options.threads),
        "model": encoder.model.name,
        "batch": encoder.batch,
        "policies": chosen,
        "failures": failures,
        "rows": rows,
    }
    path = write_results(options.name or f"accuracy_{'text' if options.text else 'image'}", content)
    print(f"\nwrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
