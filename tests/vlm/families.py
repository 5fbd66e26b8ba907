"""Small vision-language models of real architectures with random weights, and inputs for them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

__all__ = ["FAMILIES", "IMAGE", "VOCABULARY", "Given", "Tiny", "model_of", "prompt_of"]

VOCABULARY, IMAGE = 97, 90
START, END, PAD = 1, 2, 0
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": START,
    "eos_token_id": END,
    "pad_token_id": PAD,
}
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


@dataclass(frozen=True)
class Given:
    """One picture for transformers and for the engines.

    Attributes:
        theirs: Inputs of transformers' model, with a leading axis that pictures are concatenated on.
        units: What the encoder reads.
        size: Height and width, where the family needs them.
        beside: Further inputs of the encoder.
        tokens: Placeholders.
    """

    theirs: Mapping[str, Tensor]
    units: Tensor
    tokens: int
    size: tuple[int, int] | None = None
    beside: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Tiny:
    """A family in small.

    Attributes:
        model: Name of the model's class.
        config: Makes its configuration.
        picture: Makes the i-th picture.
        inputs: Options of ``tokcc.compile``.
        extra: Further inputs of transformers' model, from the ids.
    """

    model: str
    config: Callable[[], Any]
    picture: Callable[[int], Given]
    inputs: tuple[str, ...] = ()
    extra: Callable[[Tensor], dict[str, Tensor]] = lambda ids: {}


def _config(name: str, **settings: Any) -> Callable[[], Any]:
    def make() -> Any:
        made = {
            key: getattr(transformers, value["class"])(**{k: v for k, v in value.items() if k != "class"})
            if isinstance(value, dict) and "class" in value
            else value
            for key, value in settings.items()
        }
        return getattr(transformers, name)(**made)

    return make


def _noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + seed))


def _image(tokens: int, tiles: int = 1, *, axis: bool = False) -> Callable[[int], Given]:
    def make(number: int) -> Given:
        pixels = _noise(number, tiles, 3, 32, 32)
        return Given({"pixel_values": pixels[None] if axis else pixels}, pixels, tokens)

    return make


def _tiles(number: int) -> Given:
    """An image of 1 x 2 tiles of 32 pixels, and the whole of it in small; its shape leaves borders to cut off."""
    pixels = _noise(number, 3, 3, 32, 32)
    # The whole 4 x 4; of 4 rows by 8 columns 4 by 6 are image, and a row ends each line.
    sizes = torch.tensor([[32, 48]])
    return Given({"pixel_values": pixels[None], "image_sizes": sizes}, pixels, 16 + 4 * (6 + 1), size=(32, 48))


def _patches(number: int) -> Given:
    """An image of 6 x 4 patches of 4 pixels, in blocks of 2 x 2."""
    pixels = _noise(number, 24, 3 * 2 * 4 * 4)
    return Given({"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 6, 4]])}, pixels, 6)


def _sound(number: int) -> Given:
    """A spectrogram of 32 frames, of which 32, 20 or 13 are sound."""
    frames = (32, 20, 13)[number % 3]
    spectrum, mask = _noise(number, 1, 8, 32), (torch.arange(32) < frames).long()[None]
    tokens = ((frames - 1) // 2 + 1 - 2) // 2 + 1
    return Given(
        {"input_features": spectrum, "feature_attention_mask": mask},
        spectrum,
        tokens,
        beside={"feature_attention_mask": mask},
    )


def _kinds(ids: Tensor) -> dict[str, Tensor]:
    return {"mm_token_type_ids": (ids == IMAGE).int()}


_LLAMA = {"class": "LlamaConfig", **_TEXT}
_QWEN_TEXT = {**_TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
_QWEN_SIGHT = {"depth": 2, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
_QWEN_IDS = {"image_token_id": IMAGE, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}


def _shuffled(name: str) -> Tiny:
    """Idefics3 and what has its form: a pixel shuffle behind the tower."""
    config = _config(
        f"{name}Config",
        vision_config=_VISION,
        text_config=_LLAMA,
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
    )
    return Tiny(f"{name}ForConditionalGeneration", config, _image(8, tiles=2, axis=True))


FAMILIES: dict[str, Tiny] = {
    "llava": Tiny(
        "LlavaForConditionalGeneration",
        _config(
            "LlavaConfig",
            vision_config={"class": "CLIPVisionConfig", **_VISION},
            text_config=_LLAMA,
            image_token_index=IMAGE,
        ),
        _image(16),
    ),
    "idefics3": _shuffled("Idefics3"),
    "smolvlm": _shuffled("SmolVLM"),
    "internvl": Tiny(
        "InternVLForConditionalGeneration",
        _config(
            "InternVLConfig",
            vision_config={**_VISION, "image_size": [32, 32], "patch_size": [8, 8]},
            text_config={"class": "Qwen2Config", **_TEXT},
            image_token_id=IMAGE,
            image_seq_length=4,
        ),
        _image(8, tiles=2),
    ),
    "gemma3": Tiny(
        "Gemma3ForConditionalGeneration",
        _config(
            "Gemma3Config",
            vision_config=_VISION,
            text_config={
                "class": "Gemma3TextConfig",
                **_TEXT,
                "head_dim": 8,
                "sliding_window": 64,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            image_token_index=IMAGE,
            mm_tokens_per_image=4,
        ),
        _image(4),
    ),
    "qwen2-vl": Tiny(
        "Qwen2VLForConditionalGeneration",
        _config(
            "Qwen2VLConfig",
            vision_config={**_QWEN_SIGHT, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
            text_config=_QWEN_TEXT,
            **_QWEN_IDS,
        ),
        _patches,
        inputs=("pixel_values=fp32[1,3,24,16]",),
        extra=_kinds,
    ),
    "qwen2.5-vl": Tiny(
        "Qwen2_5_VLForConditionalGeneration",
        _config(
            "Qwen2_5_VLConfig",
            vision_config={
                **_QWEN_SIGHT,
                "hidden_size": 16,
                "intermediate_size": 24,
                "out_hidden_size": 32,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
            text_config=_QWEN_TEXT,
            **_QWEN_IDS,
        ),
        _patches,
        inputs=("pixel_values=fp32[1,3,24,16]",),
        extra=_kinds,
    ),
    "llava-next": Tiny(
        "LlavaNextForConditionalGeneration",
        _config(
            "LlavaNextConfig",
            vision_config={"class": "CLIPVisionConfig", **_VISION},
            text_config=_LLAMA,
            image_token_index=IMAGE,
            image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
        ),
        _tiles,
    ),
    "qwen2-audio": Tiny(
        "Qwen2AudioForConditionalGeneration",
        _config(
            "Qwen2AudioConfig",
            audio_config={
                "class": "Qwen2AudioEncoderConfig",
                "num_mel_bins": 8,
                "d_model": 16,
                "encoder_layers": 2,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 24,
                "max_source_positions": 16,
            },
            text_config={"class": "Qwen2Config", **_TEXT},
            audio_token_index=IMAGE,
        ),
        _sound,
    ),
}


@functools.cache
def model_of(family: str) -> nn.Module:
    """A model in eval mode."""
    tiny = FAMILIES[family]
    torch.manual_seed(0)
    kind = getattr(transformers, tiny.model)
    model = kind._from_config(tiny.config(), attn_implementation="sdpa")
    # Random weights of the usual size give nearly uniform attention: larger ones give something to choose from.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 or "newline" in name:
                parameter.mul_(4.0)
    return model.eval()


def prompt_of(words: list[int], given: list[Given]) -> list[int]:
    """Return a prompt with every placeholder of the model, where the words have one for each picture."""
    left = iter(given)
    made: list[int] = []
    for word in words:
        made += [IMAGE] * next(left).tokens if word == IMAGE else [word]
    return made
