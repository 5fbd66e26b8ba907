"""The pt2 backend: the reduced program, loadable where tokcc is installed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tokcc.backends.feeds import Feeds
from tokcc.backends.parity import Check, Tolerance, check_parity
from tokcc.ir.program import Program

__all__ = ["save_pt2"]


def save_pt2(
    program: Program,
    path: Path,
    reference: Callable[[Feeds], list[torch.Tensor]],
    names: Sequence[str],
    feeds: Sequence[Feeds],
    tolerance: Tolerance,
) -> list[Check]:
    """Write a ``torch.export`` archive, load it again and compare it with the oracle."""
    from torch.utils import _pytree as pytree

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own use of its deprecated pytree classes
        torch.export.save(program.to_exported(), path)
        module = torch.export.load(path).module(check_guards=False)
    signature = program.origin.module_call_graph[0].signature
    inputs = [n.name for n in program.user_inputs if isinstance(n.meta.get("val"), torch.Tensor)]

    def run(arrays: Any) -> dict[str, Any]:
        leaves = [torch.as_tensor(arrays[name]) for name in inputs]
        with torch.no_grad():
            if signature is None:
                result = module(*leaves)
            else:
                args, kwargs = pytree.tree_unflatten(leaves, signature.in_spec)
                result = module(*args, **kwargs)
        tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        return {name: value.numpy() for name, value in zip(names, tensors, strict=True)}

    return check_parity(run, reference, names, feeds, tolerance)
