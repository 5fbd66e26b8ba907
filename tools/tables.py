"""Write the tables of README.md and docs/ from ``benchmarks/results``, and docs/presets.md from the library.

``--check`` only says whether they are current.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a plain file

from tools import presets_page
from tools.markdown import table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def _where(result: dict[str, Any]) -> str:
    made = result["environment"]
    versions = made["versions"]
    return (
        f"*{made['cpu']}, {made['threads']} thread(s), onnxruntime {versions['onnxruntime']}, "
        f"torch {versions['torch']}, {made['date'][:10]}*"
    )


def _accuracy(result: dict[str, Any]) -> str:
    """One row per engine, the data sets side by side."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        rows.setdefault(row["engine"], {})[row["dataset"]] = row
    datasets = list(next(iter(rows.values())))
    labelled = {row["dataset"] for row in result["rows"] if "probe_drop_in" in row}
    head = ["engine", "FLOPs"]
    for name in datasets:
        head += [f"{name}: cosine", f"{name}: accuracy"] if name in labelled else [f"{name}: cosine"]
    body = []
    for engine, by_data in rows.items():
        first = next(iter(by_data.values()))
        cells = [engine, f"{first['flops_ratio']:.2f}"]
        for name in datasets:
            row = by_data[name]
            cells.append(f"{row['cosine_mean']:.4f}")
            if name in labelled:
                cells.append(f"{row['probe_drop_in']:.1%}")
        body.append(cells)
    first = next(iter(next(iter(rows.values())).values()))
    note = (
        f"{first['train_items']} training and {first['test_items']} test items of each set; standard error of an "
        f"accuracy about {first['standard_error']:.1%}. {_where(result)}"
    )
    return f"{table(head, body)}\n\n{note}"


def _speed(result: dict[str, Any]) -> str:
    head = ["model", "B", "engine", "nodes", "ideal", "speed-up (quartiles)", "realised / ideal"]
    head += ["inserted", "choosing"]
    body = []
    for row in result["rows"]:
        ratio = row.get("speedup")
        cells = [row["model"], str(row["batch"]), row["engine"], str(row["nodes"])]
        if ratio is None:
            cells += ["-", "1", "-", "-", "-"]
        else:
            cells += [
                f"{row['ideal_speedup']:.2f}x",
                f"{ratio['median']:.2f}x ({ratio['p25']:.2f}-{ratio['p75']:.2f})",
                f"{row['realised_share']:.0%}",
                f"{row['inserted_time_share']:.1%}",
                f"{row['choosing_time_share']:.1%}" if "choosing_time_share" in row else "-",
            ]
        body.append(cells)
    load = result["environment"].get("load_average_1min")
    return f"{table(head, body)}\n\n{result['rounds']} rounds, load average {load}. {_where(result)}"


def _compile_time(result: dict[str, Any]) -> str:
    plain = {row["layers"]: row["seconds"] for row in result["rows"] if row["how"] == "plain"}
    body = []
    for row in result["rows"]:
        known = "seconds" in row
        cells = [str(row["layers"]), row["how"], f"{row['seconds']:.1f}" if known else row["error"]]
        cells += [f"{row['seconds'] / plain[row['layers']]:.2f}x" if known and row["layers"] in plain else "-"]
        cells += [str(row["peak_mb"]), str(row["engine_mb"])] if known else ["-", "-"]
        body.append(cells)
    head = ["layers", "how", "seconds", "of the plain export", "peak MB", "engine MB"]
    return f"{table(head, body)}\n\n{_where(result)}"


def _perplexity(result: dict[str, Any]) -> str:
    """One row per method, contexts and budgets side by side."""
    places = dict.fromkeys((row["context"], row["budget"]) for row in result["rows"] if row["budget"] < 1)
    whole = {(r["method"], r["context"]): r for r in result["rows"] if r["budget"] == 1}
    found = {(r["method"], r["context"], r["budget"]): r for r in result["rows"]}
    head = ["method", *(f"{context}: {budget:.1%}" for context, budget in places)]
    body = []
    for method in dict.fromkeys(row["method"] for row in result["rows"]):
        cells = []
        for context, budget in places:
            row = whole.get((method, context)) or found.get((method, context, budget), {})
            cells.append(f"{row['perplexity']:.2f}" if "perplexity" in row else "refused" if "refused" in row else "-")
        body.append([f"`{method}`", *cells])
    piece = result["piece"]
    return f"{table(head, body)}\n\nRead in pieces of {piece} tokens. {_where(result)}"


def _perplexity_more(result: dict[str, Any]) -> str:
    """One row per method, one context and budget."""
    body = []
    for row in result["rows"]:
        held = f"{row['kv_bytes'] / 1e6:.1f}" if "kv_bytes" in row else "-"
        value = f"{row['perplexity']:.2f}" if "perplexity" in row else f"refused: {row['refused']}"
        body.append([f"`{row['method']}`", str(row["context"]), f"{row['budget']:.0%}", value, held])
    return f"{table(['method', 'context', 'budget', 'perplexity', 'KV MB'], body)}\n\n{_where(result)}"


def _decoder_speed(result: dict[str, Any]) -> str:
    body = []
    for row in result["rows"]:
        ratio = row.get("speedup")
        cells = [str(row["context"]), str(row["new"]), row["engine"], f"{row['ms']['median']:.1f}"]
        cells += [f"{row['kv_mb']:.1f}", f"{row['step_mb']:.0f}"]
        cells += ["1" if ratio is None else f"{ratio['median']:.2f}x ({ratio['p25']:.2f}-{ratio['p75']:.2f})"]
        body.append(cells)
    head = ["tokens before", "new tokens", "engine", "ms", "KV MB", "MB to read", "speed-up (quartiles)"]
    load = result["environment"].get("load_average_1min")
    return f"{table(head, body)}\n\nLoad average {load}. {_where(result)}"


def _visual_tokens(result: dict[str, Any]) -> str:
    """One table for each place: methods by rows, budgets side by side."""
    found = {tuple(row["engine"].split("/")): row for row in result["rows"]}
    base = found.pop(("baseline",))
    keeps = sorted({keep for _, _, keep in found}, key=float, reverse=True)
    parts = []
    for place, title, readouts in (
        ("behind", "Behind the encoder", ("mean",)),
        ("inside", "Inside the encoder", ("mean", "cls")),
    ):
        head = ["preset"]
        for keep in keeps:
            head += [f"{float(keep):.0%}: FLOPs"] if place == "inside" else []
            head += [f"{float(keep):.0%}: {readout}" for readout in readouts]
        methods = list(dict.fromkeys(name for own, name, _ in found if own == place))
        floors = [name for name in methods if name in ("random", "uniform")]
        body = []
        for name in [*floors, *(each for each in methods if each not in floors)]:
            cells = [f"*{name}*" if name in floors else f"`{name}`"]
            for keep in keeps:
                row = found.get((place, name, keep))
                cells += [f"{row['flops_ratio']:.2f}" if row else "-"] if place == "inside" else []
                cells += [_two(row[readout]) if row else "-" for readout in readouts]
            body.append(cells)
        whole = ", ".join(f"{readout} {base[readout]['probe_drop_in']:.1%}" for readout in readouts)
        parts.append(f"**{title}** (all tokens: {whole})\n\n{table(head, body)}")
    data, error = result["data"], base["mean"]["standard_error"]
    note = (
        f"Accuracy of a linear probe, drop-in / retrained, on {data['name']}: {data['train']} images to train, "
        f"{data['test']} to test; standard error about {error:.1%}. {_where(result)}"
    )
    return "\n\n".join([*parts, note])


def _two(row: dict[str, Any]) -> str:
    return f"{row['probe_drop_in']:.1%} / {row['probe_retrained']:.1%}"


def _vlm_speed(result: dict[str, Any]) -> str:
    body = []
    for row in result["rows"]:
        cells = [row["policy"], str(row["batch"]), f"{row['ms']['median']:.0f}"]
        if "ideal" in row:
            ratio = row["speedup"]
            cells += [f"{row['ideal']:.2f}x", f"{ratio['median']:.2f}x ({ratio['p25']:.2f}-{ratio['p75']:.2f})"]
            cells += [f"{row['realised_share']:.0%}", f"{row['choosing_share_of_saved']:.1%}"]
        else:
            cells += ["-"] * 4
        body.append(cells)
    head = ["policy", "B", "ms", "ideal", "speed-up (quartiles)", "realised / ideal", "choosing / saved"]
    load = result["environment"].get("load_average_1min")
    return f"{table(head, body)}\n\n{result['rounds']} rounds, load average {load}. {_where(result)}"


def _sparse_speed(result: dict[str, Any]) -> str:
    """Methods by rows, lengths side by side: speed-up over our own dense engine, and what the perplexity becomes."""
    found = {(row["method"], row["context"]): row for row in result["rows"]}
    contexts = sorted({context for _, context in found})
    body = []
    for method in dict.fromkeys(method for method, _ in found):
        even = result["break_even"].get(method)
        cells = [
            f"*{method}*" if method in ("none", "plain export") else f"`{method}`",
            "-" if even is None else str(even),
        ]
        for context in contexts:
            row = found.get((method, context), {})
            ratio, loss = row.get("speedup"), row.get("perplexity")
            dense = found.get(("none", context), {}).get("perplexity")
            cells.append("-" if ratio is None else f"{ratio['median']:.2f}x ({ratio['p25']:.2f}-{ratio['p75']:.2f})")
            change = f" ({loss / dense - 1:+.1%})" if loss and dense and method != "none" else ""
            cells.append(f"{loss:.2f}{change}" if loss else "-")
        body.append(cells)
    head = ["method", "break-even"]
    for context in contexts:
        head += [f"{context}: speed-up", f"{context}: perplexity"]
    load = result["environment"].get("load_average_1min")
    busy = f" Load of the machine before: {load:.1f}." if load is not None else ""
    return f"{table(head, body)}\n\n{result['what'].capitalize()}. {_where(result)}{busy}"


def _plain_prefill(result: dict[str, Any]) -> str:
    """Lengths and engines by rows: ratios to the plain export and to our own dense engine."""
    own = result.get("plain")
    if own is None:
        return "Not measured."
    body = []
    for row in sorted(own["rows"], key=lambda row: row["context"]):
        named = {"none": "tokcc none", "plain export": "plain export"}.get(row["method"], row["method"])
        cells = [str(row["context"]), f"`{named}`" if ":" in named else named, f"{row['ms']['median'] / 1000:.1f} s"]
        for key in ("over_plain", "speedup"):
            ratio = row.get(key)
            cells.append("1" if not ratio else f"{ratio['median']:.2f}x ({ratio['p25']:.2f}-{ratio['p75']:.2f})")
        body.append(cells)
    head = ["tokens", "engine", "median", "over the plain export (quartiles)", "over our dense engine"]
    load = own["environment"].get("load_average_1min")
    return f"{table(head, body)}\n\n{own['rounds']} rounds, {own['clock']} time, load average {load}. {_where(own)}"


def _aoti_speed(result: dict[str, Any]) -> str:
    """Engines by rows: the ratio to the same backend without reduction, and to the AOTInductor engine."""

    def ratio(row: dict[str, Any], key: str) -> str:
        found = row.get(key)
        return "-" if not found else f"{found['median']:.2f}x ({found['p25']:.2f}-{found['p75']:.2f})"

    body = [
        [
            row["model"],
            str(row["batch"]),
            row["engine"],
            f"{row['ms']['median']:.0f}",
            ratio(row, "speedup"),
            f"{row['realised_share']:.0%}" if "realised_share" in row else "-",
            ratio(row, "time_over_aoti_engine"),
        ]
        for row in result["rows"]
    ]
    head = ["model", "B", "engine", "ms", "speed-up (quartiles)", "realised / ideal", "time over the AOTI engine's"]
    load = result["environment"].get("load_average_1min")
    return f"{table(head, body)}\n\n{result['rounds']} rounds, load average {load}. {_where(result)}"


def _sparse_decode(result: dict[str, Any]) -> str:
    """Engines by rows: what a step takes, and the ratio to the two engines that read everything."""

    def ratio(row: dict[str, Any], key: str) -> str:
        found = row.get(key)
        return "-" if not found else f"{found['median']:.2f}x ({found['p25']:.2f}-{found['p75']:.2f})"

    head = ["tokens", "engine", "a step", "must read", "over copied caches", "over slots", "bound over slots"]
    body = [
        [
            str(row["context"]),
            f"*{row['engine']}*" if row["engine"].startswith("none") else f"`{row['engine']}`",
            f"{row['ms']['median']:.1f} ms",
            f"{row['least_mb']:.0f} MB",
            ratio(row, "over_merged"),
            ratio(row, "over_slots"),
            f"{row['bound_over_slots']:.2f}x",
        ]
        for row in result["rows"]
    ]
    load = result["environment"].get("load_average_1min")
    busy = f" Load of the machine before: {load:.1f}." if load is not None else ""
    return f"{table(head, body)}\n\n{result['what'].capitalize()}. {_where(result)}{busy}"


def _engine(cell: dict[str, Any]) -> str:
    return f"{cell['build_seconds']:.0f} s, {cell['engine_mib']:.0f} MiB, {cell['max_rel_diff']:.0e}"


def _tensorrt_real(result: dict[str, Any]) -> str:
    """Presets by rows, types side by side; below, why what was refused was."""
    cells: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for key, cell in result["cells"].items():
        *place, dtype = key.split("/")
        cells.setdefault(tuple(place), {})[dtype] = cell
    dtypes = ("fp32", "fp16", "bf16")
    body, why = [], {}
    for (model, preset, *layout), found in cells.items():
        row = [model, f"`{preset}`", layout[0] if layout else "-"]
        for dtype in dtypes:
            cell = found.get(dtype, {"status": "-"})
            built = cell["status"] == "built"
            row.append(_engine(cell) if built else cell["status"])
            if cell["status"] == "refused":
                why[f"`{preset}` on {model}{f' with {layout[0]}' if layout else ''}"] = cell["reason"].split(": ", 1)[1]
        body.append(row)
    models = "; ".join(f"{name}: {what}" for name, what in result["models"].items())
    refused = "".join(f"\n- {what}: {reason}" for what, reason in why.items())
    note = f"{models}. {result['builder']}. {_where(result)}"
    head = ["model", "preset", "caches", *(f"{dtype}: build, engines, difference" for dtype in dtypes)]
    return f"{table(head, body)}\n\n{note}" + (f"\n\nRefused:\n{refused}" if refused else "")


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "accuracy_image": _accuracy,
    "accuracy_text": _accuracy,
    "speed": _speed,
    "compile_time": _compile_time,
    "visual_tokens": _visual_tokens,
    "vlm_speed": _vlm_speed,
    "sparse_speed": _sparse_speed,
    "sparse_decode": _sparse_decode,
    "aoti_speed": _aoti_speed,
    "decoder_speed": _decoder_speed,
    "decoder_prefill": _decoder_speed,
    "perplexity": _perplexity,
    "perplexity_more": _perplexity_more,
    "tensorrt_real": _tensorrt_real,
}
FROM: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {"plain_prefill": ("sparse_speed", _plain_prefill)}
"""Further tables of a result file: from which, and how."""
PAGES = (
    "README.md",
    "docs/decoders.md",
    "docs/runtimes.md",
    "docs/sparse_attention.md",
    "docs/tensorrt.md",
    "docs/visual_tokens.md",
    "docs/vlm.md",
)


def render(name: str) -> str | None:
    """Return the table of a result file, or None when there is none yet."""
    file, made = FROM.get(name, (name, TABLES.get(name)))
    path = RESULTS / f"{file}.json"
    if not path.is_file() or made is None:
        return None
    return made(json.loads(path.read_text(encoding="utf-8")))


def pages() -> dict[str, str]:
    """Return what each page with tables should hold."""
    made = {presets_page.PAGE: presets_page.page()}
    for name in PAGES:
        text = (ROOT / name).read_text(encoding="utf-8")
        made[name] = re.sub(r"<!-- table:(\w+) -->(.*?)<!-- /table -->", _replaced, text, flags=re.DOTALL)
    return made


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    outdated = []
    for name, made in pages().items():
        page = ROOT / name
        if not page.is_file() or page.read_text(encoding="utf-8") != made:
            outdated.append(name)
            if not options.check:
                page.write_text(made, encoding="utf-8")
    if options.check:
        print(f"out of date: {', '.join(outdated)}; run tools/tables.py" if outdated else "all tables are current")
        return int(bool(outdated))
    return 0


def _replaced(match: re.Match[str]) -> str:
    made = render(match[1])
    body = match[2] if made is None else f"\n{made}\n"
    return f"<!-- table:{match[1]} -->{body}<!-- /table -->"


if __name__ == "__main__":
    sys.exit(main())
