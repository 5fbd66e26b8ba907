"""Hugging Face model folders: config.json and safetensors, loaded without running anything the folder brings."""

from __future__ import annotations

import contextlib
import io
import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokcc.capture.hf_decoder import CausalDecoder, decoder_dynamic, decoder_inputs
from tokcc.capture.hf_inputs import default_dynamic, default_specs, example_inputs, wrap
from tokcc.capture.hf_state_space import StateSpaceDecoder, is_state_space, state_space_dynamic, state_space_inputs
from tokcc.capture.hf_tasks import Task, choose_task, model_class
from tokcc.capture.inputs import InputSpec, describe
from tokcc.capture.loaded import Loaded
from tokcc.errors import CaptureError, LoadError

__all__ = ["OpenedFolder", "gguf_file", "load_folder", "opened_folder", "preprocessor_in"]

_PREPROCESSORS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "preprocessor_config.json",
    "processor_config.json",
)


def load_folder(
    folder: Path, *, task: str | None, specs: Sequence[InputSpec], dtype: torch.dtype | None, allow_pickle: bool
) -> Loaded:
    """Load a model folder for a task, in fp32 unless ``dtype`` says otherwise.

    Raises:
        LoadError: The folder is not a model folder, or its weights do not serve the task.
    """
    with opened_folder(folder, allow_pickle=allow_pickle) as opened:
        chosen = choose_task(task, opened.config)
        model, config, missing = opened.load(chosen, dtype)
    outputs = [name for name in chosen.outputs if not (name == "pooler_output" and missing)]
    if chosen.generates:
        return _decoder(folder, model, config, dtype or torch.float32, chosen)
    wrapper = wrap(model, config, outputs)
    defaults = default_specs(wrapper, config, folder, dtype or torch.float32) if not _complete(wrapper, specs) else {}
    inputs = example_inputs(wrapper, config, defaults, specs)
    wrapper.outputs = _existing_outputs(model, inputs, outputs)
    return Loaded(
        source=str(folder),
        module=wrapper,
        example_kwargs=inputs,
        dynamic_shapes=default_dynamic(inputs, wrapper, config),
        task=chosen.name,
        preprocessor=preprocessor_in(folder),
        label_names=_labels(config) if chosen.has_labels else (),
    )


@dataclass(frozen=True)
class OpenedFolder:
    """A model folder whose configuration was read.

    Attributes:
        folder: The folder.
        config: The configuration.
        pickled: Whether the weights are pickles.
        gguf: The GGUF file, or None.
    """

    folder: Path
    config: Any
    pickled: bool
    gguf: str | None

    def load(self, task: Task, dtype: torch.dtype | None) -> tuple[nn.Module, Any, bool]:
        """Load the weights for a task; also return the part's configuration and whether its pooler had none."""
        kind = dtype or torch.float32
        return _load_model(self.folder, task, self.config, kind, pickled=self.pickled, gguf=self.gguf)


@contextlib.contextmanager
def opened_folder(folder: Path, *, allow_pickle: bool) -> Iterator[OpenedFolder]:
    """Read a folder's configuration, with transformers kept quiet until the end of the block.

    Raises:
        LoadError: The folder is not a model folder, or brings code or pickles.
    """
    gguf = gguf_file(folder)
    if gguf is None:
        _check_config(folder)
    pickled = gguf is None and _needs_pickle(folder, allow_pickle)
    try:
        import transformers
    except ImportError as error:
        raise LoadError(
            "Hugging Face folders need transformers", found=str(error), help='pip install "tokcc[hf]"'
        ) from error
    with _quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, **_gguf_argument(gguf)
            )
        except ImportError as error:
            raise LoadError(
                "GGUF files need more packages",
                found=str(error).strip().splitlines()[0],
                help='pip install "tokcc[gguf]"',
            ) from error
        except struct.error as error:
            raise LoadError(
                f"{folder / (gguf or '')} is cut off: no GGUF header", found=str(error), help="download it again"
            ) from error
        except (ValueError, KeyError, OSError, TypeError) as error:
            raise _cannot_load(folder, error) from error
        yield OpenedFolder(folder, config, pickled, gguf)


def preprocessor_in(folder: Path) -> Path | None:
    """Return the folder if it holds files of a tokenizer or a processor."""
    return folder if any((folder / name).is_file() for name in _PREPROCESSORS) else None


def gguf_file(folder: Path) -> str | None:
    """Return the GGUF file of a folder that holds one and no configuration.

    Raises:
        LoadError: When there are several.
    """
    if (folder / "config.json").is_file():
        return None
    files = sorted(path.name for path in folder.glob("*.gguf"))
    if len(files) > 1:
        raise LoadError(
            f"{folder} holds several GGUF files",
            needed="one",
            found=", ".join(files[:4]),
            help="put the one to compile into a folder of its own",
        )
    return files[0] if files else None


def _gguf_argument(name: str | None) -> dict[str, str]:
    return {} if name is None else {"gguf_file": name}


def _decoder(folder: Path, model: nn.Module, config: Any, dtype: torch.dtype, task: Task) -> Loaded:
    """A causal language model with its cache, or its states, as inputs and outputs."""
    states = is_state_space(config)
    inputs = state_space_inputs(model, config, dtype) if states else decoder_inputs(model, config, dtype)
    return Loaded(
        source=str(folder),
        module=(StateSpaceDecoder(model) if states else CausalDecoder(model)).eval(),
        example_kwargs=inputs,
        dynamic_shapes=state_space_dynamic(inputs) if states else decoder_dynamic(inputs),
        task=task.name,
        preprocessor=preprocessor_in(folder),
    )


def _check_config(folder: Path) -> None:
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "manifest.json").is_file():
            raise _a_bundle(folder)
        if (folder / "adapter_config.json").is_file():
            raise LoadError(f"{folder} holds an adapter only", help="merge it into its base model and save that")
        listing = ", ".join(sorted(entry.name for entry in folder.iterdir())[:5])
        raise LoadError(
            f"{folder} is not a model folder",
            needed="config.json and safetensors in it",
            found=listing or "an empty folder",
            help="give the model file itself, or a Hugging Face folder",
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LoadError(f"{path} is not JSON", found=str(error), help="download it again") from error
    if not isinstance(config, dict) or "model_type" not in config:
        timm = isinstance(config, dict) and "architecture" in config
        raise LoadError(
            f"{path} names no model_type",
            found="a timm configuration" if timm else None,
            help="write a factory around timm.create_model(...) and give `model.py:factory`" if timm else None,
        )
    if "quantization_config" in config:
        raise LoadError(
            f"the weights in {folder} are quantised",
            found=str(config["quantization_config"].get("quant_method", "quantization_config in config.json")),
            help="reduce the original model, then quantise the engine",
        )


def _a_bundle(folder: Path) -> LoadError:
    return LoadError(
        f"{folder} is a bundle that tokcc wrote",
        help=f"`tokcc verify {folder}` and `tokcc bench {folder}` take bundles; compile takes the torch model",
    )


def _needs_pickle(folder: Path, allow_pickle: bool) -> bool:
    """Whether the weights are pickles, which needs the user's consent."""
    if any(folder.glob("*.safetensors")):
        return False
    pickles = sorted(entry.name for entry in folder.glob("pytorch_model*.bin"))
    if not pickles and (folder / "manifest.json").is_file():
        raise _a_bundle(folder)  # a decoder's bundle brings the configuration along
    if not pickles:
        raise LoadError(
            f"{folder} holds no weights",
            needed="*.safetensors",
            found=", ".join(sorted(entry.name for entry in folder.iterdir())[:5]),
        )
    if not allow_pickle:
        raise LoadError(
            f"the weights in {folder} are pickles",
            needed="*.safetensors",
            found=pickles[0],
            help="a pickle can run code: convert it with save_pretrained, or add --allow-pickle if you trust it",
        )
    return True


def _load_model(
    folder: Path, task: Task, config: Any, dtype: torch.dtype, *, pickled: bool, gguf: str | None
) -> tuple[nn.Module, Any, bool]:
    """Load the weights; also return the part's configuration and whether its pooler had none."""
    kind, part = model_class(task, config)
    try:
        model, info = kind.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, with names
            # A GGUF file's configuration is not read again: that reads its whole vocabulary.
            **({"use_safetensors": not pickled} if gguf is None else {**_gguf_argument(gguf), "config": config}),
            **({"trust_remote_code": False} if kind.__name__.startswith("Auto") else {"config": part}),
        )
    except Exception as error:  # transformers and safetensors raise many kinds for a damaged or foreign folder
        raise _cannot_load(folder, error) from error
    missing = sorted(info["missing_keys"])
    if task.auto_class == "AutoModel" and getattr(config, "is_encoder_decoder", False):
        model = model.get_encoder()
        missing = [key for key in missing if key.startswith("encoder.")]
    pooler = [key for key in missing if "pooler." in key]
    others = [key for key in missing if key not in pooler]
    if others or info["mismatched_keys"]:
        keys = others or sorted(str(item[0]) for item in info["mismatched_keys"])
        raise LoadError(
            f"the weights in {folder} do not serve {task.name}: part of the model would be random",
            needed=", ".join(keys[:4]) + (", ..." if len(keys) > 4 else ""),
            found=f"architectures: {', '.join(getattr(config, 'architectures', None) or ['?'])}",
            help="choose the --task that the checkpoint was trained for",
        )
    return model.eval(), part, bool(pooler)


def _cannot_load(folder: Path, error: Exception) -> LoadError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if "trust_remote_code" in str(error):
        return LoadError(
            f"{folder} brings its own model code",
            needed="an architecture that transformers has",
            help="tokcc never runs code from a model folder: write a factory and give `model.py:factory`",
        )
    return LoadError(f"transformers cannot load {folder}", found=f"{type(error).__name__}: {lines[0]}"[:300])


def _complete(wrapper: nn.Module, specs: Sequence[InputSpec]) -> bool:
    """Whether the user gave the main input of a model that has only one."""
    return any(spec.name in {"pixel_values", "input_values", "input_features"} for spec in specs)


def _existing_outputs(model: nn.Module, inputs: dict[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    """Run the model once and keep the outputs that it has."""
    try:
        with torch.no_grad():
            result = model(**inputs)
    except Exception as error:
        raise CaptureError(
            "the model does not run on its example inputs",
            found=f"{describe(inputs)}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            help="give inputs that fit with --input NAME=DTYPE[dims]",
        ) from error
    return tuple(name for name in names if getattr(result, name, None) is not None)


def _labels(config: Any) -> tuple[str, ...]:
    labels = getattr(config, "id2label", None) or {}
    return tuple(str(labels[key]) for key in sorted(labels, key=int))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and load reports off the terminal; problems are raised as errors."""
    import transformers

    logging: Any = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # The bar of GGUF files heeds no setting.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
