"""What reading a part of a long cache gains: single tokens on the real language model, caches held in fixed slots.

    python benchmarks/sparse_decode.py                                        # every method, 2k to 8k tokens
    python benchmarks/sparse_decode.py --method quest:tokens=512 --context 8192 --rounds 15
    python benchmarks/sparse_decode.py --profile 8192                         # where the time of a step goes

One thread, batch 1, engines in turns, past and present bound to fixed memory: with slots one buffer for both, with
`merged` two. The two baselines read the whole cache: as long as there are entries (`merged`, which copies them for
every token), and in slots. The bound is what a step must read: weights once, and of the cache what the method reads.
Nothing is timed unless an engine gives a token after a text what its eager program gives.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a plain file

import numpy as np
import onnxruntime as ort

from benchmarks.decoders import PAST, call_of, eager_logits, empty, lowered, policy_of, present, refuse_difference
from benchmarks.engines import open_session
from benchmarks.environment import describe, write_results
from benchmarks.timing import interleave, milliseconds, speedups
from examples.assets import LANGUAGE_MODEL, locate
from tokcc.ir.builder import EagerBuilder
from tokcc.ir.program import Program
from tokcc.passes.cache.plan import CachePlan
from tokcc.pipeline.request import ModelRequest
from tokcc.pipeline.stages import Stages

METHODS = ("quest:tokens=1024,length=1024", "quest:tokens=512,length=1024")
MERGED, SLOTS = "none, merged", "none, slots"


def engine_of(program: Program, method: str, slots: int | None, path: Path, checked: int) -> CachePlan:
    """Lower a method and compare a token after a text with its eager program; 0 = not.

    Raises:
        SystemExit: They differ.
    """
    policy = policy_of(method)
    if slots is not None:
        policy = {**policy, "kv": {"layout": "slots", "tokens": slots}}
    reduced = lowered(program, policy, path)
    assert reduced.caches is not None
    if checked:
        session, ids = open_session(path, 1), np.random.default_rng(0).integers(10, 40_000, checked + 1)
        names, past = [item.name for item in session.get_outputs()], empty(session)
        for piece in (ids[:checked], ids[checked:]):
            stop = checked + 1 if len(piece) == 1 else checked
            feeds = {**call_of(session, piece, stop), **past}
            got = dict(zip(names, session.run(None, feeds), strict=True))
            refuse_difference(method, got["logits"][:, -1], eager_logits(reduced.sliced, feeds)[:, -1])
            past = {name: got[present(name)] for name in past}
    return reduced.caches


def step_of(session: ort.InferenceSession, context: int) -> Callable[[], object]:
    """A token after a random cache, with everything bound to memory of its own."""
    rng, binding = np.random.default_rng(0), session.io_binding()
    values: dict[str, Any] = {}
    for name, array in call_of(session, rng.integers(10, 1000, 1), context + 1).items():
        values[name] = array
        binding.bind_cpu_input(name, array)
    grown = {item.name: item for item in session.get_outputs()}
    for item in session.get_inputs():
        if not item.name.startswith(PAST):
            continue
        fixed = isinstance(item.shape[2], int)
        shape = (1, item.shape[1], item.shape[2] if fixed else context, grown[present(item.name)].shape[3])
        held = ort.OrtValue.ortvalue_from_numpy(rng.standard_normal(shape, dtype=np.float32) * np.float32(0.3))
        made = held
        if not fixed:
            made = ort.OrtValue.ortvalue_from_numpy(np.zeros((1, shape[1], context + 1, shape[3]), np.float32))
        binding.bind_ortvalue_input(item.name, held)
        binding.bind_ortvalue_output(present(item.name), made)
        values[item.name] = held, made
    binding.bind_output("logits")

    def run(kept: Any = values) -> None:
        del kept
        session.run_with_iobinding(binding)

    return run


def least_bytes(engine: Path, plan: CachePlan, context: int) -> int:
    """Bytes that a step cannot avoid to read: the weights, and of every layer's cache what it reads."""
    total = sum(f.stat().st_size for f in (engine, engine.with_name(engine.name + ".data")) if f.exists())
    for site in plan.sites:
        form, sparse = plan.forms[site.layer], plan.sparse.get(site.layer)
        token = form.kv_heads * (form.key_width + form.value_width) * form.dtype.itemsize
        if sparse is None or context + 1 < sparse.least:
            total += context * token
            continue
        blocks = -(-context // sparse.block_k)
        total += sparse.budget.kept(EagerBuilder(), blocks, blocks) * sparse.block_k * token
        for state in sparse.states(form.kv_heads, form.key_width, form.dtype):
            total += state.rows(context) * state.heads * state.width * state.dtype.itemsize
    return total


def profile(engine: Path, context: int, folder: Path, runs: int = 12) -> list[tuple[str, str, float]]:
    """Return where the time of a step goes: operation, what it belongs to, milliseconds of a step."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    session = ort.InferenceSession(str(engine), options, providers=["CPUExecutionProvider"])
    step = step_of(session, context)
    for _ in range(runs):
        step()
    spent: dict[tuple[str, str], float] = defaultdict(float)
    for event in json.loads(Path(session.end_profiling()).read_text(encoding="utf-8")):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"]
            place = name.split("tokcc/")[1].split("@")[0] if "tokcc/" in name else "model"
            spent[event["args"]["op_name"], place] += event["dur"] / 1000 / runs
    return sorted(((op, place, ms) for (op, place), ms in spent.items()), key=lambda row: -row[2])


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="single tokens that read a part of a long cache")
    parser.add_argument("--method", action="append", help=f"default: {', '.join(METHODS)}")
    parser.add_argument("--context", action="append", type=int, help="default: 2048, 4096, 8192")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--check", type=int, default=1100, help="tokens of the text that engines are compared on; 0 = none"
    )
    parser.add_argument("--without-merged", action="store_true", help="also no engine that copies its cache")
    parser.add_argument("--profile", type=int, help="show where the time of a step after so many tokens goes instead")
    parser.add_argument("--name", default="sparse_decode", help="results file name")
    options = parser.parse_args()
    contexts = options.context or [options.profile] if options.profile else options.context or [2048, 4096, 8192]
    slots = -(-(max(contexts) + 64) // 64) * 64  # whole pages
    _, program = ModelRequest(locate(LANGUAGE_MODEL)[0].parent, task="text-generation").open(Stages())
    wanted: dict[str, tuple[str, int | None]] = {} if options.without_merged else {MERGED: ("none", None)}
    wanted[SLOTS] = "none", slots
    wanted |= {method: (method, slots) for method in options.method or METHODS}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        engines = {name: Path(scratch) / f"{number}.onnx" for number, name in enumerate(wanted)}
        plans = {
            name: engine_of(program, method, length, engines[name], options.check)
            for name, (method, length) in wanted.items()
        }
        if options.profile:
            for name, path in engines.items():
                print(f"\n{name}")
                for op, place, ms in profile(path, options.profile, Path(scratch))[:24]:
                    print(f"{ms:9.3f} ms  {op:20} {place}")
            return 0
        for context in contexts:
            sessions = {name: open_session(path, 1) for name, path in engines.items()}
            seconds = interleave(
                {name: step_of(session, context) for name, session in sessions.items()}, options.rounds
            )
            whole, held = (speedups(seconds, base) if base in seconds else {} for base in (MERGED, SLOTS))
            for name, path in engines.items():
                row = {
                    "context": context,
                    "engine": name,
                    "ms": milliseconds(seconds[name]),
                    "least_mb": least_bytes(path, plans[name], context) / 1e6,
                    "over_merged": whole.get(name),
                    "over_slots": held.get(name),
                }
                bound = least_bytes(engines[SLOTS], plans[SLOTS], context) / least_bytes(path, plans[name], context)
                row["bound_over_slots"] = bound
                rows.append(row)
                ratios = [f"{r['median']:.2f}" if r else "-" for r in (row["over_merged"], row["over_slots"])]
                print(f"| {context} | {name} | {row['ms']['median']:.1f} ms | {row['least_mb']:.0f} MB |"
                      f" {' | '.join(ratios)} | {bound:.2f} |", flush=True)  # fmt: skip
    content = {
        "what": "onnxruntime CPU, one thread, batch 1, single tokens, memory bound beforehand, engines in turns",
        "environment": describe(1),
        "model": LANGUAGE_MODEL.name,
        "slots": slots,
        "rounds": options.rounds,
        "rows": rows,
    }
    print(f"\nwrote {write_results(options.name, content)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
