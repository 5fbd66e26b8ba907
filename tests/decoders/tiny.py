"""Small decoders of real architectures with random weights."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
import transformers
from torch import nn

from tokcc.capture.export import clean
from tokcc.capture.functional import functional
from tokcc.capture.hf_decoder import CausalDecoder, decoder_dynamic, decoder_inputs
from tokcc.ir.own_sizes import with_own_sizes
from tokcc.ir.program import Program

__all__ = ["FAMILIES", "decoder_program", "model_of", "program_of", "random_model"]

VOCABULARY = 97
_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_BASE, "num_key_value_heads": 2}
_LATENT = {
    **_BASE,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
}
# Name -> configuration class and its settings.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GROUPED),
    "llama-mqa": ("LlamaConfig", {**_BASE, "num_key_value_heads": 1}),
    "qwen2": ("Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3Config", {**_GROUPED, "head_dim": 16}),
    "mistral": ("MistralConfig", {**_GROUPED, "sliding_window": 8}),
    "gemma2": ("Gemma2Config", {**_GROUPED, "head_dim": 16, "sliding_window": 8}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **_GROUPED,
            "head_dim": 16,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
    ),
    "phi3": ("Phi3Config", _GROUPED),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 64,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 512,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt-neox": ("GPTNeoXConfig", _BASE),
    # Keys by a bias made from the values (Dynamic Mask Attention).
    "doge": ("DogeConfig", {**_GROUPED, "keep_window_size": 12}),
    "doge-mqa": ("DogeConfig", {**_BASE, "num_key_value_heads": 1, "keep_window_size": 12}),
    # A latent of each token in place of keys and values; the last one with an indexer that chooses tokens.
    "deepseek-v3": ("DeepseekV3Config", {**_LATENT, "first_k_dense_replace": 3}),
    "deepseek-v32": (
        "DeepseekV32Config",
        # Many heads: of few all products may be below 0, and ratings equal.
        {**_LATENT, "first_k_dense_replace": 3, "index_topk": 12, "index_head_dim": 16, "index_n_heads": 16},
    ),
    "falcon": ("FalconConfig", {**_BASE, "multi_query": True, "new_decoder_architecture": False, "alibi": False}),
}


@functools.cache
def model_of(family: str, attention: str = "eager") -> nn.Module:
    """A model in eval mode; equal weights for every attention implementation."""
    name, settings = FAMILIES[family]
    return random_model(getattr(transformers, name)(**settings), attention)


def random_model(config: Any, attention: str) -> nn.Module:
    """A causal model with random weights, in eval mode."""
    torch.manual_seed(0)
    try:
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    except ValueError:  # Gemma 2 has no fused attention
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    # Random weights of the usual size give nearly uniform attention: larger ones give every method something to choose.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
        for name, parameter in model.named_parameters():
            if name.endswith(".A"):  # zero before training: no key would be better than another
                parameter.normal_()
    return model.eval()


def program_of(family: str) -> Program:
    """The clean program of a family, with its cache as inputs and outputs: no two share what they know of sizes."""
    return with_own_sizes(_traced(family))


@functools.cache
def _traced(family: str) -> Program:
    return decoder_program(model_of(family, "sdpa"))


def decoder_program(model: nn.Module) -> Program:
    """Capture a model with its cache as inputs and outputs."""
    inputs = decoder_inputs(model, model.config, torch.float32)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(
            CausalDecoder(model).eval(), (), inputs, dynamic_shapes=decoder_dynamic(inputs), strict=False
        )
        return clean(Program.from_exported(functional(exported)))
