"""Arguments for presets on small models, where their defaults are for big ones.

A default counts tokens (64 of 576), layers (2, 5 and 8 of 12) or targets in a vocabulary; a tiny model has 21 to 65
tokens, 3 or 4 layers and 97 words. Presets that are not listed run with their defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["ARGUMENTS", "PICTURE", "PICTURE_ID", "arguments"]

PICTURE, PICTURE_ID = 12, 90
"""Tokens of the picture in a decoder's prompt, and their id."""
_CACHE = {"tokens": 8}
_WINDOWED = {**_CACHE, "window": 3}
_SINGLE = {"tokens": 8, "length": 0, "at": {"layers": "1:"}}
"""For single tokens, whose first layers stay as they are."""

_BLOCKS = {"block": 2, "sinks": 1, "local": 0}

ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    # Encoders: 4 layers, 21 (text) or 64 tokens beside special ones.
    "biformer": {"regions": 4, "k": 3},
    "cdpruner": {"tokens": 12},
    "dymu": {"r": 5},
    "dynamicvit": {"at": {"layers": [0, 1, 2]}},
    "embedlens-drop": {"targets": [3, 7, 11]},
    "fastervlm": {"tokens": 12},
    "flashvlm": {"tokens": 12},
    "flowcut": {"at": {"layers": [0, 2]}, "schedule": [18, 12]},
    "focus-detr": {"keep": [0.5, 0.4, 0.3, 0.3], "levels": [[8, 8]], "protect": {"first": 1}},
    "hiprune": {"tokens": 16, "alpha": 0.5},
    "mmtok": {"tokens": 12},
    "prumerge": {"tokens": 12},
    "prumerge-plus": {"tokens": 16},
    "mustdrop": {"side": 2, "remove": 12},
    "pyra": {"r": 5},
    "quecc": {"tokens": 16},
    "segpruner": {"tokens": 12},
    "sit-slim": {"at": {"layers": [0, 1, 2]}},
    "todre": {"keep": 0.2, "against": "all"},
    "token-corr": {"similar": 0.3},
    "tome": {"r": 5},
    "visiondrop": {"tokens": 16},
    "visionzip": {"tokens": 16, "contextual": 6},
    "vispruner": {"tokens": 16},
    "vqtoken": {"tokens": 10},
    "vtc-cls": {"tokens": 12},
    "zoo-prune": {"tokens": 12, "directions": 4},
    # Prompts: 3 layers, 12 tokens of a picture.
    "adaptinfer": {"layers": [0, 1], "tokens": [8, 4]},
    "adatoken-3d": {"layers": [0, 1], "keep": [0.7, 0.4]},
    "adsc": {"layers": [0, 1]},
    "atp-llava": {"layers": [0, 1], "tokens": [8, 6], "width": 4, "stride": 2},
    "corematching": {"layer": 1},
    "gem-filter": {"layer": 1, "tokens": 8},
    "gemfilter": {"layer": 1, "tokens": 8},
    "lazyllm-prefill": {"layers": [0, 1], "keep": [0.7, 0.4]},
    "mustdrop-llm": {"layers": [0, 1], "keep": [0.5, 0.25]},
    "promptdistill": {"layers": [1], "tokens": [9]},
    "pyramiddrop": {"layers": [0, 1], "keep": [0.5, 0.25]},
    "sparsevlm": {"layers": [0, 1], "tokens": [9, 5]},
    "specpc": {"tokens": 7, "window": 3, "kernel": 6, "neighbours": 4},
    "todre-llm": {"layers": [1]},
    "transprune": {"layers": [0, 1], "keep": [0.75, 0.25], "first": 0},
    "vflowopt-llm": {"layers": [0, 1], "keep": [0.75, 0.5]},
    "visiondrop-llm": {"layers": [0, 1], "tokens": [8, 5], "contextual": 2},
    # Caches: 3 layers, calls of 12, 1, 1, 6, 1, ... tokens.
    "adakv": _WINDOWED,
    "audiokv": {"high": 9, "low": 6, "window": 3},
    "chunkkv": {**_WINDOWED, "chunk": 2},
    "compresskv": {**_WINDOWED, "least": 5, "raters": [[0, 3], [2], [1, 2]], "errors": [0.5, 2.0, 1.0]},
    "critic-kv": {**_WINDOWED, "sinks": 1},
    "dapq": {**_WINDOWED, "sinks": 1},
    "dont-waste-bits": {"every": 10},
    "double-sparsity": {**_SINGLE, "channels": 4, "of": "query", "table": [[[0, 9, 4, 13]] * 4] * 3},
    "duo-attention": {"sinks": 2, "recent": 6},
    "elastic-cache-vlm": {**_CACHE, "offset": 2},
    "ems": {**_WINDOWED, "sinks": 1},
    "expected-attention": {**_CACHE, "ahead": 8},
    "fasa": {"tokens": 6, "pairs": 2, "length": 0, "of": "query", "table": [[[[0, 8], [3, 11]]] * 4] * 3},
    "h2o": _CACHE,
    "keydiff": _CACHE,
    "keyformer": {**_CACHE, "over": 16},
    "knorm": _CACHE,
    "lagkv": {**_CACHE, "chunk": 3, "sinks": 1},
    "mpcache": {**_CACHE, "recent": 3, "page": 2},
    "oscar": {"group": 4, "tail": 8},
    "pyramidkv": _WINDOWED,
    "icecache": {**_SINGLE, "page": 2, "local": 0, "halvings": 2},
    "leoam": {**_SINGLE, "chunk": 4},
    "quest": {**_SINGLE, "page": 4},
    "razor-attention": {"sinks": 2, "recent": 6, "echo": 0.09, "induction": 0.0},
    "sinklora": _CACHE,
    "snapkv": _WINDOWED,
    "speckv": _WINDOWED,
    "still": {**_CACHE, "window": 4, "recent": 3},
    "streaming-llm": _CACHE,
    "tidal-decode": {"tokens": 6, "chosen_in": [0], "layers": "0:", "length": 0},
    "think": {"recent": 4, "window": 4},
    "tova": _CACHE,
    "zipcache": {"every": 10},
    # Sparse attention: the same calls, whose blocks would be as long as they are.
    "actqkv": {"tokens": 4, "window": 2, **_BLOCKS, "near": 2, "representatives": 1, "length": 0},
    "dma": {"tokens": 7, "rows": 2, "length": 0},
    "landmark": {"token": 5, "block": 4, "tokens": 4},
    "dhsa": {"block": 4, "chunk": 2, "keep": 0.5, "sinks": 0, "local": 0, "length": 0},
    "flex-prefill": {"block": 2, "mass": 0.4, "divergence": 0.2, "least": 2, "length": 0},
    "hisa": {"tokens": 4, "block": 2, "candidates": 3, "length": 0},
    "hip": {"block": 2, "found": 2, "sinks": 0, "local": 0, "longest": 64, "length": 0},
    "minference": {"block": 2, "columns": 2, "distances": 2, "queries": 4, "first": 1, "near": 1, "length": 0},
    "sale": {"block": 2, "key_block": 2, "sinks": 1, "near": 0, "theta": 0.4, "length": 0},
    "seer-attention": {"block": 2, "above": 0.2, "length": 0},
    "seer-attention-r": {"block": 2, "tokens": 8, "length": 0},
    "token-select": {"chunk": 4, "tokens": 7, "sinks": 1, "scaled": True, "length": 0},
    "token-sparse-attn": {"window": 2, "kernel": 3, "least": 1, "length": 0},
    "xattention": {"block": 4, "key_block": 4, "stride": 2, "mass": 0.5, "length": 0},
    # Scans: 2 layers, texts of as many tokens as in the calls for caches.
    "longmamba": {"train_length": 12},
}


def arguments(preset: str) -> dict[str, Any]:
    """Return a step of a preset that removes something from a tiny model."""
    return {"preset": preset, **ARGUMENTS.get(preset, {})}
