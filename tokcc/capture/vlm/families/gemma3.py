"""Gemma 3: a SigLIP tower, and a projector that averages patches to a fixed number of tokens."""

from __future__ import annotations

from tokcc.capture.vlm.family import Family, one_field, pooled_encoder

__all__ = ["FAMILY"]

FAMILY = Family(
    "Gemma 3",
    ("gemma3",),
    pooled_encoder,
    one_field("image_seq_length"),
    notes=(
        "the tokens of one image do not see those behind them: transformers lets them see each other, but the "
        "decoder of ONNX runtimes has a mask of padding alone, and is causal",
        "onnxruntime-genai writes 256 placeholders for an image whatever the files say",
    ),
)
