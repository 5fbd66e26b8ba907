"""``genai_config.json``: what onnxruntime-genai reads beside a decoder's engine with fixed slots."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx

from tokcc.backends.runtime_files import stop_tokens
from tokcc.capture.hf_decoder import CausalDecoder
from tokcc.capture.loaded import Loaded
from tokcc.errors import OutputError
from tokcc.ir.program import Program

__all__ = ["GENAI_CONFIG", "save_genai_config"]

GENAI_CONFIG = "genai_config.json"
_PAST = "past_key_values."
_ENDLESS = 2**20


def save_genai_config(
    loaded: Loaded, program: Program, engine: str, output: Path, *, slots: int | None = None
) -> tuple[str, ...]:
    """Write the configuration of a decoder whose caches are buffers of one fixed length.

    Args:
        loaded: The model.
        program: What was lowered.
        engine: Name of the engine's file.
        output: The bundle, with the model's own configuration in it.
        slots: How many tokens a sequence may have, where its caches say.

    Returns:
        Remarks for the report.

    Raises:
        OutputError: The file cannot be written.
    """
    if not isinstance(loaded.module, CausalDecoder):
        return (f"no {GENAI_CONFIG} is written: it takes a model that comes with its configuration",)
    widths = {
        int(node.meta["val"].shape[3])
        for node in program.user_inputs
        if program.public_name(node).startswith(_PAST) and program.public_name(node).endswith((".key", ".value"))
    }
    if len(widths) > 1:
        return (f"no {GENAI_CONFIG} is written: keys and values have different widths, and genai knows one",)
    config: Any = loaded.module.model.config
    content = _content(config.get_text_config(), program, engine, stop_tokens(output), slots)
    try:
        (output / GENAI_CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{GENAI_CONFIG} cannot be written", found=str(error)) from error
    return ()


def _content(config: Any, program: Program, engine: str, stops: tuple[int, ...], slots: int | None) -> dict[str, Any]:
    inputs = {program.public_name(node): node.meta["val"] for node in program.user_inputs}
    _, kv_heads, _, width = next(fake for name, fake in inputs.items() if name.startswith(_PAST)).shape
    vocabulary = int(_values(program)["logits"].shape[2])
    heads = _query_heads(program)
    trained = int(getattr(config, "max_position_embeddings", None) or 2**17)
    # Where positions are counted inside the cache, texts may be longer than anything the model was trained on.
    counted = any(program.public_name(node) == "position_ids" and not node.users for node in program.user_inputs)
    length = min(_ENDLESS if counted else trained, slots or _ENDLESS)
    ends = [token for token in stops or _ids(config.eos_token_id) if token < vocabulary] or [vocabulary - 1]
    pad = next((token for token in _ids(config.pad_token_id) if token < vocabulary), ends[0])
    first = next((token for token in _ids(config.bos_token_id) if token < vocabulary), ends[0])
    known = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
    decoder: dict[str, Any] = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": engine,
        "head_size": int(width),
        "hidden_size": int(getattr(config, "hidden_size", None) or heads * int(width)),
        "num_attention_heads": heads,
        "num_hidden_layers": sum(name.startswith(_PAST) and name.endswith(".key") for name in inputs),
        "num_key_value_heads": int(kv_heads),
        "inputs": {
            **known,
            "past_key_names": f"{_PAST}%d.key",
            "past_value_names": f"{_PAST}%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    model = {
        # The plain path: some names of models mean one that differs.
        "type": "decoder",
        "vocab_size": vocabulary,
        "context_length": length,
        "bos_token_id": first,
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
        "pad_token_id": pad,
        "decoder": decoder,
    }
    search = {"max_length": min(length, trained), "do_sample": False, "num_beams": 1, "past_present_share_buffer": True}
    return {"model": model, "search": search}


def _values(program: Program) -> Mapping[str, torch.Tensor]:
    nodes = (program.output_values[position] for position in program.user_output_positions)
    fakes = (node.meta["val"] for node in nodes if isinstance(node, fx.Node))
    return dict(zip(program.output_names, fakes, strict=True))


def _query_heads(program: Program) -> int:
    op = torch.ops.tokcc.cached_attention.default
    query: Any = next(node for node in program.graph.nodes if node.target is op).args[0]
    return int(query.meta["val"].shape[1])


def _ids(value: Any) -> list[int]:
    return [item for item in (value if isinstance(value, list | tuple) else [value]) if isinstance(item, int)]
