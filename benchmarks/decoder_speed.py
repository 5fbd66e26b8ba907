"""How fast decoders generate: an evicting engine, our own whole cache, and the plain export, at several lengths.

    python benchmarks/decoder_speed.py                          # SmolLM2-135M, 1k to 8k tokens
    python benchmarks/decoder_speed.py --without-plain          # the plain export takes minutes to make
    python benchmarks/decoder_speed.py --policy h2o --policy tova --tokens 512 --prefill 2048
    python benchmarks/decoder_speed.py --work engines           # keeps the engines, and takes those that are there

One thread, batch 1. Nothing is timed unless all engines give one text the same tokens. A step reads random caches of
the length that the engine has there; all engines of a length run in turns in one process. The bound is what a step must
read: weights once and the cache once.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a plain file

import numpy as np
import onnxruntime as ort
import torch

import tokcc
from benchmarks.engines import Feeds, open_session, quiet
from benchmarks.environment import describe, write_results
from benchmarks.grid import short
from benchmarks.timing import interleave, milliseconds, speedups
from examples.assets import LANGUAGE_MODEL, locate
from tokcc.capture.load import load

WHOLE, PLAIN = "tokcc none", "plain export"
_PAST = "past_key_values."


def export_plain(folder: Path, path: Path) -> Path:
    """What a user has without tokcc: the decoder with its cache as inputs, through ``torch.onnx.export``."""
    loaded = load(folder, task="text-generation")
    assert loaded.module is not None
    with torch.no_grad(), quiet():
        program = torch.export.export(
            loaded.module, (), loaded.example_kwargs, dynamic_shapes=loaded.dynamic_shapes, strict=False
        )
        made = torch.onnx.export(program, opset_version=18, dynamo=True, verbose=False)
        if made is None:
            raise RuntimeError("torch.onnx.export returned nothing")
        made.save(path, external_data=True)
    return path


def compiled(folder: Path, policy: dict[str, Any] | str, output: Path) -> Path:
    """Compile with tokcc."""
    bundle = tokcc.compile(folder, policy, output=output, calibrate=False, force=True, task="text-generation")
    return Path(bundle.engine("onnx"))


def feeds_of(session: ort.InferenceSession, context: int, new: int, capacity: int | None) -> Feeds:
    """Inputs of ``new`` tokens after ``context``; caches are as long as the engine lets them become."""
    rng = np.random.default_rng(0)
    length = context if capacity is None else min(context, capacity)
    feeds: Feeds = {}
    for item in session.get_inputs():
        if len(item.shape) == 4:
            width = item.shape[3] if isinstance(item.shape[3], int) else 1
            shape = (1, item.shape[1], length, width)
            feeds[item.name] = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.1)
        elif "mask" in item.name:
            feeds[item.name] = np.ones((1, context + new), np.int64)
        elif "position" in item.name:
            feeds[item.name] = np.arange(context, context + new)[None]
        else:
            feeds[item.name] = rng.integers(10, 1000, (1, new))
    return feeds


def kept(engine: Path, make: Callable[[], Path]) -> Path:
    """Return an engine that an earlier run left, or make it."""
    return engine if engine.exists() else make()


def check(engines: dict[str, tuple[Path, int | None]], tolerance: float = 1e-3) -> None:
    """Read one short text with every engine, which evicts nothing of it.

    Raises:
        SystemExit: Logits differ: no figure is worth anything then.
    """
    wanted: Any = None
    for name, (path, _) in engines.items():
        session = open_session(path, 1)
        logits = session.run([session.get_outputs()[0].name], feeds_of(session, 0, 48, None))[0]
        wanted = logits if wanted is None else wanted
        apart = float(np.abs(logits - wanted).max() / np.abs(wanted).max())
        if apart > tolerance or (logits.argmax(-1) != wanted.argmax(-1)).any():
            raise SystemExit(
                f"{name} gives other tokens (logits differ by {apart:.1e} of their scale): nothing is timed"
            )


def moved_bytes(engine: Path, feeds: Feeds) -> int:
    """Bytes that a step cannot avoid to read: the engine's file and the caches."""
    files = [engine, engine.with_name(engine.name + ".data")]
    return sum(f.stat().st_size for f in files if f.exists()) + sum(v.nbytes for v in feeds.values() if v.ndim == 4)


def measure(
    engines: dict[str, tuple[Path, int | None]], contexts: list[int], new: int, rounds: int, baseline: str
) -> list[dict[str, Any]]:
    """Time every engine at every length."""
    sessions = {name: open_session(path, 1) for name, (path, _) in engines.items()}
    rows = []
    for context in contexts:
        feeds = {name: feeds_of(sessions[name], context, new, engines[name][1]) for name in engines}
        seconds = interleave({name: partial(sessions[name].run, None, feeds[name]) for name in engines}, rounds)
        ratios = speedups(seconds, baseline)
        for name, (path, _) in engines.items():
            row: dict[str, Any] = {
                "context": context,
                "new": new,
                "engine": name,
                "ms": milliseconds(seconds[name]),
                "tokens_per_second": new / float(np.median(seconds[name])),
                "kv_mb": sum(v.nbytes for v in feeds[name].values() if v.ndim == 4) / 1e6,
                "step_mb": moved_bytes(path, feeds[name]) / 1e6,
            }
            if name != baseline:
                row["speedup"] = ratios[name]
            rows.append(row)
            ratio = "-"
            if name != baseline:
                found = ratios[name]
                ratio = f"{found['median']:.2f} ({found['p25']:.2f}-{found['p75']:.2f})"
            cells = [str(context), str(new), name, f"{row['ms']['median']:.1f}", f"{row['kv_mb']:.1f}", ratio]
            print(f"| {' | '.join(cells)} |", flush=True)
    return rows


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="decoding speed at several context lengths")
    parser.add_argument("--policy", action="append", help="default: h2o")
    parser.add_argument("--tokens", type=int, default=1024, help="capacity")
    parser.add_argument("--context", action="append", type=int, help="default: 1024, 2048, 4096, 8192")
    parser.add_argument("--prefill", action="append", type=int, default=[], help="also time prompts of this length")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--without-plain", action="store_true")
    parser.add_argument("--name", default="decoder_speed", help="results file name")
    parser.add_argument("--work", type=Path, help="keep the engines here; default: nowhere")
    options = parser.parse_args()
    folder = locate(LANGUAGE_MODEL)[0].parent
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        engines: dict[str, tuple[Path, int | None]] = {}
        if not options.without_plain:
            plain = work / "plain.onnx"
            engines[PLAIN] = (kept(plain, partial(export_plain, folder, plain)), None)
        whole = work / "none"
        engines[WHOLE] = (kept(whole / "model.onnx", partial(compiled, folder, "none", whole)), None)
        for name in options.policy or ["h2o"]:
            policy = short(name, tokens=options.tokens)
            output = work / f"{name}-{options.tokens}"
            engine = kept(output / "model.onnx", partial(compiled, folder, policy, output))
            engines[f"tokcc {name} {options.tokens}"] = (engine, options.tokens)
        check(engines)
        print("| context | new tokens | engine | ms | KV MB | speed-up over the whole cache |")
        print("|---:|---:|---|---:|---:|---:|")
        rows = measure(engines, options.context or [1024, 2048, 4096, 8192], 1, options.rounds, WHOLE)
        for length in options.prefill:
            rows += measure(engines, [0], length, max(3, options.rounds // 3), WHOLE)
    content = {
        "what": "onnxruntime CPU, one thread, batch 1, engines in turns; speed-up over our own whole-cache engine",
        "environment": describe(1),
        "model": LANGUAGE_MODEL.name,
        "rounds": options.rounds,
        "rows": rows,
    }
    print(f"\nwrote {write_results(options.name, content)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
