"""InternVL: a ViT on tiles, a pixel shuffle that folds neighbouring patches into one token, and a projector."""

from __future__ import annotations

from tokcc.capture.vlm.family import Family, one_field, pooled_encoder

__all__ = ["FAMILY"]

FAMILY = Family("InternVL", ("internvl",), pooled_encoder, one_field("image_seq_length"), unit="tile")
