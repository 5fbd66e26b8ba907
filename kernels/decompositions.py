"""What each ``tokcc::`` operation is in aten operations, for backends that know no others.

A form must trace with symbolic sizes: the reference where it does, else the ``decomposition.py`` of the operation.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module, util
from typing import Any

import torch

from tokcc.kernels.attention_columns.reference import reference as attention_columns
from tokcc.kernels.attention_probs.reference import reference as attention_probs
from tokcc.kernels.block_maxima.reference import reference as block_maxima
from tokcc.kernels.block_sparse_attention.decomposition import decomposition as block_sparse_attention
from tokcc.kernels.cached_attention.decomposition import decomposition as cached_attention
from tokcc.kernels.choose_by_size.decomposition import decomposition as choose_by_size
from tokcc.kernels.diagonal_sums.reference import reference as diagonal_sums
from tokcc.kernels.gather_slots.reference import reference as gather_slots
from tokcc.kernels.gather_tokens.reference import reference as gather_tokens
from tokcc.kernels.gpu import has_triton
from tokcc.kernels.merge_tokens.reference import reference as merge_tokens
from tokcc.kernels.retain_slots.reference import reference as retain_slots
from tokcc.kernels.scatter_tokens.reference import reference as scatter_tokens
from tokcc.kernels.sparse_decode.reference import reference as sparse_decode
from tokcc.kernels.split_blocks.reference import reference as split_blocks
from tokcc.kernels.topk_select.reference import reference as topk_select

__all__ = ["DECOMPOSITIONS", "LOOPS", "overload", "triton_forms"]

DECOMPOSITIONS: dict[str, Callable[..., Any]] = {
    "attention_columns": attention_columns,
    "attention_probs": attention_probs,
    "block_maxima": block_maxima,
    "block_sparse_attention": block_sparse_attention,
    "cached_attention": cached_attention,
    "choose_by_size": choose_by_size,
    "diagonal_sums": diagonal_sums,
    "gather_slots": gather_slots,
    "gather_tokens": gather_tokens,
    "merge_tokens": merge_tokens,
    "retain_slots": retain_slots,
    "scatter_tokens": scatter_tokens,
    "sparse_decode": sparse_decode,
    "split_blocks": split_blocks,
    "topk_select": topk_select,
}
"""The form of each operation that has one, by name."""

LOOPS: dict[str, str] = {
    "cover_select": "it picks one token after another, each by what was picked before",
    "dpp_select": "it picks one token after another, each by what was picked before",
    "greedy_select": "it picks one token after another, each by what was picked before",
    "recurrence": "each state is made from the one before",
}
"""The operations that only a loop expresses, and why."""


def overload(name: str) -> Any:
    """Return an operation as it stands in graphs."""
    return getattr(torch.ops.tokcc, name).default


def triton_forms() -> dict[str, Callable[..., Any]]:
    """Return the operations as ``tokcc::<name>_triton``, which Inductor inlines for CUDA; empty without triton."""
    if not has_triton():
        return {}
    forms: dict[str, Callable[..., Any]] = {}
    for name in (*DECOMPOSITIONS, *LOOPS):
        package = f"tokcc.kernels.{name}"
        if util.find_spec(f"{package}.triton") is not None:
            form = getattr(import_module(f"{package}.triton"), f"{name}_triton", None)
            if form is not None:
                forms[name] = form
    return forms
