"""A timm model as it is: ``vit_small_patch16_224`` with random weights (timm's own need a download).

timm is optional. It imports torchvision, which must be built for the installed torch (a mismatched one also breaks the
import of transformers' models, so an environment of its own is the safe place for this example).

    tokcc compile examples/timm_vit.py:vit_small --policy examples/policies/tome.yaml -o out/
"""

from __future__ import annotations

import importlib

import torch
from torch import nn

INSTALL = "this example needs timm and a torchvision built for the installed torch; see the head of the file"


def create(name: str = "vit_small_patch16_224", seed: int = 0) -> nn.Module:
    """Create a timm model with reproducible random weights.

    Raises:
        ImportError: timm, or a torchvision it can use, is missing.
    """
    try:
        timm = importlib.import_module("timm")
    except (ImportError, RuntimeError) as error:  # torchvision of another torch build fails with RuntimeError
        raise ImportError(f"{INSTALL} ({error})") from error
    torch.manual_seed(seed)
    model: nn.Module = timm.create_model(name, pretrained=False)
    return model.eval()


def vit_small() -> tuple[nn.Module, tuple[torch.Tensor]]:
    """Factory: ViT-S/16 classifier and example inputs (batch 2)."""
    return create(), (torch.zeros(2, 3, 224, 224),)
