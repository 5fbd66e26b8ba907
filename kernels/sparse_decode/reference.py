"""Reference of ``tokcc::sparse_decode``, in aten operations for any shape."""

import torch
from torch import Tensor


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    count: Tensor,
    page: int,
    scale: float,
    valid: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """See :func:`tokcc.kernels.sparse_decode.sparse_decode`."""
    batch, heads, _, width = query.shape
    kv_heads, keys, lists = key.shape[1], key.shape[2], index.shape[1]
    device = index.device
    token = index[..., None].long() * page + torch.arange(page, device=device)
    real = (torch.arange(index.shape[2], device=device) < count[..., None])[..., None] & (token < keys)
    token, real = token.reshape(batch, lists, -1).clamp(max=keys - 1), real.reshape(batch, lists, -1)
    sample = torch.arange(batch, device=device)[:, None, None]
    if valid is not None:
        real = real & valid[sample, token]
    # Key heads are read through the lists of their query heads: one of all, one each, or one for each query head.
    own = torch.arange(max(lists, kv_heads), device=device)
    of_list, of_head = own * lists // own.shape[0], own * kv_heads // own.shape[0]
    token, real = token[:, of_list], real[:, of_list]  # [B, Hr, T]
    read = sample, of_head[None, :, None], token
    grouped = query.reshape(batch, own.shape[0], heads // own.shape[0], width).float()
    logits = (grouped * scale) @ key[read].float().transpose(-1, -2)  # [B, Hr, H / Hr, T]
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    allowed = real[:, :, None]
    probs = torch.softmax(logits.masked_fill(~allowed, torch.finfo(torch.float32).min), -1)
    probs = probs * allowed.any(-1, keepdim=True)
    return (probs @ value[read].float()).reshape(batch, heads, 1, value.shape[3]).to(query.dtype)
