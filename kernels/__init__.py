"""The closed set of ``tokcc::`` operations: one folder each, with schema, fake and CPU reference.

Importing this package registers them with torch.
"""

from tokcc.kernels.attention_columns import attention_columns
from tokcc.kernels.attention_probs import attention_probs
from tokcc.kernels.block_maxima import block_maxima
from tokcc.kernels.block_sparse_attention import block_sparse_attention
from tokcc.kernels.cached_attention import cached_attention
from tokcc.kernels.choose_by_size import choose_by_size
from tokcc.kernels.cover_select import cover_select
from tokcc.kernels.diagonal_sums import diagonal_sums
from tokcc.kernels.dpp_select import dpp_select
from tokcc.kernels.gather_slots import gather_slots
from tokcc.kernels.gather_tokens import gather_tokens
from tokcc.kernels.greedy_select import greedy_select
from tokcc.kernels.merge_tokens import merge_tokens
from tokcc.kernels.recurrence import recurrence
from tokcc.kernels.retain_slots import retain_slots
from tokcc.kernels.scatter_tokens import scatter_tokens
from tokcc.kernels.sparse_decode import sparse_decode
from tokcc.kernels.split_blocks import split_blocks
from tokcc.kernels.topk_select import topk_select

__all__ = [
    "attention_columns",
    "attention_probs",
    "block_maxima",
    "block_sparse_attention",
    "cached_attention",
    "choose_by_size",
    "cover_select",
    "diagonal_sums",
    "dpp_select",
    "gather_slots",
    "gather_tokens",
    "greedy_select",
    "merge_tokens",
    "recurrence",
    "retain_slots",
    "scatter_tokens",
    "sparse_decode",
    "split_blocks",
    "topk_select",
]
