"""Stock processors of transformers over a tokenizer of the words `w3`, `w4`, ..."""

from __future__ import annotations

from typing import Any

import tokenizers
import transformers
from tokenizers import models, pre_tokenizers

from tests.vlm.families import IMAGE

__all__ = ["gemma3", "idefics3", "llava"]

SIDE = 32


def _tokenizer(*special: str, **named: Any) -> Any:
    """The first special token is the placeholder."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, IMAGE)}}
    words |= {token: IMAGE + i for i, token in enumerate(special)}
    made = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<pad>", "<s>", "</s>", *special])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", pad_token="<pad>", bos_token="<s>", **named
    )


def llava() -> Any:
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return transformers.LlavaProcessor(
        images,
        _tokenizer("<image>"),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def gemma3() -> Any:
    images = transformers.Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE})
    names = {"image_token": "<image>", "boi_token": "<start>", "eoi_token": "<end>"}
    return transformers.Gemma3Processor(
        images, _tokenizer("<image>", "<start>", "<end>", extra_special_tokens=names), image_seq_length=4
    )


def idefics3() -> Any:
    images = transformers.Idefics3ImageProcessorPil(
        size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}
    )
    tiles = [f"<row_{i}_col_{j}>" for i in range(1, 4) for j in range(1, 4)]
    special = ("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *tiles)
    return transformers.Idefics3Processor(images, _tokenizer(*special), image_seq_len=4)
