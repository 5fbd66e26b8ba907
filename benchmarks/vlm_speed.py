"""What fewer image tokens save of a prompt: encoder and first call of the decoder, at LLaVA-1.5's ratio of tokens.

    python benchmarks/vlm_speed.py                       # before the language model and inside it, batches of 1 and 2
    python benchmarks/vlm_speed.py --only fastv --batch 1 --work engines

A LLaVA of random weights, scaled down: 576 image tokens and 64 of text, a decoder of 12 layers and a tower about a
twentieth of its work, as in the 7B model. All engines of a batch size run in turns in one process, on one thread. The
ideal is the ratio of the matrix products' FLOPs with the shapes of these runs (`op_profile.matrix_flops`).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a plain file

import numpy as np
import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import tokcc
from benchmarks.engines import Feeds, open_session, quiet
from benchmarks.environment import describe, write_results
from benchmarks.grid import Policy, short
from benchmarks.op_profile import matrix_flops
from benchmarks.timing import interleave, milliseconds, speedups

IMAGE, TEXT, SIDE, PATCH = 576, 64, 336, 14
IMAGE_ID, VOCABULARY, HIDDEN = 1000, 1024, 768
BASELINE = "none"
KEEPS = {"33 %": 192, "22 %": 128, "11 %": 64}


@dataclass(frozen=True)
class Engines:
    """Encoder and decoder of one policy."""

    encoder: Path
    decoder: Path


def model() -> nn.Module:
    """Build the model; the tower's features are those of its last layer but one, as in LLaVA-1.5."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=7,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=2048,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_ID)
    return LlavaForConditionalGeneration(config).eval()


def policies() -> dict[str, Policy]:
    """The methods: before the language model by tokens that stay, inside it by FastV's share that goes."""
    found: dict[str, Policy] = {}
    for share, tokens in KEEPS.items():
        found[f"visionzip {share}"] = short("visionzip", tokens=tokens, contextual=tokens // 6)
        found[f"divprune {share}"] = short("divprune", keep=tokens / IMAGE)
        found[f"vispruner {share}"] = short("vispruner", tokens=tokens)
    for gone in (0.5, 0.75):
        policy = short("fastv", layer=1, keep=1 - gone)
        policy["segments"] = {"image": {"input_ids": IMAGE_ID, "tokens": IMAGE}}
        found[f"fastv K=2 R={gone:.0%}"] = policy
    return found


def compiled(module: nn.Module, policy: Policy | str, output: Path) -> Engines:
    """Compile, or take what an earlier run left."""
    if not (output / "manifest.json").is_file():
        with quiet():
            tokcc.compile(module, policy, output=output, calibrate=False, force=True)
    bundle = tokcc.Bundle.open(output)
    return Engines(bundle.part("vision_encoder").engine("onnx"), bundle.part("decoder").engine("onnx"))


def feeds_of(path: Path, batch: int, tokens: int) -> Feeds:
    """Random inputs of a prompt whose image is ``tokens`` long, before any cache."""
    rng = np.random.default_rng(0)
    length = tokens + TEXT
    feeds: Feeds = {}
    for item in open_session(path, 1).get_inputs():
        if item.name == "pixel_values":
            feeds[item.name] = rng.standard_normal((batch, 3, SIDE, SIDE), dtype=np.float32)
        elif item.name == "inputs_embeds":
            feeds[item.name] = rng.standard_normal((batch, length, HIDDEN), dtype=np.float32) * np.float32(0.02)
        elif item.name == "image_mask":
            mask = np.zeros((batch, length), np.int64)
            mask[:, 5 : 5 + tokens] = 1
            feeds[item.name] = mask
        elif item.name == "attention_mask":
            feeds[item.name] = np.ones((batch, length), np.int64)
        elif item.name == "position_ids":
            feeds[item.name] = np.broadcast_to(np.arange(length), (batch, length)).copy()
        elif len(item.shape) == 4:
            feeds[item.name] = np.zeros((batch, item.shape[1], 0, item.shape[3]), np.float32)
        else:
            raise SystemExit(f"{path}: no value is known for the input `{item.name}`")
    return feeds


def measure(engines: dict[str, Engines], batch: int, rounds: int) -> list[dict[str, Any]]:
    """Time encoder and decoder of every policy in turns."""
    calls: dict[str, Any] = {}
    flops: dict[str, float] = {}
    for name, pair in engines.items():
        seeing = feeds_of(pair.encoder, batch, 0)
        encoder, decoder = open_session(pair.encoder, 1), open_session(pair.decoder, 1)
        rows = encoder.run(None, seeing)[0].shape[-2]
        reading = feeds_of(pair.decoder, batch, rows)
        calls[f"{name}/encoder"] = partial(encoder.run, None, seeing)
        calls[f"{name}/decoder"] = partial(decoder.run, None, reading)
        flops[name] = matrix_flops(pair.encoder, seeing) + matrix_flops(pair.decoder, reading)
    seconds = interleave(calls, rounds)
    whole = {
        name: [a + b for a, b in zip(seconds[f"{name}/encoder"], seconds[f"{name}/decoder"], strict=True)]
        for name in engines
    }
    ratios = speedups(whole, BASELINE)
    result = []
    for name in engines:
        row: dict[str, Any] = {
            "policy": name,
            "batch": batch,
            "ms": milliseconds(whole[name]),
        }
        row["encoder_ms"] = float(np.median(seconds[f"{name}/encoder"])) * 1000
        if name != BASELINE:
            ideal = flops[BASELINE] / flops[name]
            row |= {"ideal": ideal, "speedup": ratios[name], "realised_share": ratios[name]["median"] / ideal}
            # What the engine's encoder takes beyond the plain one is what choosing costs.
            more = row["encoder_ms"] - float(np.median(seconds[f"{BASELINE}/encoder"])) * 1000
            saved = float(np.median(seconds[f"{BASELINE}/decoder"]) - np.median(seconds[f"{name}/decoder"])) * 1000
            row["choosing_share_of_saved"] = more / saved
        result.append(row)
        cells = [name, str(batch), f"{row['ms']['median']:.0f}"]
        if name != BASELINE:
            found = row["speedup"]
            cells += [f"{row['ideal']:.2f}", f"{found['median']:.2f} ({found['p25']:.2f}-{found['p75']:.2f})"]
            cells += [f"{row['realised_share']:.0%}", f"{row['choosing_share_of_saved']:.1%}"]
        print(f"| {' | '.join(cells)} |", flush=True)
    return result


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="prompts with images: encoder and first call of the decoder")
    parser.add_argument("--only", help="policies whose name begins so")
    parser.add_argument("--batch", action="append", type=int, help="default: 1 and 2")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--work", type=Path, help="keep the engines here; default: nowhere")
    options = parser.parse_args()
    chosen = {name: p for name, p in policies().items() if options.only is None or name.startswith(options.only)}
    module = model()
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        engines: dict[str, Engines] = {}
        for name, policy in {BASELINE: "none", **chosen}.items():
            print(f"compiling {name}", file=sys.stderr, flush=True)
            slug = "".join(letter if letter.isalnum() else "-" for letter in name)
            engines[name] = compiled(module, policy, work / slug)
        print("| policy | batch | ms | ideal | speed-up | realised / ideal | choosing / saved |")
        print("|---|---:|---:|---:|---:|---:|---:|")
        rows = [row for batch in options.batch or [1, 2] for row in measure(engines, batch, options.rounds)]
    content = {
        "what": f"prompts of {IMAGE} image and {TEXT} text tokens: encoder and first call, onnxruntime CPU, in turns",
        "environment": describe(1),
        "model": "a LLaVA of random weights: 7 layers of width 256, 12 layers of width 768",
        "rounds": options.rounds,
        "policies": chosen,
        "rows": rows,
    }
    print(f"\nwrote {write_results('vlm_speed', content)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
