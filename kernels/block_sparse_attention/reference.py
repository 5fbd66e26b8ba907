"""Reference of ``tokcc::block_sparse_attention``: one block of queries after the other."""

import torch
from torch import Tensor


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    count: Tensor,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
    valid: Tensor | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """See :func:`tokcc.kernels.block_sparse_attention.block_sparse_attention`."""
    batch, heads, rows, _ = query.shape
    length, kv_heads = (key.shape[2] if valid is None else valid.shape[1]), key.shape[1]
    slot = torch.arange(length, device=key.device)
    index, count = (x.long().repeat_interleave(heads // index.shape[1], 1) for x in (index, count))
    out = query.new_zeros([batch, heads, rows, value.shape[3]])
    sample = torch.arange(batch, device=key.device)[:, None, None]
    own_head = torch.arange(heads, device=key.device)[None, :, None] // (heads // kv_heads)
    for number, start in enumerate(range(0, rows, block_q)):
        stop = min(start + block_q, rows)
        most = int(count[:, :, number].max())
        blocks = index[:, :, number, :most]  # [B, H, n]
        meant = torch.arange(most, device=key.device) < count[:, :, number, None]
        slots = (blocks[..., None] * block_k + torch.arange(block_k, device=key.device)).flatten(2)  # [B, H, n * bk]
        meant = meant.repeat_interleave(block_k, 2) & (slots < length)
        slots = slots.clamp(max=length - 1)
        if valid is not None:
            meant = meant & valid[sample, slots]
        logits = (query[:, :, start:stop] * scale) @ key[sample, own_head, slots].transpose(2, 3)  # [B, H, R, n * bk]
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        if bias is not None:
            logits = logits + bias[sample, own_head, slots][:, :, None].to(logits.dtype)
        seen = meant[:, :, None]
        if causal:
            own = slot[length - rows + start : length - rows + stop]
            seen = seen & (slots[:, :, None] <= own[:, None])
        logits = logits.masked_fill(~seen, torch.finfo(logits.dtype).min)
        probs = torch.softmax(logits.float(), -1).to(value.dtype)
        out[:, :, start:stop] = probs @ value[sample, own_head, slots]
    return out
