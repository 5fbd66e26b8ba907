"""The policies that the accuracy benchmark compares: four methods at three budgets each, for images and for text."""

from __future__ import annotations

from typing import Any

Policy = dict[str, Any]


def short(preset: str, **keys: Any) -> Policy:
    """A policy of one preset with parameters or long-form keys."""
    return {"version": 1, "name": preset, "steps": [{"preset": preset, **keys}]}


def _prune_then_merge(keep: float, r: int) -> Policy:
    """Drop once in the middle by the CLS row, then merge a little in every later layer."""
    return {
        "version": 1,
        "name": "prune-then-merge",
        "steps": [
            {
                "node": "prune",
                "at": {"layers": [4], "site": "after_attention"},
                "score": {"kind": "attention_rows", "rows": "cls", "heads": "mean"},
                "select": {"kind": "topk"},
                "reduce": {"kind": "drop"},
                "budget": {"keep": keep},
                "protect": {"first": 1},
            },
            {"preset": "tome", "at": {"layers": "5:"}, "budget": {"remove": r}},
        ],
    }


# Budgets are each paper's own; they are not matched in FLOPs, so compare methods along the FLOPs column. `random` drops
# at the same layers and rates as `evit`: a method that is not better than it has not found anything.
IMAGE: dict[str, Policy] = {
    **{f"tome r={r}": short("tome", r=r) for r in (8, 13, 18)},
    **{f"evit keep={keep}": short("evit", keep=keep) for keep in (0.9, 0.7, 0.5)},
    **{f"pitome keep={keep}": short("pitome", ratio=keep) for keep in (0.95, 0.925, 0.9)},
    **{f"random keep={keep}": short("random", keep=keep) for keep in (0.9, 0.7, 0.5)},
    "prune-then-merge 0.7, r=10": _prune_then_merge(keep=0.7, r=10),
}

TEXT: dict[str, Policy] = {
    **{f"power-bert keep={keep}": short("power-bert", keep=keep) for keep in (0.75, 0.5, 0.25)},
    **{f"spatten-topk keep={keep}": short("spatten-topk", keep=keep) for keep in (0.75, 0.5, 0.25)},
    **{f"tome keep={keep}": short("tome", budget={"keep": keep}) for keep in (0.95, 0.9, 0.8)},
    **{f"random keep={keep}": short("random", keep=keep) for keep in (0.9, 0.7, 0.5)},
}
