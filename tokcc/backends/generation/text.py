"""Text to tokens and back, with the tokenizer that lies beside an engine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokcc.backends.runtime_files import TOKENIZER_FILES
from tokcc.errors import UsageError

__all__ = ["TextStream", "Tokenizer"]

_CONTEXT = 6  # tokens of the prompt that decide how the first new one is written
_INCOMPLETE = "\ufffd"
_WAITING = 8  # tokens that a character can have; what is incomplete for longer is no character


class Tokenizer:
    """The tokenizer of a bundle: transformers' where it is installed, else the package ``tokenizers`` alone.

    Local files only, and no code of the model's own.

    Args:
        folder: The bundle.

    Raises:
        UsageError: There is no tokenizer, or nothing that reads it.
    """

    def __init__(self, folder: Path) -> None:
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
            raise UsageError(
                f"`{folder}` has no tokenizer",
                needed="tokenizer.json, or the files that transformers saves",
                help="compile from a model folder that has one, or use `tokcc.backends.generation` with token ids",
            )
        self._encode, self._decode = _with_transformers(folder) or _alone(folder)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a prompt, with the special ones that the model expects."""
        return self._encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens without special ones."""
        return self._decode(ids)

    def stream(self, prompt: Sequence[int] = ()) -> TextStream:
        """Return a stream of text that continues a prompt."""
        return TextStream(self._decode, prompt)


class TextStream:
    """Turns tokens that come one by one into text: a character of several tokens waits until it is whole.

    Args:
        decode: Tokens to text.
        prompt: What comes before: whether a space stands before the first new word depends on it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids = list(prompt[-_CONTEXT:])
        self._shown = len(self._ids)

    def push(self, token: int) -> str:
        """Return the text that a further token completes."""
        self._ids.append(token)
        return self._take(whole=True)

    def finish(self) -> str:
        """Return what is left, complete or not."""
        return self._take(whole=False)

    def _take(self, *, whole: bool) -> str:
        text = self._decode(self._ids)
        if whole and text.endswith(_INCOMPLETE) and len(self._ids) - self._shown < _WAITING:
            return ""
        before = self._decode(self._ids[: self._shown])
        # Long texts are not decoded again and again: a few tokens tell how the next ones are written.
        self._ids = self._ids[-_CONTEXT:]
        self._shown = len(self._ids)
        return text[len(before) :]


_Functions = tuple[Callable[[str], list[int]], Callable[[Sequence[int]], str]]


def _with_transformers(folder: Path) -> _Functions | None:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        return None
    with _quiet():
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers gives many kinds of error for a tokenizer that is not complete
            raise _unreadable(folder, error) from error

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    return lambda text: list(tokenizer(text, verbose=False)["input_ids"]), decode


def _alone(folder: Path) -> _Functions:
    if not (folder / "tokenizer.json").is_file():
        raise UsageError(f"the tokenizer of `{folder}` needs transformers", help='pip install "tokcc[hf]"')
    try:
        import tokenizers
    except ImportError as error:
        raise UsageError("text needs the package tokenizers", help='pip install "tokcc[hf]"') from error
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # its one class of error is Exception itself
        raise _unreadable(folder, error) from error

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    return lambda text: list(tokenizer.encode(text).ids), decode


def _unreadable(folder: Path, error: Exception) -> UsageError:
    return UsageError(
        f"the tokenizer of `{folder}` cannot be read",
        found=(str(error).splitlines() or [type(error).__name__])[0][:300],
        help="copy the model's tokenizer files into the bundle's folder again",
    )


@contextlib.contextmanager
def _quiet() -> Any:
    """Keep transformers' advice off the terminal."""
    import transformers

    logging: Any = transformers.utils.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
