"""Example inputs, dynamic axes and named-input wrappers for Hugging Face models."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from tokcc.capture.inputs import InputSpec, kwargs_from_specs, random_tensor
from tokcc.errors import LoadError

__all__ = ["NamedModel", "default_dynamic", "default_specs", "example_inputs", "max_length", "wrap"]

_BATCH = 2
_LENGTH = 128
_WAVEFORM = 16000
_TEXT_NAMES = ("input_ids", "attention_mask", "token_type_ids")


class NamedModel(nn.Module):
    """Calls ``model`` by name and returns the outputs named ``outputs``."""

    def __init__(self, model: nn.Module, outputs: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.outputs = tuple(outputs)

    def _run(self, **inputs: Tensor) -> dict[str, Tensor]:
        result = self.model(**inputs)
        return {name: getattr(result, name) for name in self.outputs}


# torch.export and the ONNX exporter name the program's inputs after the parameters of `forward`: **kwargs would do for
# one, not for the other.
class _Pixels(NamedModel):
    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return self._run(pixel_values=pixel_values)


class _Values(NamedModel):
    def forward(self, input_values: Tensor) -> dict[str, Tensor]:
        return self._run(input_values=input_values)


class _Features(NamedModel):
    def forward(self, input_features: Tensor) -> dict[str, Tensor]:
        return self._run(input_features=input_features)


class _Text(NamedModel):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return self._run(input_ids=input_ids, attention_mask=attention_mask)


class _SegmentedText(NamedModel):
    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> dict[str, Tensor]:
        return self._run(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)


_WRAPPERS: dict[str, type[NamedModel]] = {
    "pixel_values": _Pixels,
    "input_values": _Values,
    "input_features": _Features,
    "input_ids": _Text,
}


def wrap(model: nn.Module, config: Any, outputs: Sequence[str]) -> NamedModel:
    """Give ``model`` a forward with the community's input names, returning a dict of ``outputs``."""
    main = str(getattr(model, "main_input_name", "input_ids"))
    wrapper = _WRAPPERS.get(main)
    if wrapper is None:
        raise LoadError(
            f"tokcc does not know the input {main} of {type(model).__name__}",
            needed=f"a model on {', '.join(_WRAPPERS)}",
            help="give a factory (`model.py:factory`) that returns the module and example inputs",
        )
    if wrapper is _Text and _has_segments(model, config):
        wrapper = _SegmentedText
    named = wrapper(model, outputs)
    named.eval()
    return named


def _has_segments(model: nn.Module, config: Any) -> bool:
    takes = "token_type_ids" in inspect.signature(model.forward).parameters
    return takes and getattr(config, "type_vocab_size", 0) > 1


def default_specs(wrapper: nn.Module, config: Any, folder: Path, dtype: torch.dtype) -> dict[str, InputSpec]:
    """Say which shapes the model is fed when the user does not."""
    names = list(inspect.signature(wrapper.forward).parameters)
    if names[0] == "input_ids":
        length = min(_LENGTH, max_length(wrapper, config) or _LENGTH)
        return {name: InputSpec(name, torch.int64, (_BATCH, length)) for name in names}
    dims = _feature_dims(names[0], config, folder)
    return {names[0]: InputSpec(names[0], dtype, (_BATCH, *dims))}


def _feature_dims(name: str, config: Any, folder: Path) -> tuple[int, ...]:
    if name == "pixel_values":
        height, width = _image_size(config, folder)
        image = (int(getattr(config, "num_channels", 3)), height, width)
        frames = getattr(config, "num_frames", None)
        return image if frames is None else (int(frames), *image)
    if name == "input_features":
        return int(config.num_mel_bins), 2 * int(config.max_source_positions)
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):  # spectrogram patches (AST)
        return int(config.max_length), int(config.num_mel_bins)
    return (_WAVEFORM,)


def _image_size(config: Any, folder: Path) -> tuple[int, int]:
    """Take the size that the checkpoint's own image processor makes, then the configuration's."""
    settings = _read_json(folder / "preprocessor_config.json")
    keys = ("crop_size", "size") if settings.get("do_center_crop", True) else ("size",)
    for size in [*(settings.get(key) for key in keys), getattr(config, "image_size", None)]:
        if isinstance(size, int):
            return size, size
        if isinstance(size, list | tuple) and len(size) == 2:
            return int(size[0]), int(size[1])
        if isinstance(size, Mapping) and {"height", "width"} <= set(size):
            return int(size["height"]), int(size["width"])
    raise LoadError(
        "cannot tell the image size of this model",
        needed="image_size in config.json, or preprocessor_config.json",
        help="add --input pixel_values=fp32[2,3,HEIGHT,WIDTH]",
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LoadError(f"{path} is not JSON", found=str(error)) from error
    return value if isinstance(value, dict) else {}


def max_length(model: nn.Module, config: Any) -> int | None:
    """Return the longest text that the position table holds, or None when there is no limit to be seen."""
    positions = getattr(config, "max_position_embeddings", None)
    if not positions:
        return None
    offset = 0
    for name, layer in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(layer, nn.Embedding) and layer.padding_idx is not None:
            offset = layer.padding_idx + 1  # RoBERTa counts positions from there
    return int(positions) - offset


def example_inputs(
    wrapper: nn.Module, config: Any, specs: Mapping[str, InputSpec], given: Sequence[InputSpec]
) -> dict[str, Tensor]:
    """Make inputs of the default shapes, or of the shapes the user gave; text ends in padding in odd rows."""
    chosen = {**specs, **{spec.name: spec for spec in given}}
    text = next((spec for spec in given if spec.name in _TEXT_NAMES), None)
    if text is not None:  # the text inputs share one shape, so one --input is enough
        named = {spec.name for spec in given}
        chosen.update({name: InputSpec(name, torch.int64, text.dims) for name in specs if name not in named})
    vocabulary = int(getattr(config, "vocab_size", 0) or 0)

    def make(spec: InputSpec, generator: torch.Generator) -> Tensor:
        if spec.name == "input_ids" and vocabulary:
            return random_tensor(spec, generator, below=vocabulary)
        return random_tensor(spec, generator)

    inputs = kwargs_from_specs(wrapper.forward, list(chosen.values()), make=make)
    if "attention_mask" in inputs and inputs["attention_mask"].dim() == 2:
        _pad(inputs, config)
    return inputs


def _pad(inputs: dict[str, Tensor], config: Any) -> None:
    """End every odd row in a third of padding, so that what is compared later includes the masks."""
    mask, ids = inputs["attention_mask"], inputs["input_ids"]
    pad = getattr(config, "pad_token_id", None) or 0
    if ids.shape == mask.shape:
        ids[ids == pad] = pad + 1 if pad == 0 else pad - 1
        keep = mask.shape[1] - mask.shape[1] // 3
        mask[1::2, keep:] = 0
        ids[1::2, keep:] = pad


def default_dynamic(inputs: Mapping[str, Tensor], wrapper: nn.Module, config: Any) -> dict[str, Any] | None:
    """Make the batch dynamic, and for text the sequence; an axis whose example size is 1 stays static."""
    limit = max_length(wrapper, config)
    batch, sequence = Dim("batch", min=1), None if limit == 1 else Dim("sequence", min=1, max=limit)
    shapes: dict[str, Any] = {}
    for name, value in inputs.items():
        axes: dict[int, Any] = {}
        if value.dim() > 0 and value.shape[0] > 1:
            axes[0] = batch
        if name in _TEXT_NAMES and value.dim() == 2 and value.shape[1] > 1 and sequence is not None:
            axes[1] = sequence
        shapes[name] = axes or None
    return shapes if any(shapes.values()) else None
