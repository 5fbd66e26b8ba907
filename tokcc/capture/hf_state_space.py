"""State-space language models of transformers with their states as plain inputs and outputs.

``input_ids``, ``attention_mask``, ``past_key_values.N.conv_state/.ssm_state`` -> ``logits``,
``present.N.conv_state/.ssm_state``: the community's form of a decoder, with the names that Mamba's own code gives its
states.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional

import tokcc.kernels  # registers the operations

__all__ = ["StateSpaceDecoder", "States", "is_state_space", "state_space_dynamic", "state_space_inputs"]

assert tokcc.kernels is not None
States = list[dict[str, Tensor]]
_BATCH, _NEW, _SEEN = 2, 3, 8  # sizes of 0 and 1 would be fixed by the trace
_TYPES = {"mamba"}


def is_state_space(config: Any) -> bool:
    """Return whether a configuration is of an architecture that this recipe is written for."""
    return getattr(config, "model_type", None) in _TYPES


class StateSpaceDecoder(nn.Module):
    """Calls a Mamba language model with its states, a prompt and a single token in one graph.

    transformers has one path for a single token and one for more, which begins from zeros; this one begins from the
    given states for any number of tokens, so that a text may also come in pieces.

    Args:
        model: A causal language model. It stays as it is: the modules are copied, their weights are shared.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        shared = {id(x): x for x in (*model.parameters(), *model.buffers())}
        self.model = copy.deepcopy(model, shared)
        backbone: Any = self.model.get_submodule("backbone")
        for block in backbone.layers:
            block.mixer = _CarriedMixer(block.mixer)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past_key_values: States) -> dict[str, Any]:
        """Run one call.

        Args:
            input_ids: int64 ``[B, S]``.
            attention_mask: int64 ``[B, P + S]``, 1 = real token, for all tokens so far; padding on the left.
            past_key_values: ``conv_state`` ``[B, D, K]`` and ``ssm_state`` ``[B, D, N]`` of each layer; zeros before
                the first call.

        Returns:
            ``logits`` ``[B, S, V]``, and ``present`` like ``past_key_values``.
        """
        carried = [_Carried(layer["conv_state"], layer["ssm_state"]) for layer in past_key_values]
        new = input_ids.shape[1]
        own = attention_mask.narrow(1, attention_mask.shape[1] - new, new)
        result = self.model(input_ids=input_ids, attention_mask=own, cache_params=carried, use_cache=True)
        return {
            "logits": result.logits,
            "present": [{"conv_state": layer.conv, "ssm_state": layer.ssm} for layer in carried],
        }


@dataclass
class _Carried:
    """The states of one layer, before and after a call.

    Attributes:
        conv: ``[B, D, K]``: the last K inputs of the convolution.
        ssm: ``[B, D, N]``.
    """

    conv: Tensor
    ssm: Tensor


class _CarriedMixer(nn.Module):
    """What transformers' ``MambaMixer`` computes, with all tokens of a call in one recurrence.

    The formulas are those of Mamba (arXiv:2312.00752, algorithm 2) in the order and the types of transformers.

    Args:
        mixer: The model's own.
    """

    def __init__(self, mixer: Any) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, hidden_states: Tensor, cache_params: list[_Carried], attention_mask: Tensor) -> Tensor:
        """Mix ``[B, S, C]``; the layer's states in ``cache_params`` are replaced by those after the call."""
        own, dtype = self.mixer, hidden_states.dtype
        state, real = cache_params[own.layer_idx], attention_mask[:, :, None]
        inner, gate = own.in_proj((hidden_states * real).to(dtype)).transpose(1, 2).chunk(2, dim=1)  # [B, D, S]
        joined = torch.cat([state.conv, inner], dim=-1)
        weight, bias = own.conv1d.weight, own.conv1d.bias
        state.conv = joined[..., -own.conv_kernel_size :]
        # A state is as wide as the kernel, and the first output is that of the first new token.
        mixed = functional.conv1d(joined[..., 1:].to(weight.dtype), weight, bias, groups=own.intermediate_size)
        mixed = own.act(mixed).to(dtype).transpose(1, 2)  # [B, S, D]
        mixed = (mixed * real).to(dtype)
        sizes = [own.time_step_rank, own.ssm_state_size, own.ssm_state_size]
        step, b, c = own.x_proj(mixed).split(sizes, dim=-1)  # [B, S, rank], [B, S, N] twice
        step = own.dt_proj.weight @ step.transpose(1, 2)
        if own.dt_proj.bias is not None:
            step = step + own.dt_proj.bias.float().to(step.dtype)[..., None]
        # Tokens come first, as a scan wants them: [S, B, D, N].
        step = functional.softplus(step).permute(2, 0, 1)[..., None]
        decay = torch.exp(-torch.exp(own.A_log.float()) * step)
        update = step * b.transpose(0, 1)[:, :, None].float() * mixed.transpose(0, 1)[..., None].float()
        states = torch.ops.tokcc.recurrence.default(decay, update, 0, state.ssm)
        state.ssm = states[-1]
        scanned = (states.to(dtype) @ c.transpose(0, 1)[..., None]).squeeze(-1).permute(1, 2, 0)  # [B, D, S]
        scanned = scanned + mixed.transpose(1, 2) * own.D.float()[None, :, None]
        scanned = scanned * functional.silu(gate)
        made: Tensor = own.out_proj(scanned.transpose(1, 2).to(dtype))
        return made


def state_space_inputs(model: nn.Module, config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Return example inputs: a second call of a few tokens."""
    generator = torch.Generator().manual_seed(0)

    def state(width: int, kind: torch.dtype) -> Tensor:
        return torch.randn(_BATCH, config.intermediate_size, width, generator=generator).to(kind)

    backbone: Any = model.get_submodule("backbone")
    return {
        "input_ids": torch.randint(0, int(config.vocab_size), (_BATCH, _NEW), generator=generator),
        "attention_mask": torch.ones(_BATCH, _SEEN, dtype=torch.int64),
        "past_key_values": [
            # Scans run in fp32 whatever the weights are.
            {"conv_state": state(config.conv_kernel, dtype), "ssm_state": state(config.state_size, torch.float32)}
            for _ in backbone.layers
        ],
    }


def state_space_dynamic(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Make batch and new tokens dynamic; the length of the mask is a size of its own."""
    batch, new = Dim("batch", min=1), Dim("sequence", min=1)
    return {
        "input_ids": {0: batch, 1: new},
        "attention_mask": {0: batch, 1: Dim.DYNAMIC},
        "past_key_values": [{"conv_state": {0: batch}, "ssm_state": {0: batch}} for _ in inputs["past_key_values"]],
    }
