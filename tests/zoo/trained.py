"""Random weights and profiles for presets that need some: what a piece asks for, with numbers for its symbols."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tokcc.config import LoadedPolicy, PieceSpec, Step, load_policy
from tokcc.ir.builder import EagerBuilder
from tokcc.passes.blocks import Blocks
from tokcc.passes.budget import resolve_budget
from tokcc.passes.cache.rating import TokenRating
from tokcc.passes.methods import library
from tokcc.passes.piece import Piece, Reducer, Score, Selector, parts_of, resolve_piece
from tokcc.passes.scan.piece import ScanSelector
from tokcc.passes.sparse.grids.piece import GridSelector
from tokcc.passes.sparse.piece import SparseScore, SparseSelector
from tokcc.passes.trained import Trained

__all__ = ["with_files"]

HEAD, OTHER = 8, 12
"""Width of a head of trained attention, and of everything that nothing else says the size of."""
SIZES = {
    "D": 20,
    "D_and_3": 23,
    "V": 97,
    "mlp_width": 24,
    "embedded": 16,
    "half": 8,
    "quarter": 4,
    "window_height": 2,
    "window_width": 2,
    "lengths": 4,
    "longer": 3,
}
_PIECES: tuple[tuple[str, type[Piece], str], ...] = (
    ("score", Score, "scores"),
    ("select", Selector, "selectors"),
    ("reduce", Reducer, "reducers"),
)
_SPARSE: tuple[tuple[str, type[Piece], str], ...] = (
    ("score", SparseScore, "sparse.scores"),
    ("select", SparseSelector, "sparse.selectors"),
)
_GRIDS: tuple[tuple[str, type[Piece], str], ...] = (("select", GridSelector, "sparse.grids.selectors"),)
_SCANS: tuple[tuple[str, type[Piece], str], ...] = (("select", ScanSelector, "scan.selectors"),)


def with_files(step: Mapping[str, Any], sizes: Mapping[str, int], tokens: int, folder: Path) -> dict[str, Any]:
    """Return a step of a preset with the files that it needs, written to a folder.

    Args:
        step: The step.
        sizes: What is known of the model: ``C``, ``heads``, ``head_width``, ``layers``.
        tokens: Candidates of the model, for weights whose shapes depend on how many are left.
        folder: Where files are written.
    """
    params, made = library()[step["preset"]].params, dict(step)
    for name, content in (("weights", "weights.safetensors"), ("profile", "profile.json")):
        if name in params and name not in step and (name != "profile" or params[name].default == ""):
            made[name] = str(folder / content)
    if "profile" in made:
        Path(made["profile"]).write_text(json.dumps(_tables(made, sizes["layers"])), encoding="utf-8")
    if "weights" not in made:
        return made
    policy = load_policy({"version": 1, "name": "trained", "steps": [made]}, presets=library())
    tensors = dict(_tensors(policy, sizes, tokens))
    if not tensors:
        del made["weights"]
        return made
    save_file(tensors, made["weights"])
    return made


def _tables(step: Mapping[str, Any], layers: int) -> dict[str, list[list[float]]]:
    """A number for every query head of every layer, all different."""
    blank = {**step, "profile": ""}
    preset = library()[step["preset"]]
    names = {name for own in preset.steps for key in ("highest", "lowest") for name in own["heads"].get(key, {})}
    generator = torch.Generator().manual_seed(len(blank))
    return {name: torch.rand(layers, 4, generator=generator).tolist() for name in sorted(names)}


def _tensors(policy: LoadedPolicy, sizes: Mapping[str, int], tokens: int) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for step in policy.policy.steps:
        known = {**SIZES, **sizes, **_counts(step, sizes["layers"], tokens)}
        for piece in parts_of(*_pieces(step)):
            if not isinstance(piece, Trained):
                continue
            for spec in piece.tensors(known):
                shape = [part if isinstance(part, int) else _size(part, piece, known) for part in spec.shape]
                if step.node == "filter_scan" and step.budget.tokens is not None:
                    yield spec.name, _measured(spec.name, shape, step.budget.tokens, generator)
                else:
                    yield spec.name, _values(spec.name, shape, generator)


def _pieces(step: Step) -> Iterator[Piece]:
    if step.node == "store_kv":
        if step.score is not None:
            yield resolve_piece(step.score, TokenRating, "cache.ratings", "trained")
        return
    sparse = _GRIDS if step.at.part == "encoder" else _SPARSE
    for key, base, folder in {"filter_scan": _SCANS, "sparse_attention": sparse}.get(step.node, _PIECES):
        spec: PieceSpec | None = getattr(step, key)
        if spec is not None:
            yield resolve_piece(spec, base, folder, "trained")


def _counts(step: Step, layers: int, tokens: int) -> dict[str, int]:
    """How many tokens are left (``P_i``) and gone (``r_i``) at the i-th chosen layer."""
    if step.node == "store_kv":
        return {}
    try:
        chosen = step.at.resolve(layers)
        counts = resolve_budget(step.budget, chosen, layers)
    except ValueError:
        return {"stages": 1}  # planning refuses it
    found, left = {"stages": len(chosen)}, tokens
    for i, count in enumerate(counts):
        kept = int(count.kept(EagerBuilder(), left, tokens))
        found |= {f"P_{i}": kept, f"r_{i}": left - max(kept, left - left // 2)}
        left = kept
    return found


def _size(symbol: str, piece: Trained, known: Mapping[str, int]) -> int:
    if symbol in known:
        return known[symbol]
    if isinstance(piece, Blocks) and symbol.endswith("_width"):
        heads = (piece.kv_heads or piece.heads) if symbol.endswith("key_width") else piece.heads
        return heads * HEAD
    return OTHER


def _measured(name: str, shape: list[int], tokens: int, generator: torch.Generator) -> Tensor:
    """Lengths of texts from that of the training on, and thresholds that some steps pass."""
    if name == "lengths":
        return tokens * torch.arange(1, shape[0] + 1)
    return 0.3 * torch.rand(shape, generator=generator)


def _values(name: str, shape: list[int], generator: torch.Generator) -> Tensor:
    """Numbers that keep activations near one."""
    values = torch.randn(shape, generator=generator)
    if "norm" in name:
        return 1 + 0.3 * values if name.endswith("weight") else 0.3 * values
    return values / shape[-1] ** 0.5 if len(shape) == 2 else values
