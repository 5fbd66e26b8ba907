"""Hugging Face tasks: which class loads a model for a task, and under which names its outputs are known."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokcc.errors import LoadError

__all__ = ["MULTIMODAL", "TASKS", "Task", "choose_task", "model_class"]


@dataclass(frozen=True)
class Task:
    """A task: the auto class of transformers, and the community's output names, of which those that exist are kept."""

    name: str
    auto_class: str
    outputs: tuple[str, ...]
    has_labels: bool = False
    generates: bool = False


_FEATURES = ("image_embeds", "text_embeds", "last_hidden_state", "pooler_output")
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("feature-extraction", "AutoModel", _FEATURES),
        Task("image-feature-extraction", "AutoModel", _FEATURES),
        Task("image-classification", "AutoModelForImageClassification", ("logits",), has_labels=True),
        Task("video-classification", "AutoModelForVideoClassification", ("logits",), has_labels=True),
        Task("audio-classification", "AutoModelForAudioClassification", ("logits",), has_labels=True),
        Task("text-classification", "AutoModelForSequenceClassification", ("logits",), has_labels=True),
        Task("token-classification", "AutoModelForTokenClassification", ("logits",), has_labels=True),
        Task("question-answering", "AutoModelForQuestionAnswering", ("start_logits", "end_logits")),
        Task("fill-mask", "AutoModelForMaskedLM", ("logits",)),
        Task("text-generation", "AutoModelForCausalLM", ("logits",), generates=True),
    )
}
# Models that are loaded in parts, see tokcc.capture.vlm.
MULTIMODAL: dict[str, Task] = {
    "image-text-to-text": Task("image-text-to-text", "AutoModelForImageTextToText", ("logits",), generates=True),
    "audio-text-to-text": Task("audio-text-to-text", "AutoModelForMultimodalLM", ("logits",), generates=True),
}
# Ending of a class name in config.json -> task. The first match counts.
_ARCHITECTURES = (
    ("ForImageClassificationWithTeacher", "image-classification"),
    ("ForImageClassification", "image-classification"),
    ("ForVideoClassification", "video-classification"),
    ("ForAudioClassification", "audio-classification"),
    ("ForSequenceClassification", "text-classification"),
    ("ForTokenClassification", "token-classification"),
    ("ForQuestionAnswering", "question-answering"),
    ("ForMaskedLM", "fill-mask"),
    ("ForCausalLM", "text-generation"),
    ("LMHeadModel", "text-generation"),
    ("VisionModelWithProjection", "image-feature-extraction"),
    ("VisionModel", "image-feature-extraction"),
    ("Model", "feature-extraction"),
    ("ModelWithProjection", "feature-extraction"),
    ("Encoder", "feature-extraction"),
)


def choose_task(task: str | None, config: Any) -> Task:
    """Return the task that was asked for, or the one that the checkpoint was made for.

    Raises:
        LoadError: No task can be told, or the architecture does not serve it; names the tasks that fit.
    """
    fitting = _fitting(config)
    listed = ", ".join(fitting) or "none that tokcc knows"
    architectures = tuple(getattr(config, "architectures", None) or ())
    if task is None:
        for ending, name in _ARCHITECTURES:
            if architectures and architectures[0].endswith(ending) and name in fitting and not _two_towers(config):
                return TASKS[name]
        if not architectures and len(fitting) == 1:
            return TASKS[fitting[0]]  # a GGUF file names no class
        raise LoadError(
            f"cannot tell the task of this {config.model_type} model",
            needed=f"--task, one that fits: {listed}",
            found=f"architectures: {', '.join(architectures) or 'none'} in config.json",
            help="decoders and encoder-decoders: give a torch.export archive or a factory for the part to compile"
            if _generates(architectures)
            else None,
        )
    if task not in TASKS:
        near = difflib.get_close_matches(task, TASKS, n=1)
        raise LoadError(
            f"unknown task {task}",
            needed=f"one that fits: {listed}",
            found=task,
            help=f"did you mean {near[0]}?" if near else None,
        )
    if task not in fitting:
        raise LoadError(
            f"a {config.model_type} model does not do {task}", needed=f"--task, one that fits: {listed}", found=task
        )
    return TASKS[task]


def _two_towers(config: Any) -> bool:
    """Whether the model is one for images and one for text (CLIP, SigLIP): the task says which to compile."""
    return hasattr(config, "vision_config") and hasattr(config, "text_config")


def _generates(architectures: tuple[str, ...]) -> bool:
    return any(name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for name in architectures)


def _fitting(config: Any) -> list[str]:
    """List the tasks for which transformers has a class for this configuration."""
    import transformers

    names = []
    for task in TASKS.values():
        mapping: Mapping[Any, Any] = getattr(transformers, task.auto_class)._model_mapping
        if type(config) in mapping and task.generates == _is_decoder(config):
            names.append(task.name)
    if "image-feature-extraction" in names and not _has_images(config):
        names.remove("image-feature-extraction")
    return names


def _is_decoder(config: Any) -> bool:
    """Whether the model generates token by token; an encoder-decoder with a known encoder is not meant."""
    import transformers

    if getattr(config, "is_encoder_decoder", False):
        return bool(config.model_type != "whisper")
    causal: Mapping[Any, Any] = transformers.AutoModelForCausalLM._model_mapping
    masked: Mapping[Any, Any] = transformers.AutoModelForMaskedLM._model_mapping
    return bool(getattr(config, "is_decoder", False) or (type(config) in causal and type(config) not in masked))


def _has_images(config: Any) -> bool:
    vision = getattr(config, "vision_config", config)
    return hasattr(vision, "image_size") or hasattr(vision, "num_channels")


def model_class(task: Task, config: Any) -> tuple[Any, Any]:
    """Return the class that loads the model and the configuration it takes.

    Two-tower models (CLIP, SigLIP) are loaded as the tower that the task is about.
    """
    import transformers

    architecture = next(iter(getattr(config, "architectures", None) or ()), "")
    if task.auto_class == "AutoModel" and _two_towers(config):
        image = task.name == "image-feature-extraction"
        family = type(config).__name__.removesuffix("Config")
        tower = "Vision" if image else "Text"
        for name in (f"{family}{tower}ModelWithProjection", f"{family}{tower}Model"):
            if hasattr(transformers, name):
                part = config.vision_config if image else config.text_config
                if hasattr(config, "projection_dim"):
                    part.projection_dim = config.projection_dim  # the whole model's counts, a part may say otherwise
                return getattr(transformers, name), part
        raise LoadError(
            f"transformers has no {tower.lower()} tower for {family}",
            help="give a factory (`model.py:factory`) that returns the part to compile",
        )
    if (
        task.auto_class == "AutoModel"
        and architecture.endswith("WithProjection")
        and hasattr(transformers, architecture)
    ):
        return getattr(transformers, architecture), config  # AutoModel would leave the projection out
    return getattr(transformers, task.auto_class), config
