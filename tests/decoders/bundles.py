"""A tiny decoder in a folder with a tokenizer, and bundles compiled from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers

import tokcc
from tests.decoders.tiny import VOCABULARY, model_of
from tokcc.backends.bundle import Bundle

__all__ = ["CAPACITY", "POLICIES", "compiled", "model_folder"]

CAPACITY = 12
POLICIES: dict[str, str | dict[str, Any]] = {
    "none": "none",
    "h2o": {"version": 1, "name": "h2o", "steps": [{"preset": "h2o", "tokens": CAPACITY}]},
    "tova": {"version": 1, "name": "tova", "steps": [{"preset": "tova", "tokens": CAPACITY}]},
    "keyformer": {"version": 1, "name": "keyformer", "steps": [{"preset": "keyformer", "tokens": CAPACITY}]},
}


def model_folder(path: Path, family: str = "llama", *, tokenizer: bool = True) -> Path:
    """Save a tiny model as Hugging Face folders are, with a tokenizer of the words `w0`, `w1`, ..."""
    model_of(family, "sdpa").save_pretrained(path)
    if tokenizer:
        words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
        made = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<pad>"))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        made.add_special_tokens(["<pad>", "<s>", "</s>"])
        made.save(str(path / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "<pad>"}
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def compiled(folder: Path, out: Path, policy: str | Mapping[str, Any], **options: Any) -> Bundle:
    """Compile a model folder."""
    options = {"task": "text-generation", "calibrate": False, **options}
    return tokcc.compile(
        folder, POLICIES.get(policy, policy) if isinstance(policy, str) else policy, output=out, **options
    )
