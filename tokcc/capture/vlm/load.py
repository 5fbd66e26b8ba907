"""Load a model that reads images or sounds beside text: as the parts that runtimes expect."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokcc.capture.hf import opened_folder, preprocessor_in
from tokcc.capture.hf_tasks import MULTIMODAL
from tokcc.capture.inputs import InputSpec, parse_dtype, parse_inputs
from tokcc.capture.loaded import Loaded
from tokcc.capture.vlm.families import families
from tokcc.capture.vlm.family import AUDIO, Family
from tokcc.capture.vlm.parts import EmbeddedDecoder, EmbedTokens, embed_example, embedded_dynamic, embedded_inputs
from tokcc.errors import LoadError, UsageError

__all__ = ["DECODER", "EMBED", "LoadedParts", "is_multimodal", "load_parts"]

EMBED, DECODER = "embed_tokens", "decoder"


@dataclass(frozen=True)
class LoadedParts:
    """A model in parts.

    Attributes:
        source: How the user named the model.
        task: ``image-text-to-text`` or ``audio-text-to-text``.
        family: What is known of it.
        config: Its configuration.
        encoder: The encoder with its projector.
        embed: The table of embeddings.
        decoder: The language model on embeddings, with its cache.
        token_id: The placeholder in prompts.
        grid: Frames, rows and columns of an image's tokens, where positions have three axes.
        pixels: Height and width of the images, where the encoder is made for one shape.
        line_end: The learned row at the end of a line of tiles ``[H]``, where the family has one.
    """

    source: str
    task: str
    family: Family
    config: Any
    encoder: Loaded
    embed: Loaded
    decoder: Loaded
    token_id: int
    grid: tuple[int, int, int] | None = None
    pixels: tuple[int, int] | None = None
    line_end: torch.Tensor | None = None

    def parts(self) -> Iterator[tuple[str, Loaded]]:
        """Yield names and parts; the decoder comes last, since measuring it needs the embedding."""
        yield self.family.medium.part, self.encoder
        yield EMBED, self.embed
        yield DECODER, self.decoder


def is_multimodal(model: Any, task: str | None = None) -> bool:
    """Tell whether a model is loaded in parts: by the task that is asked for, or by its configuration."""
    if task is not None:
        return task in MULTIMODAL
    if isinstance(model, nn.Module):
        config = getattr(model, "config", None)
        names = [type(model).__name__]
        return getattr(config, "model_type", None) in families() and _generates(names)
    if not isinstance(model, str | os.PathLike):
        return False
    try:
        content = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # whatever it is, loading it says what is wrong
    if not isinstance(content, dict) or not isinstance(content.get("architectures"), list):
        return False
    return content.get("model_type") in families() and _generates(content["architectures"])


def _generates(architectures: Sequence[Any]) -> bool:
    return any(str(name).endswith("ForConditionalGeneration") for name in architectures)


def load_parts(
    model: str | os.PathLike[str] | nn.Module,
    *,
    inputs: Sequence[str] = (),
    dtype: str | torch.dtype | None = None,
    allow_pickle: bool = False,
    task: str | None = None,
) -> LoadedParts:
    """Load a model's parts.

    Args:
        model: A Hugging Face folder, or a model of transformers.
        inputs: ``pixel_values=DTYPE[n,C,H,W]``: another image size than the model's own, where it allows one.
        dtype: Cast the model.
        allow_pickle: Permit pickled weights.
        task: One of the multimodal tasks; by default the family's own.

    Raises:
        LoadError: The model cannot be loaded, or is of a family that tokcc does not know.
        UsageError: An option is malformed or does not fit the model.
    """
    specs, wanted = parse_inputs(inputs), parse_dtype(dtype)
    whole, source, folder = _whole(model, wanted, task, allow_pickle=allow_pickle)
    family = _family(whole.config)
    own = "audio-text-to-text" if family.medium is AUDIO else "image-text-to-text"
    if task is not None and task != own:
        raise LoadError(f"a {whole.config.model_type} model does not do {task}", needed=f"--task {own}", found=task)
    size = _image_size(specs, family)
    kind = next(whole.parameters()).dtype
    with torch.no_grad():
        encoder = family.encoder(whole, size, kind)
        decoder = EmbeddedDecoder(whole, grid=family.positions == "grid")
        decoder_inputs = embedded_inputs(decoder, kind)
    ids, id_axes = embed_example(whole)
    common: dict[str, Any] = {"source": source, "task": own, "preprocessor": folder and preprocessor_in(folder)}
    return LoadedParts(
        source=source,
        task=own,
        family=family,
        config=whole.config,
        encoder=Loaded(
            module=encoder.module.eval(), example_kwargs=encoder.inputs, dynamic_shapes=encoder.dynamic, **common
        ),
        embed=Loaded(module=EmbedTokens(whole).eval(), example_kwargs=ids, dynamic_shapes=id_axes, **common),
        decoder=Loaded(
            module=decoder.eval(),
            example_kwargs=decoder_inputs,
            dynamic_shapes=embedded_dynamic(decoder_inputs),
            **common,
        ),
        token_id=int(getattr(whole.config, family.token)),
        grid=encoder.grid,
        pixels=encoder.pixels,
        line_end=getattr(whole.model, "image_newline", None) if family.packing == "anyres" else None,
    )


def _whole(
    model: Any, dtype: torch.dtype | None, task: str | None, *, allow_pickle: bool
) -> tuple[Any, str, Path | None]:
    """Return the model in eval mode, how it was named, and its folder."""
    if isinstance(model, nn.Module):
        if any(layer.training for layer in model.modules()):
            raise LoadError("the model is in training mode", help="call model.eval() first")
        if dtype is not None and next(model.parameters()).dtype != dtype:
            raise LoadError("the model has another dtype", help=f"call model.to({dtype}) first")
        _family(getattr(model, "config", None))
        return model, type(model).__name__, None
    folder = Path(model)
    if not folder.is_dir():
        raise LoadError(
            f"no such folder: {model}", needed="a Hugging Face folder, or a model of transformers", found=str(model)
        )
    with opened_folder(folder, allow_pickle=allow_pickle) as opened:
        family = _family(opened.config)
        name = task or ("audio-text-to-text" if family.medium is AUDIO else "image-text-to-text")
        whole, _, _ = opened.load(MULTIMODAL[name], dtype)
    return whole, str(folder), folder


def _family(config: Any) -> Family:
    known: Mapping[str, Family] = families()
    kind = getattr(config, "model_type", None)
    family = known.get(str(kind))
    if family is None:
        raise LoadError(
            "tokcc does not know how this model is taken apart",
            needed=f"one of the families {', '.join(sorted(known))}",
            found=f"model_type {kind}" if kind else "a model without a configuration of transformers",
            help="compile its parts one by one through a factory (`model.py:factory`)",
        )
    return family


def _image_size(specs: Sequence[InputSpec], family: Family) -> tuple[int, int] | None:
    """Return the image size that the user asks for."""
    name = family.medium.input
    foreign = [spec.name for spec in specs if spec.name != name]
    if foreign:
        raise UsageError(f"the encoder has no input `{foreign[0]}`", needed=name)
    if not specs:
        return None
    dims = specs[0].dims
    if family.medium is AUDIO or len(dims) != 4:
        raise UsageError(
            f"`{name}` has another form",
            needed="the length that the model was made for: leave --input out"
            if family.medium is AUDIO
            else "images as [n, channels, height, width] in pixels",
            found=str(list(dims)),
        )
    return dims[2], dims[3]
