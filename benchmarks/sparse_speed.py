"""What sparse attention costs and gains: prompts of several lengths on the real language model, with their perplexity.

    python benchmarks/sparse_speed.py                                        # every method, 1k to 8k tokens
    python benchmarks/sparse_speed.py --method xattention:mass=0.8 --context 8192 --rounds 5
    python benchmarks/sparse_speed.py --without-speed --context 2048         # only what is lost
    python benchmarks/sparse_speed.py --plain --key plain --processor-time --without-quality --context 2048

One thread, batch 1, engines in turns. The baseline is our own dense engine, whose attention runs over query blocks that
read only their prefix; `--plain` adds the plain export, which gives the logits of all tokens, and our dense engine that
does so too. The plain export holds whole maps: of 4096 tokens all engines need 11.5 GB. Other timed engines give
the last token's logits, as a server needs them. Perplexity is that of the documentation topics, read in one call.
Nothing is timed unless an engine equals its eager program on a text that is long enough to be read sparsely.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a plain file

import numpy as np
import numpy.typing as npt

from benchmarks.decoder_speed import PLAIN, WHOLE, export_plain, kept
from benchmarks.decoders import call_of, eager_logits, empty, lowered, policy_of, refuse_difference
from benchmarks.engines import Feeds, open_session
from benchmarks.environment import RESULTS, describe, write_results
from benchmarks.perplexity import text_tokens
from benchmarks.timing import interleave, milliseconds, speedups
from examples.assets import LANGUAGE_MODEL, locate
from tokcc.ir.program import Program
from tokcc.pipeline.decoder_quality import Surprise
from tokcc.pipeline.request import ModelRequest
from tokcc.pipeline.stages import Stages

METHODS = (
    "xattention:mass=0.97,block=64,key_block=16,stride=8,length=2048",
    "minference:columns=100,distances=800,share=group_mean,length=2048",
    "xattention:length=2048",
)
"""Two settings that lose little on this model, and the published blocks of one of them."""
RESULT = "sparse_speed"
ALL_LOGITS = f"{WHOLE}, all logits"
"""What the plain export computes, by our dense engine."""
LAST = {"logits": "last_token"}


def engine_of(program: Program, method: str, path: Path, *, last: bool, checked: int) -> Path:
    """Lower a method, and compare it with its eager program on so many tokens; 0 = not.

    Raises:
        SystemExit: They differ.
    """
    reduced = lowered(program, {**policy_of(method), "outputs": LAST if last else {}}, path)
    if checked:
        session = open_session(path, 1)
        feeds = prompt(session, np.random.default_rng(0).integers(10, 40_000, checked))
        refuse_difference(method, session.run(["logits"], feeds)[0], eager_logits(reduced.sliced, feeds))
    return path


def prompt(session: Any, ids: npt.NDArray[np.int64]) -> Feeds:
    """Inputs of a first call."""
    return {**call_of(session, ids), **empty(session)}


def perplexity(engine: Path, ids: npt.NDArray[np.int64], threads: int) -> float:
    """Read a text in one call."""
    session, surprise = open_session(engine, threads), Surprise()
    surprise.add(session.run(["logits"], prompt(session, ids))[0][0], ids)
    value = surprise.perplexity
    return float("nan") if value is None else value


def timed(
    engines: dict[str, Path], ids: npt.NDArray[np.int64], rounds: int, clock: Callable[[], float]
) -> dict[str, dict[str, Any]]:
    """Time one prompt with all engines in turns."""
    sessions = {name: open_session(path, 1) for name, path in engines.items()}
    names = {name: [session.get_outputs()[0].name] for name, session in sessions.items()}
    runs = {name: partial(s.run, names[name], prompt(s, ids)) for name, s in sessions.items()}
    for name in {PLAIN, ALL_LOGITS} & set(runs):
        refuse_difference(name, runs[name]()[0][:, -1:], runs[WHOLE]()[0])
    seconds = interleave(runs, rounds, clock=clock)
    ratios = speedups(seconds, WHOLE)
    over = speedups(seconds, PLAIN) if PLAIN in seconds else {}
    return {
        name: {"ms": milliseconds(seconds[name]), "speedup": ratios.get(name), "over_plain": over.get(name)}
        for name in engines
    }


def joined(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of two runs, one for each method and length; what both have is that of the later."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for row in (*old, *new):
        found.setdefault((row["method"], row["context"]), {}).update(row)
    return list(found.values())


def break_even(rows: list[dict[str, Any]], method: str) -> int | None:
    """Return the first measured length from which on the method is faster than the dense engine."""
    own = sorted((r["context"], r["speedup"]["median"]) for r in rows if r["method"] == method and r.get("speedup"))
    slow = [context for context, ratio in own if ratio < 1.0]
    later = [context for context, _ in own if not slow or context > slow[-1]]
    return later[0] if later else None


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="speed and perplexity of sparse attention over prompts")
    parser.add_argument("--method", action="append", help=f"default: {', '.join(METHODS)}")
    parser.add_argument("--context", action="append", type=int, help="default: 1024, 2048, 4096, 8192")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="for the perplexity; speed is measured on one")
    parser.add_argument("--plain", action="store_true", help="also time the plain export")
    parser.add_argument("--without-speed", action="store_true")
    parser.add_argument("--without-quality", action="store_true")
    parser.add_argument("--check", type=int, default=1100, help="tokens of the comparison with the eager program")
    parser.add_argument("--work", type=Path, help="keep the plain export here")
    parser.add_argument("--add", action="store_true", help="keep what is in the results file and is not measured now")
    parser.add_argument("--processor-time", action="store_true", help="leave out what a run waits for its core")
    parser.add_argument("--key", help="write under this key of the results file, and leave the rest of it as it is")
    parser.add_argument("--name", default=RESULT, help="results file name")
    options = parser.parse_args()
    clock = time.process_time if options.processor_time else time.perf_counter
    folder = locate(LANGUAGE_MODEL)[0].parent
    contexts = options.context or [1024, 2048, 4096, 8192]
    ids = text_tokens(folder, max(contexts))
    _, program = ModelRequest(folder, task="text-generation").open(Stages())
    methods = options.method or list(METHODS)
    rows: list[dict[str, Any]] = [{"method": name, "context": c} for name in ["none", *methods] for c in contexts]
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        engines: dict[str, Path] = {}
        for number, name in enumerate(["none", *methods]):
            if not options.without_quality:
                whole = engine_of(program, name, work / "whole.onnx", last=False, checked=0)
                for row in rows:
                    if row["method"] == name:
                        row["perplexity"] = perplexity(whole, ids[: row["context"]], options.threads)
                        print(f"{name} {row['context']}: perplexity {row['perplexity']:.3f}", flush=True)
            if not options.without_speed:
                path = work / f"{number}.onnx"
                engines[WHOLE if name == "none" else name] = engine_of(
                    program, name, path, last=True, checked=options.check
                )
        if options.plain:
            plain = (options.work or work) / "plain.onnx"
            engines[PLAIN] = kept(plain, partial(export_plain, folder, plain))
            engines[ALL_LOGITS] = engine_of(program, "none", work / "whole.onnx", last=False, checked=0)
        for context in contexts if engines else ():
            for name, found in timed(engines, ids[:context], options.rounds, clock).items():
                method = "none" if name == WHOLE else name
                known = next((r for r in rows if (r["method"], r["context"]) == (method, context)), None)
                if known is None:
                    rows.append(known := {"method": method, "context": context})
                known |= {key: value for key, value in found.items() if value is not None}
                print(f"{method} {context}: {json.dumps(found)}", flush=True)
    path = RESULTS / f"{options.name}.json"
    if options.key:
        content = json.loads(path.read_text(encoding="utf-8"))
        own = {"clock": "processor" if options.processor_time else "wall", "rounds": options.rounds, "rows": rows}
        content[options.key] = {"environment": describe(1), **own}
        print(f"\nwrote {write_results(options.name, content)} in {RESULTS}")
        return 0
    if options.add and path.is_file():
        rows = joined(json.loads(path.read_text(encoding="utf-8"))["rows"], rows)
        methods = list(dict.fromkeys(row["method"] for row in rows if row["method"] not in ("none", PLAIN)))
    content = {
        "what": "prompts in one call; onnxruntime CPU, batch 1, one thread, in turns; speed-up over our dense engine",
        "environment": describe(1),
        "model": LANGUAGE_MODEL.name,
        "rounds": options.rounds,
        "rows": rows,
        "break_even": {name: break_even(rows, name) for name in methods},
    }
    print(f"\nwrote {write_results(options.name, content)} in {RESULTS}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
