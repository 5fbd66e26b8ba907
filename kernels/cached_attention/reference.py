"""Reference of ``tokcc::cached_attention``: query blocks, so that no S x L matrix is held."""

import torch
from torch import Tensor

_BLOCK = 256


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: Tensor,
    window: int,
    scale: float,
    softcap: float,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`tokcc.kernels.cached_attention.cached_attention`."""
    rows, length = query.shape[2], key.shape[2]
    before = length - rows
    parts = []
    received = query.new_zeros([key.shape[0], key.shape[1], length], dtype=torch.float32)
    for start in range(0, rows, _BLOCK):
        stop = min(start + _BLOCK, rows)
        seen = before + stop
        probs = probabilities(
            query[:, :, start:stop],
            key[:, :, :seen],
            real[:, :seen],
            window,
            scale,
            softcap,
            None if bias is None else bias[:, :, :seen],
        )  # [B, Hkv, G, R, seen]
        parts.append(probs.to(value.dtype) @ value[:, :, None, :seen])
        counted = real[:, None, None, before + start : seen, None]
        received[:, :, :seen] += (probs.float() * counted).sum(3).mean(2)
    out = torch.cat(parts, 3) if parts else value.new_empty([*query.shape[:1], key.shape[1], 1, 0, value.shape[3]])
    return out.reshape(*query.shape[:3], value.shape[3]), received


def probabilities(
    query: Tensor, key: Tensor, real: Tensor, window: int, scale: float, softcap: float, bias: Tensor | None
) -> Tensor:
    """Return the probabilities ``[B, Hkv, G, R, L]`` of the last R slots' queries."""
    batch, heads, rows, width = query.shape
    groups, length = heads // key.shape[1], key.shape[2]
    grouped = query.reshape(batch, key.shape[1], groups, rows, width)
    logits = (grouped * scale) @ key[:, :, None].transpose(-1, -2)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias[:, :, None, None, :].to(logits.dtype)
    slot = torch.arange(length, device=key.device)
    own = slot[length - rows :, None]  # [R, 1]
    seen = (slot <= own) & ((slot > own - window) if window else torch.ones_like(slot, dtype=torch.bool))
    allowed = (seen & real[:, None, :]) | (slot == own)  # [B, R, L]
    logits = logits.masked_fill(~allowed[:, None, None], torch.finfo(logits.dtype).min)
    return torch.softmax(logits.float(), -1)
