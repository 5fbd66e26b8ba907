"""The page docs/presets.md: every method of the library, from its YAML file, the tests and the measurements."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tokcc.config import Preset
from tokcc.passes.methods import load_presets
from tools.markdown import table

ROOT = Path(__file__).resolve().parents[1]
PAGE = "docs/presets.md"
METHODS = ROOT / "passes" / "methods"
RESULTS = ROOT / "benchmarks" / "results"
MATRIX = RESULTS / "contract_matrix.json"
ORACLES = ("tests/passes/methods", "tests/decoders/methods", "tests/prompt", "tests/sparse/methods")
"""Folders of the tests that compare a method with a brute force of its paper."""

_INTRO = """# The presets

{count} methods. `tokcc presets` prints this list, `tokcc presets --show NAME` a method in the long form with its
parameters, `tokcc inspect MODEL` which of them fit a model and why others do not, and
`tokcc gallery --image photo.jpg` draws what those for images keep.

**Written after**: `code` the authors' code, `paper` the paper's formulas, `abstract` only its summary; what is left out
or approximated is in the notes of `--show`. **Oracle**: the test that compares the method with an independent brute
force of its rule. **Fits**: on how many architectures of the contract matrix (`tests/zoo/contract.py`, tiny models with
random weights) its engine equals the eager oracle; on the others it is refused with a reason and what to do, see below.
**Measured**: the files of `benchmarks/results` that have numbers of it.

Written by `python tools/tables.py` from `passes/methods`, `tests` and `benchmarks/results`; do not edit by hand.
"""
_SECTIONS = (
    ("Tokens inside and behind encoders", "encoder"),
    ("Tokens of a decoder's prompt", "prompt"),
    ("Caches of decoders", "cache"),
    ("Sparse attention of decoders", "sparse"),
    ("Scans of state-space decoders", "scan"),
)
_LABELS = ("engine", "method", "preset", "how")
"""Keys of a result's rows that say what was measured."""


def page() -> str:
    """Return the page."""
    every = load_presets(METHODS)
    parts = [_INTRO.format(count=len(every))]
    for title, kind in _SECTIONS:
        rows = [_row(preset, every) for preset in every.values() if kind_of(preset) == kind]
        parts.append(f"## {title} ({len(rows)})\n\n{_table(rows)}\n")
    parts.append(_architectures(every))
    return "\n".join(parts)


def _architectures(every: Mapping[str, Preset]) -> str:
    """Return a section with what fits each architecture and what is refused."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, cells in _matrix().items():
        for status, models in cells.items() if name in every else ():
            for model in models:
                found.setdefault(model, {}).setdefault(status, []).append(f"`{name}`")
    rows = []
    for model, by_status in sorted(found.items()):
        runs, refused = (by_status.get(status, []) for status in ("ok", "refused"))
        rows.append([f"`{model}`", f"{len(runs)} of {len(runs) + len(refused)}", ", ".join(refused) or "-"])
    return (
        f"## Architectures ({len(rows)})\n\nWhat the [contract matrix]({_link(MATRIX)}) has of each; `@dynamic` is "
        "with symbolic batch and\nlength. A method for encoders fits no decoder, and the other way round; one for "
        "scans fits state-space\ndecoders alone.\n\n"
        f"{table(['architecture', 'run', 'refused'], rows)}\n"
    )


@cache
def _matrix() -> dict[str, dict[str, dict[str, Any]]]:
    """Return by preset and status the models of the contract matrix."""
    if not MATRIX.is_file():
        return {}
    cells: dict[str, dict[str, dict[str, Any]]] = json.loads(MATRIX.read_text(encoding="utf-8"))["presets"]
    return cells


def _fits(name: str) -> str:
    by_status = _matrix().get(name, {})
    runs, refused = (sum("@" not in model for model in by_status.get(status, ())) for status in ("ok", "refused"))
    return f"[{runs} of {runs + refused}]({_link(MATRIX)})" if runs + refused else "-"


def _link(path: Path) -> str:
    return f"../{path.relative_to(ROOT).as_posix()}"


def oracle_test(name: str, every: Mapping[str, Preset]) -> Path | None:
    """Return the test file of a method: named after it, else the one that names it and the fewest others.

    Args:
        name: Of the preset.
        every: All presets.
    """
    files = {path: named for path, named in _named_in_tests(tuple(every)).items() if named[name]}
    own = [path for path in files if path.stem.removeprefix("test_").replace("_", "-") == name]
    return min(own or files, key=lambda path: (len(files[path]), -files[path][name], path), default=None)


@cache
def _named_in_tests(names: tuple[str, ...]) -> dict[Path, Counter[str]]:
    """Return how often each test file names each preset, in code: as a string or inside of one in backticks."""
    found = {}
    for folder in ORACLES:
        for path in sorted((ROOT / folder).glob("test_*.py")):
            strings = [
                node.value
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(node, ast.Constant) and isinstance(node.value, str)
            ]
            words = Counter(word for text in strings for word in {text, *re.findall(r"`([^`]+)`", text)})
            found[path] = Counter({name: words[name] for name in names if words[name]})
    return found


def measured_in(name: str) -> list[str]:
    """Return the names of the result files that have numbers of a method."""
    return [stem for stem, names in _named_in_results().items() if name in names]


@cache
def _named_in_results() -> dict[str, frozenset[str]]:
    found = {}
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        labels = [str(row[key]) for row in result.get("rows", ()) for key in _LABELS if key in row]
        words = {word for label in labels for word in _words(label.removeprefix("tokcc-"))}
        # In a sentence `random` is a word; `streaming-llm` can only be the method.
        words |= {word for word in _words(str(result.get("what", ""))) if "-" in word}
        found[path.stem] = frozenset(words | set(_presets_of(result.get("policies"))))
    return found


def _words(text: str) -> list[str]:
    return re.findall(r"[\w.-]+", text)


def _presets_of(value: Any) -> Iterator[str]:
    """Yield the presets that policies use, at any depth."""
    if isinstance(value, Mapping):
        if isinstance(value.get("preset"), str):
            yield value["preset"]
        for item in value.values():
            yield from _presets_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from _presets_of(item)


def kind_of(preset: Preset) -> str:
    """Return what a preset is for: `encoder`, `prompt`, `cache`, `sparse` or `scan`."""
    if "filter_scan" in preset.nodes:
        return "scan"
    sparse = [step for step in preset.steps if step["node"] == "sparse_attention"]
    if any(step.get("at", {}).get("part") != "encoder" for step in sparse):
        return "sparse"
    if any(node in ("evict_kv", "store_kv", "bias_attention") for node in preset.nodes):
        return "cache"
    of_prompt = any(step["node"] == "unmerge" or step.get("at", {}).get("part") == "decoder" for step in preset.steps)
    return "prompt" if of_prompt else "encoder"


def _row(preset: Preset, every: Mapping[str, Preset]) -> list[str]:
    test = oracle_test(preset.name, every)
    source = f"[`{preset.name}`](../passes/methods/{preset.name}.yaml)"
    oracle = "-" if test is None else f"[{test.stem}](../{test.relative_to(ROOT).as_posix()})"
    measured = ", ".join(f"[{stem}](../benchmarks/results/{stem}.json)" for stem in measured_in(preset.name)) or "-"
    needs = ", ".join(preset.needs) or "-"
    cells = [source, preset.title, _paper(preset.paper), ", ".join(preset.nodes), needs, preset.fidelity]
    return [cell.replace("|", "\\|") for cell in [*cells, oracle, _fits(preset.name), measured]]


def _paper(paper: str) -> str:
    number = re.fullmatch(r"arXiv:(\d{4}\.\d{4,5})", paper)
    return f"[{paper}](https://arxiv.org/abs/{number[1]})" if number else paper


def _table(rows: list[list[str]]) -> str:
    return table(["preset", "method", "paper", "nodes", "needs", "written after", "oracle", "fits", "measured"], rows)
