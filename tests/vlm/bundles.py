"""Bundles of the small models, and what transformers makes of the same prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tokcc
from tests.vlm.families import FAMILIES, IMAGE, Given, model_of, prompt_of
from tokcc.backends.bundle import Bundle
from tokcc.backends.vlm import Picture

__all__ = ["PROMPTS", "compiled", "given_for", "pictures", "theirs", "wanted_tokens"]

PROMPTS = [[1, 5, IMAGE, 7, 8], [1, IMAGE, 12, IMAGE, 4], [1, 9, 3]]
"""One placeholder for each picture: one picture, two, and none."""
NEW = 8
_TILED = ("idefics3", "smolvlm")


def compiled(family: str, out: Path, policy: str | Mapping[str, Any] = "none", **options: Any) -> Bundle:
    """Compile a small model."""
    settings = {"calibrate": False, "inputs": FAMILIES[family].inputs, **options}
    return tokcc.compile(model_of(family), policy, output=out, **settings)


def given_for(family: str) -> list[list[Given]]:
    """Return different pictures for the prompts above."""
    picture = FAMILIES[family].picture
    return [[picture(0)], [picture(1), picture(2)], []]


def pictures(given: Sequence[Given]) -> list[Picture]:
    """Return pictures for the engines."""
    return [
        Picture(item.units.numpy(), size=item.size, beside={k: v.numpy() for k, v in item.beside.items()})
        for item in given
    ]


def theirs(family: str, words: list[int], given: list[Given]) -> dict[str, Tensor]:
    """Return one prompt with its pictures as transformers' model takes them."""
    ids = torch.tensor([prompt_of(words, given)])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if given:
        axis = 1 if family in _TILED else 0
        inputs |= {name: torch.cat([item.theirs[name] for item in given], axis) for name in given[0].theirs}
        inputs |= FAMILIES[family].extra(ids)
    return inputs


def wanted_tokens(model: nn.Module, inputs: Mapping[str, Tensor], new: int = NEW) -> list[int]:
    """Return what transformers generates greedily."""
    with torch.no_grad():
        made = model.generate(**inputs, max_new_tokens=new, do_sample=False, eos_token_id=None)  # type: ignore[operator]
    start = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    return [int(token) for token in made[0, start:]]
