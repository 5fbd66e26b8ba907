"""The closed set of ``tokcc::`` operations: one folder each, with schema, fake and CPU reference.

Importing this package registers them with torch.
"""

from tokcc.kernels.attention_probs import attention_probs
from tokcc.kernels.gather_tokens import gather_tokens
from tokcc.kernels.greedy_select import greedy_select
from tokcc.kernels.merge_tokens import merge_tokens
from tokcc.kernels.scatter_tokens import scatter_tokens
from tokcc.kernels.topk_select import topk_select

__all__ = ["attention_probs", "gather_tokens", "greedy_select", "merge_tokens", "scatter_tokens", "topk_select"]
