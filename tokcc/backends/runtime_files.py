"""The files that runtimes and tokenizers look for next to a decoder: configuration and tokenizer, nothing that runs.

From a model folder they are copied, from a GGUF file they are written by transformers. ``tokcc run`` reads them, and
optimum's ``ORTModelForCausalLM``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokcc.backends.manifest import FieldEntry
from tokcc.capture.hf import gguf_file
from tokcc.capture.hf_decoder import CausalDecoder
from tokcc.capture.loaded import Loaded
from tokcc.errors import LoadError

__all__ = ["TOKENIZER_FILES", "edit_fields", "save_processor_files", "save_runtime_files", "stop_tokens"]

_CONFIG, _GENERATION = "config.json", "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "chat_template.json",
    "chat_template.jinja",
)
_DECODER_FILES = (_CONFIG, _GENERATION, *TOKENIZER_FILES)
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
_TOKENIZER_ITSELF = {"tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "sentencepiece.bpe.model"}
_TOKENIZER_ITSELF |= {"spiece.model"}
# How pickles begin, and the archives that hold them: no tokenizer of the formats above begins so.
_PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")


def save_runtime_files(loaded: Loaded, output: Path) -> tuple[str, ...]:
    """Put what runtimes need next to the engine of a decoder that came from a model folder.

    Args:
        loaded: The model.
        output: The bundle.

    Returns:
        Remarks for the report.

    Raises:
        LoadError: A file of the model's folder cannot be read.
    """
    if not isinstance(loaded.module, CausalDecoder) or not Path(loaded.source).is_dir():
        return ()  # nothing to take them from
    folder = Path(loaded.source)
    gguf = gguf_file(folder)
    remarks = list(_from_folder(folder, output) if gguf is None else _from_gguf(loaded.module, folder, gguf, output))
    if not any((output / name).is_file() for name in _TOKENIZER_ITSELF):
        remarks.append("no tokenizer came with the model: `tokcc run` needs the bundle to hold one")
    return tuple(remarks)


def save_processor_files(source: str, output: Path) -> tuple[str, ...]:
    """Put what runtimes need next to engines that read images or sounds: the processor's files, too.

    Args:
        source: How the model was named; nothing is done when it is no folder.
        output: The bundle.

    Returns:
        Remarks.

    Raises:
        LoadError: A file of the model's folder cannot be read.
    """
    folder = Path(source)
    if not (folder / _CONFIG).is_file():
        return ()
    return tuple(_from_folder(folder, output, (*_DECODER_FILES, *_PROCESSOR_FILES)))


def edit_fields(output: Path, edits: Iterable[FieldEntry]) -> None:
    """Set fields in files of a bundle; a file that is not there is made."""
    for edit in edits:
        path = output / edit.file
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        _write_json(path, {**content, edit.field: edit.value})


def stop_tokens(folder: Path) -> tuple[int, ...]:
    """Return the tokens that end a text, from the files beside an engine; none when they do not say."""
    for name in (_GENERATION, _CONFIG):
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # the engine runs without them
        value = content.get("eos_token_id") if isinstance(content, dict) else None
        ids = value if isinstance(value, list) else [value]
        found = tuple(item for item in ids if isinstance(item, int) and not isinstance(item, bool))
        if found:
            return found
    return ()


def _from_folder(folder: Path, output: Path, names: Sequence[str] = _DECODER_FILES) -> Iterator[str]:
    for name in names:
        source, target = folder / name, output / name
        if not source.is_file():
            continue
        if _head(source).startswith(_PICKLES):
            yield f"{name} is not copied: it is a pickle or an archive"
        elif source.suffix == ".json":
            yield from _copy_json(source, target)
        else:
            shutil.copyfile(source, target)


def _copy_json(source: Path, target: Path) -> Iterator[str]:
    """Copy as it is, but for references to code, which stays behind."""
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"{source} cannot be read", found=str(error), help="download it again") from error
    if isinstance(content, dict) and "auto_map" in content:
        _write_json(target, {key: value for key, value in content.items() if key != "auto_map"})
        yield f"{source.name} names code of the model's own (auto_map), which is not copied"
    else:
        shutil.copyfile(source, target)


def _from_gguf(module: CausalDecoder, folder: Path, name: str, output: Path) -> Iterator[str]:
    from transformers import AutoTokenizer

    model: Any = module.model
    model.config.save_pretrained(output)
    # The engine is not quantised, and a configuration that says so sends a reader looking for the GGUF file.
    _edit_json(output / _CONFIG, drop=("quantization_config", "_model_name_or_path"))
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(output)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), gguf_file=name, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers reads few of the tokenizers that GGUF knows, and fails in many ways
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        yield f"transformers cannot read the tokenizer in {name}: {reason}"
        return
    tokenizer.save_pretrained(output)
    # The one class name that transformers 4 and 5 both know.
    fast = {"tokenizer_class": "PreTrainedTokenizerFast"} if (output / "tokenizer.json").is_file() else {}
    _edit_json(output / "tokenizer_config.json", drop=("name_or_path", "local_files_only", "is_local"), **fast)


def _edit_json(path: Path, *, drop: Sequence[str], **set_: str) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    _write_json(path, {key: value for key, value in content.items() if key not in drop} | set_)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(4)
    except OSError as error:
        raise LoadError(f"{path} cannot be read", found=error.strerror or str(error)) from error
