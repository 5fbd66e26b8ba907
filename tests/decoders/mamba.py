"""A small Mamba with random weights, its program, and engines of it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM

from tokcc.backends.generation.decoder import DecoderEngine
from tokcc.backends.onnx import build_onnx, save_onnx
from tokcc.capture.export import capture
from tokcc.capture.hf_state_space import StateSpaceDecoder, state_space_dynamic, state_space_inputs
from tokcc.capture.loaded import Loaded
from tokcc.config import load_policy
from tokcc.ir.program import Program
from tokcc.passes.methods import library
from tokcc.pipeline.reducing import Reduced, reduce_program
from tokcc.pipeline.stages import Stages

__all__ = ["LAYERS", "VOCABULARY", "engine", "mamba", "padded", "program", "read", "reduced"]

VOCABULARY, LAYERS = 97, 2


@functools.cache
def mamba() -> MambaForCausalLM:
    """Large projections and steps, so that what a state holds matters to the logits."""
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        state_size=4,
        num_hidden_layers=LAYERS,
        time_step_rank=3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = MambaForCausalLM(config).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(4.0)
        for block in model.backbone.layers:
            block.mixer.A_log.sub_(1.5)
            block.mixer.conv1d.weight.mul_(2.0)
            block.mixer.dt_proj.bias.add_(2.0)
    return model


@functools.cache
def program() -> Program:
    """The clean program, with states as inputs and outputs."""
    model = mamba()
    inputs = state_space_inputs(model, model.config, torch.float32)
    return capture(
        Loaded(
            source="mamba",
            module=StateSpaceDecoder(model).eval(),
            exported=None,
            example_args=(),
            example_kwargs=inputs,
            dynamic_shapes=state_space_dynamic(inputs),
            task="text-generation",
            preprocessor=None,
        )
    )


def reduced(policy: str | Mapping[str, Any]) -> Reduced:
    """Apply a policy."""
    return reduce_program(program(), load_policy(policy, presets=library()), Stages())


def engine(policy: str | Mapping[str, Any], folder: Path) -> DecoderEngine:
    """Apply a policy and lower what comes out."""
    path = folder / "model.onnx"
    save_onnx(build_onnx(reduced(policy).sliced), path)
    return DecoderEngine(path, threads=1)


def padded(rows: int, tokens: int, padding: int = 0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return random ids ``[B, T]`` and their mask, with padding in front of the second row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
    mask = torch.ones(rows, tokens, dtype=torch.int64)
    if rows > 1:
        mask[1, :padding] = 0
        ids[1, :padding] = 0
    return ids, mask


def read(
    made: DecoderEngine, ids: Tensor, mask: Tensor, lengths: Sequence[int]
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Yield logits ``[B, S, V]`` and states after each call."""
    past, start = made.empty_past(len(ids)), 0
    for length in lengths:
        stop = start + length
        given = (x.numpy().astype(np.int64) for x in (ids[:, start:stop], mask[:, :stop], mask[:, start:stop]))
        logits, past = made.read(*given, past)
        yield torch.from_numpy(logits), {name: torch.from_numpy(value) for name, value in past.items()}
        start = stop
