"""Small decoders with enough layers for several cuts; one token id stands for the image."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.decoders.tiny import decoder_program, random_model
from tokcc.ir.own_sizes import with_own_sizes
from tokcc.ir.program import Program

__all__ = ["IMAGE", "LAYERS", "VOCABULARY", "model_of", "program_of", "prompts", "texts"]

VOCABULARY, LAYERS, IMAGE = 97, 5, 90
_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_CONFIGS = {
    "llama": ("LlamaConfig", {}),
    "llama-mha": ("LlamaConfig", {"num_key_value_heads": 4}),
    "llama-mqa": ("LlamaConfig", {"num_key_value_heads": 1}),
    "qwen2": ("Qwen2Config", {}),
    "gpt2": (
        "GPT2Config",
        {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 512},
    ),
    "gpt-neox": ("GPTNeoXConfig", {}),
}


@functools.cache
def model_of(family: str, attention: str = "eager") -> nn.Module:
    """A model in eval mode; equal weights for every attention implementation."""
    name, settings = _CONFIGS[family]
    return random_model(getattr(transformers, name)(**{**_BASE, **settings}), attention)


def program_of(family: str) -> Program:
    """The clean program of a family, with its cache as inputs and outputs: no two share what they know of sizes."""
    return with_own_sizes(_traced(family))


@functools.cache
def _traced(family: str) -> Program:
    return decoder_program(model_of(family, "sdpa"))


def prompts(padding: tuple[int, ...], prompt: int, total: int, image: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random ids and left-padded masks ``[B, T]``; each prompt has ``image`` tokens of the image, in one piece.

    All tokens of the image have one id, and differ only by their positions, as far as the first layer goes.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, IMAGE, (len(padding), total), generator=generator)
    mask = torch.ones(len(padding), total, dtype=torch.int64)
    for row, count in enumerate(padding):
        mask[row, :count] = 0
        ids[row, :count] = 0
        start = count + 2 + row % 2
        assert start + image < prompt
        ids[row, start : start + image] = IMAGE
    return ids, mask


def texts(padding: Sequence[int], total: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows ``[B, T]`` of random tokens behind some padding, without any image, and their masks."""
    ids = torch.randint(3, IMAGE, (len(padding), total), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(total) >= torch.tensor(padding)[:, None]).long()
    return ids * mask, mask
