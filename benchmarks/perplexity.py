"""What evicting decoders lose: perplexity of real text against context length and cache size.

    python benchmarks/perplexity.py                                  # SmolLM2-135M, all methods, 2k to 8k: hours
    python benchmarks/perplexity.py --method h2o --context 2048 --budget 0.25
    python benchmarks/perplexity.py --method streaming-llm:sinks=0 --method agent-memory-q4:bits=8

The text (the standard library's own documentation topics) is read in pieces of ``--piece`` tokens, as a server with
chunked prefill does; a method evicts after every piece. The perplexity is that of all tokens but the first. The cache
keeps the given share of the context. `none` keeps everything, so its figure is the model's own.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data import topics
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a plain file

import numpy as np
import numpy.typing as npt

from benchmarks.decoders import lowered, policy_of
from benchmarks.environment import describe, write_results
from examples.assets import LANGUAGE_MODEL, locate
from tokcc.backends.generation import DecoderEngine
from tokcc.errors import PlanError
from tokcc.passes.methods import library
from tokcc.pipeline.decoder_quality import Surprise
from tokcc.pipeline.reading import Reading
from tokcc.pipeline.request import ModelRequest
from tokcc.pipeline.stages import Stages

METHODS = ("h2o", "streaming-llm", "tova", "snapkv", "pyramidkv", "chunkkv", "knorm", "keydiff", "lagkv", "keyformer")


def budgeted(method: str) -> bool:
    """Return whether a method has a budget in tokens; the others keep everything in their own way."""
    name = method.partition(":")[0]
    return name != "none" and "tokens" in library()[name].params


def policy_for(method: str, slots: int) -> dict[str, Any]:
    """Return the policy of a method with so many slots."""
    return policy_of(method, **({"tokens": slots} if budgeted(method) else {}))


def text_tokens(folder: Path, count: int) -> npt.NDArray[np.int64]:
    """The first tokens of the documentation topics."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name)
    text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    ids = tokenizer(text[: count * 8], return_tensors="np")["input_ids"][0]
    if len(ids) < count:
        raise SystemExit(f"the text has only {len(ids)} tokens")
    return np.asarray(ids[:count], np.int64)


def perplexity(engine: Path, ids: npt.NDArray[np.int64], piece: int, threads: int) -> tuple[float, int]:
    """Read a text in pieces; return its perplexity and the bytes that the cache holds at the end."""
    reading, surprise = Reading(DecoderEngine(engine, threads=threads)), Surprise()
    for start in range(0, len(ids), piece):
        new = ids[start : start + piece]
        surprise.add(reading.read(new), new)
    value = surprise.perplexity
    return math.nan if value is None else value, reading.cache_bytes


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="perplexity against context and cache size")
    parser.add_argument("--method", action="append", help=f"default: none, {', '.join(METHODS)}")
    parser.add_argument("--context", action="append", type=int, help="default: 2048, 4096, 8192")
    parser.add_argument("--budget", action="append", type=float, help="share of the context; default: 0.125, 0.25, 0.5")
    parser.add_argument("--piece", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="perplexity", help="results file name")
    options = parser.parse_args()
    folder = locate(LANGUAGE_MODEL)[0].parent
    contexts = options.context or [2048, 4096, 8192]
    ids = text_tokens(folder, max(contexts))
    _, program = ModelRequest(folder, task="text-generation").open(Stages())
    rows: list[dict[str, Any]] = []
    print("| method | context | budget | slots | perplexity | KV MB |\n|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as scratch:
        engines: dict[tuple[str, int], Path] = {}
        for method in options.method or ["none", *METHODS]:
            for context in contexts:
                whole = not budgeted(method)
                for budget in [1.0] if whole else options.budget or [0.125, 0.25, 0.5]:
                    slots = round(budget * context)
                    key = (method, 0 if whole else slots)
                    start = time.perf_counter()
                    row: dict[str, Any] = {"method": method, "context": context, "budget": budget, "slots": slots}
                    try:
                        if key not in engines:
                            path = Path(scratch) / f"{method.replace(':', '-')}-{slots}.onnx"
                            lowered(program, policy_for(method, slots), path)
                            engines[key] = path
                        value, held = perplexity(engines[key], ids[:context], options.piece, options.threads)
                        row |= {"perplexity": value, "kv_bytes": held, "seconds": time.perf_counter() - start}
                        cells = [f"{value:.2f}", f"{held / 1e6:.1f}"]
                    except PlanError as error:  # a capacity that a method refuses is a result, too
                        row["refused"] = error.what
                        cells = [f"refused: {error.what}", "-"]
                    rows.append(row)
                    print(f"| {method} | {context} | {budget:.1%} | {slots} | {' | '.join(cells)} |", flush=True)
            for path in [engines.pop(k) for k in list(engines) if k[0] == method]:
                path.unlink(missing_ok=True)
    content = {
        "what": "perplexity of the documentation topics, read in pieces, cache evicted after each",
        "environment": describe(options.threads),
        "model": LANGUAGE_MODEL.name,
        "piece": options.piece,
        "rows": rows,
    }
    print(f"\nwrote {write_results(options.name, content)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
