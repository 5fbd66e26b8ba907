"""``tokcc::block_sparse_attention`` in aten operations: the listed keys gathered for all blocks of queries at once."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def decomposition(
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
    """See :func:`tokcc.kernels.block_sparse_attention.block_sparse_attention`.

    The reference's loop over blocks of queries would fix their number while a program is traced.
    """
    batch, heads, rows, width = query.shape
    length, kv_heads, device = (key.shape[2] if valid is None else valid.shape[1]), key.shape[1], key.device
    # Lists of the key heads serve all query heads of a group at once, as further rows of a block.
    own = heads if index.shape[1] not in (1, kv_heads) else kv_heads
    index, count = (x.long().expand(batch, own, *x.shape[2:]) for x in (index, count))
    blocks, listed = index.shape[2], index.shape[3]
    inner = torch.arange(block_k, device=device)
    slots = (index[..., None] * block_k + inner).flatten(3)  # [B, h, MQ, K * bk]
    meant = (torch.arange(listed, device=device) < count[..., None])[..., None]
    meant = meant.expand(*meant.shape[:4], block_k).flatten(3) & (slots < length)
    slots = slots.clamp(max=length - 1)
    sample = torch.arange(batch, device=device)[:, None, None, None]
    head = torch.arange(own, device=device)[None, :, None, None] // (own // kv_heads)
    if valid is not None:
        meant = meant & valid[sample, slots]
    grouped = pad(query * scale, (0, 0, 0, blocks * block_q - rows))
    grouped = grouped.reshape(batch, own, heads // own, blocks, block_q, width).transpose(2, 3)
    grouped = grouped.reshape(batch, own, blocks, heads // own * block_q, width)
    logits = grouped @ key[sample, head, slots].transpose(-1, -2)  # [B, h, MQ, G * bq, K * bk]
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias[sample, head, slots][:, :, :, None].to(logits.dtype)
    seen = meant[:, :, :, None]
    if causal:
        place = torch.arange(blocks * block_q, device=device).reshape(blocks, 1, block_q) + (length - rows)
        place = place.expand(blocks, heads // own, block_q).flatten(1)[..., None]  # [MQ, G * bq, 1]
        seen = seen & (slots[:, :, :, None] <= place)
    logits = logits.masked_fill(~seen, torch.finfo(logits.dtype).min)
    out = torch.softmax(logits.float(), -1).to(value.dtype) @ value[sample, head, slots]
    out = out.reshape(batch, own, blocks, heads // own, block_q, value.shape[3]).transpose(2, 3)
    return out.reshape(batch, heads, blocks * block_q, value.shape[3])[:, :, :rows].contiguous()
