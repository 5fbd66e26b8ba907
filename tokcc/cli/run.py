"""``tokcc run``: text from a compiled decoder."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokcc.cli.bundles import BundlePath
from tokcc.cli.output import Json, Output, Quiet, Verbose
from tokcc.errors import UsageError

if TYPE_CHECKING:
    from tokcc.backends.bundle import Bundle
    from tokcc.backends.generation import Generation
    from tokcc.backends.generation.text import Tokenizer

    _Begin = Callable[[str, Tokenizer], tuple[list[int], Callable[..., Generation]]]

__all__ = ["run"]


def run(
    bundle: BundlePath,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT", help="The text to continue; `-` reads it from standard input.", show_default=False
        ),
    ] = None,
    text_of: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="The same, as an option.", show_default=False)
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            "--image",
            metavar="FILE",
            help="An image for the prompt, where the model reads images; repeatable, in the order of placeholders.",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Stop after this many.")] = 128,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="0 = the most probable token each time. By default 0, or 1 with --top-k or --top-p.",
            show_default=False,
        ),
    ] = None,
    top_k: Annotated[int, typer.Option(min=0, help="Choose among this many tokens; 0 = all.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Choose among tokens that make up this share.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random choice.")] = 0,
    threads: Annotated[int, typer.Option(min=0, help="Threads for the runtime; 0 = its default.")] = 0,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Continue a text with a compiled decoder, to see what it says; speed and memory come last."""
    out = Output(json=json, quiet=quiet, verbose=verbose)
    with out.running():
        from tokcc.backends.bundle import Bundle
        from tokcc.backends.generation import Sampling
        from tokcc.backends.generation.text import Tokenizer

        if temperature is None:
            temperature = 1.0 if top_k or top_p < 1 else 0.0
        sampling = Sampling(temperature, top_k, top_p, seed)
        opened = Bundle.open(bundle)
        if (prompt is None) == (text_of is None):
            raise UsageError("one prompt is needed", needed="PROMPT after the bundle, or --prompt TEXT")
        words = _read(prompt or text_of or "")
        begin = _with_images(opened, image, threads) if image else _text_alone(opened, threads)
        tokenizer = Tokenizer(opened.path)
        ids, stream = begin(words, tokenizer)
        generation = stream(max_new_tokens=max_new_tokens, sampling=sampling)
        text = tokenizer.stream(ids)
        pieces: list[str] = []

        def show(piece: str) -> None:
            pieces.append(piece)
            out.write(_printable(piece))

        try:
            for (token,) in generation:
                if token is not None:
                    show(text.push(token))
            show(text.finish())
        finally:
            out.write("\n")  # an error or Ctrl-C starts on a line of its own
        out.data(_facts(generation, "".join(pieces), len(ids)))
        out.note(_summary(generation, len(ids)))


def _text_alone(bundle: Bundle, threads: int) -> _Begin:
    """Return what begins a generation from text."""
    from tokcc.backends.generation import Generator

    generator = Generator(bundle, threads=threads)

    def begin(words: str, tokenizer: Tokenizer) -> tuple[list[int], Callable[..., Generation]]:
        ids = tokenizer.encode(words)
        if not ids:
            raise UsageError("the prompt is empty", needed="some text", help="give it in quotes after the bundle")
        return ids, partial(generator.stream, [ids])

    return begin


def _with_images(bundle: Bundle, images: Sequence[Path], threads: int) -> _Begin:
    """Return what begins a generation from images and text: the processor has a tokenizer of its own."""
    from tokcc.backends.processing import Processor
    from tokcc.backends.vlm import VisionLanguage

    model = VisionLanguage(bundle, threads=threads)

    def begin(words: str, tokenizer: Tokenizer) -> tuple[list[int], Callable[..., Generation]]:
        del tokenizer
        ids, pictures = Processor(bundle.path, model.media, tile=model.tile).read(words, images)
        return ids, partial(model.stream, [ids], [pictures])

    return begin


def _read(prompt: str) -> str:
    if prompt != "-":
        return prompt
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UsageError("standard input is not text", needed=error.encoding, found=str(error.reason)) from error


def _printable(text: str) -> str:
    """Leave out control characters: a model's text must not drive the terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def _facts(generation: Generation, text: str, prompt_tokens: int) -> dict[str, Any]:
    (row,) = generation.rows
    return {
        "text": text,
        "tokens": row,
        "prompt_tokens": prompt_tokens,
        "new_tokens": len(row),
        "stopped": generation.stopped[0],
        "prompt_seconds": generation.prompt_seconds,
        "tokens_per_second": generation.tokens_per_second,
        "kv_bytes": generation.cache_bytes,
        "kv_bytes_without_eviction": generation.whole_cache_bytes,
    }


def _summary(generation: Generation, prompt_tokens: int) -> str:
    new = len(generation.rows[0])
    speed = f"{generation.tokens_per_second:.1f} tokens/s" if generation.tokens_per_second else "one call only"
    held, whole = _size(generation.cache_bytes), _size(generation.whole_cache_bytes)
    return (
        f"{prompt_tokens} + {new} tokens, prompt in {generation.prompt_seconds:.2f} s, then {speed}; "
        f"KV cache holds {held} (all {generation.fed} tokens: {whole})"
    )


def _size(count: int) -> str:
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
