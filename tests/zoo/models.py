"""The registry of tiny models: how to build them, feed them, and what their tokens are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim

from tests.zoo import builders
from tests.zoo.builders import HIDDEN, IMAGE, LAYERS, MEL_BINS, MEL_FRAMES, VOCAB

__all__ = ["ZOO", "ZooModel", "zoo_names"]

Modality = Literal["image", "video", "audio", "text", "embeddings"]
TEXT_LENGTH = 21
VIDEO_FRAMES = 8
_FIRST_WORD = 5  # ids below are special tokens


@dataclass(frozen=True)
class ZooModel:
    """A tiny random-weight model of a real architecture.

    Attributes:
        name: Key in `ZOO`.
        family: The architecture, shared by variants of it.
        builder: Makes the module, seeded, in eval mode.
        modality: What goes in.
        outputs: Names of the outputs, in order. Token-level ones have `batch_axis` and `token_axis`.
        prefix: How many special tokens (class, distillation, registers) stand first; 0 = plain tokens only.
        tokens: Tokens in the residual stream at the default input size.
        num_layers: Transformer blocks.
        pad_id: The padding id of a text model.
        batch_axis: Batch axis of token-level inputs and outputs.
        windowed: The blocks work in windows: reductions there must be refused.
        scanned: State-space scans mix the tokens, and no attention: what reads or cuts behind one must be refused.
        available: Says why the entry cannot be built here, or None.
    """

    name: str
    family: str
    builder: Callable[[], nn.Module]
    modality: Modality
    outputs: tuple[str, ...]
    prefix: int
    tokens: int
    num_layers: int = LAYERS
    pad_id: int = 0
    batch_axis: int = 0
    windowed: bool = False
    scanned: bool = False
    available: Callable[[], str | None] = lambda: None

    @property
    def has_cls(self) -> bool:
        """Whether token 0 is a class token."""
        return self.prefix > 0

    @property
    def token_axis(self) -> int:
        """Token axis of token-level outputs."""
        return 1 - self.batch_axis

    @property
    def token_outputs(self) -> tuple[str, ...]:
        """The outputs that carry the token axis."""
        return tuple(name for name in self.outputs if name in {"last_hidden_state", "output"})

    @property
    def has_length(self) -> bool:
        """Whether the number of tokens is chosen by the input (text) rather than by the architecture."""
        return self.modality in {"text", "embeddings"}

    def build(self) -> nn.Module:
        """Make the module, in eval mode, the same weights every time."""
        return self.builder()

    def inputs(self, batch: int = 2, length: int | None = None, seed: int = 0) -> dict[str, Tensor]:
        """Make example inputs by name; odd rows of a padded modality end in padding."""
        generator = torch.Generator().manual_seed(1000 + seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        if self.modality == "image":
            return {"pixel_values": randn(batch, 3, IMAGE, IMAGE)}
        if self.modality == "video":
            return {"pixel_values": randn(batch, VIDEO_FRAMES, 3, IMAGE, IMAGE)}
        if self.family == "whisper":
            return {"input_features": randn(batch, MEL_BINS, 2 * MEL_FRAMES)}
        if self.modality == "audio":
            return {"input_values": randn(batch, MEL_FRAMES, MEL_BINS)}
        length = length or TEXT_LENGTH
        valid = _right_padded(batch, length)
        if self.modality == "embeddings":
            shape = (batch, length) if self.batch_axis == 0 else (length, batch)
            return {"src": randn(*shape, HIDDEN), "src_key_padding_mask": ~valid}
        ids = torch.randint(_FIRST_WORD, VOCAB, (batch, length), generator=generator)
        ids[:, 0] = 2
        return {"input_ids": torch.where(valid, ids, self.pad_id), "attention_mask": valid.to(torch.int64)}

    def dynamic_shapes(self) -> dict[str, dict[int, Any]]:
        """Dynamic batch, and for text a dynamic sequence, in the form that torch.export takes."""
        batch, length = Dim("batch", min=1, max=64), Dim("sequence", min=4, max=64)
        if self.modality == "text":
            return {name: {0: batch, 1: length} for name in ("input_ids", "attention_mask")}
        if self.modality == "embeddings":
            return {
                "src": {self.batch_axis: batch, self.token_axis: length},
                "src_key_padding_mask": {0: batch, 1: length},
            }
        return {name: {0: batch} for name in self.inputs(1)}

    def valid_rows(self, inputs: dict[str, Tensor]) -> Tensor | None:
        """Say which rows of the token-level outputs are defined: bool [B, N], or None when all are."""
        if "attention_mask" in inputs:
            return inputs["attention_mask"].bool()
        if "src_key_padding_mask" in inputs:
            return ~inputs["src_key_padding_mask"]
        return None

    def defined(self, name: str, value: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """Return the part of output ``name`` to compare: without the rows of padding, [rows, C]."""
        valid = self.valid_rows(inputs)
        if valid is None or name not in self.token_outputs:
            return value
        return value.movedim(self.batch_axis, 0)[valid]


def _right_padded(batch: int, length: int) -> Tensor:
    """Bool [B, N], True = a real token; row 1, 3, ... end in 1/3 of padding."""
    lengths = torch.tensor([length if row % 2 == 0 else max(length - length // 3, 1) for row in range(batch)])
    return torch.arange(length)[None, :] < lengths[:, None]


_HIDDEN = ("last_hidden_state",)
_POOLED = ("last_hidden_state", "pooler_output")
_PATCHES = (IMAGE // builders.PATCH) ** 2
_AST_PATCHES = (MEL_BINS // builders.PATCH) * (MEL_FRAMES // builders.PATCH)


def _vision(name: str, family: str, builder: builders.Builder, *, prefix: int = 1, **extra: Any) -> ZooModel:
    fields: dict[str, Any] = {"modality": "image", "outputs": _POOLED, "tokens": _PATCHES + prefix, **extra}
    return ZooModel(name, family, builder, prefix=prefix, **fields)


def _text(name: str, family: str, builder: builders.Builder, **extra: Any) -> ZooModel:
    fields: dict[str, Any] = {"modality": "text", "outputs": _POOLED, "prefix": 1, "tokens": TEXT_LENGTH, **extra}
    return ZooModel(name, family, builder, **fields)


def _torch(*, batch_first: bool, norm_first: bool) -> ZooModel:
    name = f"torch_encoder_{'bnc' if batch_first else 'nbc'}_{'pre' if norm_first else 'post'}"
    return ZooModel(
        name,
        "torch_encoder",
        partial(builders.torch_encoder, batch_first=batch_first, norm_first=norm_first),
        modality="embeddings",
        outputs=("output",),
        prefix=0,
        tokens=TEXT_LENGTH,
        batch_axis=0 if batch_first else 1,
    )


_ENTRIES = (
    _vision("vit", "vit", builders.vit),
    _vision("vit_eager", "vit", partial(builders.vit, "eager")),
    _vision("vit_classifier", "vit", builders.vit_classifier, outputs=("logits",)),
    _vision("deit", "deit", builders.deit, prefix=2),
    _vision("beit", "beit", builders.beit),
    _vision("dinov2", "dinov2", builders.dinov2),
    _vision("dinov2_registers", "dinov2", builders.dinov2_registers, prefix=5),
    _vision("clip_vision", "clip", builders.clip_vision),
    _vision("siglip_vision", "siglip", builders.siglip_vision, prefix=0),
    _vision("swin", "swin", builders.swin, prefix=0, windowed=True),
    _vision("videomae", "videomae", builders.videomae, prefix=0, modality="video", outputs=_HIDDEN),
    _vision(
        "vision_mamba",
        "vim",
        builders.vision_mamba,
        prefix=0,
        outputs=("logits", "last_hidden_state"),
        tokens=(IMAGE // 8) ** 2 + 1,
        scanned=True,
    ),
    _vision("ast", "ast", builders.ast, prefix=2, modality="audio", tokens=_AST_PATCHES + 2),
    _vision("whisper_encoder", "whisper", builders.whisper_encoder, prefix=0, modality="audio", outputs=_HIDDEN),
    _vision("timm_vit", "timm", builders.timm_vit, outputs=("logits",), available=builders.timm_missing),
    _vision(
        "timm_deit_distilled",
        "timm",
        builders.timm_deit_distilled,
        prefix=2,
        outputs=("logits",),
        available=builders.timm_missing,
    ),
    _text("bert", "bert", builders.bert),
    _text("bert_eager", "bert", partial(builders.bert, "eager")),
    _text("bert_classifier", "bert", builders.bert_classifier, outputs=("logits",)),
    _text("bert_mean_pooled", "bert", builders.bert_mean_pooled, outputs=("sentence_embedding",)),
    _text("roberta", "roberta", builders.roberta, pad_id=1),
    _text("distilbert", "distilbert", builders.distilbert, outputs=_HIDDEN),
    _text("electra", "electra", builders.electra, outputs=_HIDDEN),
    _text("mpnet", "mpnet", builders.mpnet, pad_id=1),
    _text("modernbert", "modernbert", builders.modernbert, outputs=_HIDDEN),
    _torch(batch_first=True, norm_first=False),
    _torch(batch_first=True, norm_first=True),
    _torch(batch_first=False, norm_first=False),
    _torch(batch_first=False, norm_first=True),
)

ZOO: dict[str, ZooModel] = {entry.name: entry for entry in _ENTRIES}


def zoo_names(*, modality: Modality | None = None, has_cls: bool | None = None, windowed: bool = False) -> list[str]:
    """List entries by property, for ``pytest.mark.parametrize``; windowed models only when asked for."""
    return [
        entry.name
        for entry in ZOO.values()
        if (modality is None or entry.modality == modality)
        and (has_cls is None or entry.has_cls == has_cls)
        and (windowed or not entry.windowed)
    ]
