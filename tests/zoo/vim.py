"""A tiny Vision Mamba (Vim, arXiv:2401.09417), written as its published code is: transformers has none.

Blocks keep a hidden and a residual stream; each runs a selective scan over the tokens and one over the tokens reversed,
with weights of their own, and the class token stands in the middle.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Vim", "VimBlock", "VimMixer", "selective_scan"]

Form = Literal["scan", "scan_inside", "loop"]


def selective_scan(u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, form: Form) -> Tensor:
    """Mamba's selective scan (arXiv:2312.00752, algorithm 2), discretised as its code does.

    Args:
        u: ``[B, E, N]``.
        dt: ``[B, E, N]``, behind the softplus.
        a: ``[E, S]``.
        b: ``[B, S, N]``.
        c: ``[B, S, N]``.
        d: ``[E]``.
        form: ``loop``: a loop in Python, as the reference code; ``scan``: torch's scan over what is discretised before;
            ``scan_inside``: torch's scan that discretises step by step.

    Returns:
        ``[B, E, N]``.
    """
    if form == "scan_inside":
        y = _scan_inside(u, dt, a, b, c)
    else:
        decay = torch.exp(torch.einsum("bdl,dn->bdln", dt, a))
        update = torch.einsum("bdl,bnl,bdl->bdln", dt, b, u)
        y = _loop(decay, update, c) if form == "loop" else _scan(decay, update, c)
    return y + u * d[:, None]


def _loop(decay: Tensor, update: Tensor, c: Tensor) -> Tensor:
    state = decay.new_zeros((decay.shape[0], decay.shape[1], decay.shape[3]))
    ys = []
    for i in range(decay.shape[2]):
        state = decay[:, :, i] * state + update[:, :, i]
        ys.append(torch.einsum("bdn,bn->bd", state, c[:, :, i]))
    return torch.stack(ys, dim=2)


def _scan(decay: Tensor, update: Tensor, c: Tensor) -> Tensor:
    from torch._higher_order_ops.scan import scan

    def step(state: Tensor, now: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        state = now[0] * state + now[1]
        return state, (state * now[2].unsqueeze(1)).sum(-1)

    first = torch.zeros_like(decay[:, :, 0])
    _, y = scan(step, first, (decay.movedim(2, 0), update.movedim(2, 0), c.movedim(2, 0)))
    return y.movedim(0, 2)  # type: ignore[no-any-return]  # torch's scan has no types


def _scan_inside(u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    from torch._higher_order_ops.scan import scan

    def step(state: Tensor, now: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        u_t, dt_t, b_t, c_t = now
        state = (dt_t.unsqueeze(-1) * a).exp() * state + (dt_t * u_t).unsqueeze(-1) * b_t.unsqueeze(1)
        return state, torch.matmul(state, c_t.unsqueeze(-1)).squeeze(-1)

    first = u.new_zeros((u.shape[0], u.shape[1], a.shape[1]))
    _, y = scan(step, first, tuple(x.movedim(2, 0) for x in (u, dt, b, c)))
    return y.movedim(0, 2)  # type: ignore[no-any-return]  # torch's scan has no types


class Direction(nn.Module):
    """What each direction of a mixer has of its own."""

    def __init__(self, inner: int, state: int, rank: int, width: int) -> None:
        super().__init__()
        self.conv1d = nn.Conv1d(inner, inner, width, groups=inner, padding=width - 1)
        self.x_proj = nn.Linear(inner, rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1, state + 1).float()).repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.split = [rank, state, state]

    def forward(self, x: Tensor, form: Form) -> Tensor:
        """``[B, E, N]`` -> ``[B, E, N]``."""
        x = F.silu(self.conv1d(x)[..., : x.shape[-1]])
        dt, b, c = self.x_proj(x.transpose(1, 2)).split(self.split, dim=-1)
        dt = F.softplus(self.dt_proj(dt)).transpose(1, 2)
        a = -torch.exp(self.A_log)
        return selective_scan(x, dt, a, b.transpose(1, 2), c.transpose(1, 2), self.D, form)


class VimMixer(nn.Module):
    """A scan in each direction over the same gated input, summed."""

    def __init__(self, width: int, state: int, rank: int, kernel: int, form: Form) -> None:
        super().__init__()
        self.in_proj = nn.Linear(width, 4 * width, bias=False)
        self.forward_direction = Direction(2 * width, state, rank, kernel)
        self.backward_direction = Direction(2 * width, state, rank, kernel)
        self.out_proj = nn.Linear(2 * width, width, bias=False)
        self.form: Form = form

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, D]`` -> ``[B, N, D]``."""
        x, gate = self.in_proj(x).transpose(1, 2).chunk(2, dim=1)
        y = self.forward_direction(x, self.form) * F.silu(gate)
        back = self.backward_direction(x.flip([-1]), self.form) * F.silu(gate.flip([-1]))
        return self.out_proj((y + back.flip([-1])).transpose(1, 2))  # type: ignore[no-any-return]  # a tensor


class VimBlock(nn.Module):
    """Add, norm, mix: the hidden stream is what the mixer returns, the residual one what was added up before it."""

    def __init__(self, width: int, state: int, rank: int, kernel: int, form: Form) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.mixer = VimMixer(width, state, rank, kernel, form)

    def forward(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both ``[B, N, D]``."""
        residual = hidden if residual is None else residual + hidden
        return self.mixer(self.norm(residual)), residual


class Vim(nn.Module):
    """``pixel_values [B, 3, side, side]`` -> ``logits``, and ``last_hidden_state`` where asked for.

    Args:
        side: Of the images.
        patch: Side of a patch.
        depth: Number of blocks.
        width: Of the streams.
        form: How the scan is written.
        tokens_out: Return the tokens too.
    """

    def __init__(
        self,
        *,
        side: int = 24,
        patch: int = 4,
        depth: int = 4,
        width: int = 16,
        state: int = 4,
        form: Form = "scan",
        tokens_out: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        count = (side // patch) ** 2
        self.patch_embed = nn.Conv2d(3, width, patch, stride=patch)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.5 * torch.randn(1, count + 1, width))
        self.layers = nn.ModuleList(VimBlock(width, state, 2, 4, form) for _ in range(depth))
        self.norm_f = nn.RMSNorm(width, eps=1e-5)
        self.head = nn.Linear(width, 7)
        self.middle = count // 2
        self.tokens_out = tokens_out
        for layer in self.layers:
            for weight in layer.mixer.parameters():  # type: ignore[union-attr]  # a module
                if weight.ndim == 2:
                    weight.data += torch.randn_like(weight) / math.sqrt(weight.shape[1]) / 2
        self.eval()

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Return the tokens in front of the first block."""
        x = self.patch_embed(pixel_values).flatten(2).transpose(1, 2)
        token = self.cls_token.expand(x.shape[0], -1, -1)
        x = torch.cat([x[:, : self.middle], token, x[:, self.middle :]], dim=1)
        return x + self.pos_embed

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Run the model."""
        hidden, residual = self.embed(pixel_values), None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual)
        x = self.norm_f(hidden + residual)
        found = {"logits": self.head(x[:, self.middle])}
        return {**found, "last_hidden_state": x} if self.tokens_out else found
