"""Qwen2-Audio: a Whisper encoder on spectrograms of one length, padded, and a linear projector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from tokcc.capture.vlm.family import AUDIO, Encoder, Family, Placeholders

__all__ = ["FAMILY"]

_MASK = "feature_attention_mask"
_EXAMPLES = 2


class _Sounds(nn.Module):
    """Tower and projector, silence behind a sound left out of every attention."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.tower, self.projector = model.model.audio_tower, model.model.multi_modal_projector

    def forward(self, input_features: Tensor, feature_attention_mask: Tensor) -> dict[str, Tensor]:
        """Encode sounds.

        Args:
            input_features: ``[n, bins, frames]``.
            feature_attention_mask: int64 ``[n, frames]``: 1 = sound, 0 = padding behind it.

        Returns:
            ``audio_features`` ``[n, N, H]``, and ``audio_lengths`` int64 ``[n]``: how many of the N are sound.
        """
        lengths = (feature_attention_mask.sum(-1) - 1) // 2 + 1  # after the convolution of stride 2
        frames = (feature_attention_mask.shape[-1] - 2) // 2 + 1
        real = torch.arange(frames)[None, :] < lengths[:, None]
        states = self.tower(input_features, attention_mask=real[:, None, None, :]).last_hidden_state
        return {"audio_features": self.projector(states), "audio_lengths": (lengths - 2) // 2 + 1}


def _encoder(model: Any, size: tuple[int, int] | None, dtype: torch.dtype) -> Encoder:
    del size
    config = model.config.audio_config
    frames = int(config.max_source_positions) * 2
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.randn(_EXAMPLES, int(config.num_mel_bins), frames, generator=generator).to(dtype)
    mask = torch.ones(_EXAMPLES, frames, dtype=torch.int64)
    mask[1, frames // 2 :] = 0
    count = Dim("sounds", min=1)
    return Encoder(
        _Sounds(model),
        {AUDIO.input: spectrum, _MASK: mask},
        {AUDIO.input: {0: count}, _MASK: {0: count}},
    )


def _placeholders(config: Any, stock: int, count: int) -> Placeholders:
    del config, stock, count
    return Placeholders(refusal="the processor counts placeholders from the length of the sound alone")


FAMILY = Family(
    "Qwen2-Audio",
    ("qwen2_audio",),
    _encoder,
    _placeholders,
    token="audio_token_id",
    unit="sound",
    medium=AUDIO,
)
