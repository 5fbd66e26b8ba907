"""Generating text from images or sounds and text, with the engines of a model that was compiled in parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tokcc.backends.bundle import Bundle
from tokcc.backends.generation import DecoderEngine, Generation, Sampling
from tokcc.backends.generation.loop import Media, left_padded
from tokcc.backends.ort import Session
from tokcc.backends.packing import packed
from tokcc.backends.placeholders import Chunk, expand, grid_positions, shared_rows
from tokcc.backends.runtime_files import stop_tokens
from tokcc.errors import LoweringError, UsageError
from tokcc.passes.prompt.unmerge_plan import TOKEN_ASSIGN

__all__ = ["Picture", "VisionLanguage"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Picture:
    """One image (or sound) as the model's processor makes it.

    Attributes:
        units: What the encoder reads: ``[n, C, H, W]`` with n = 1 or the number of tiles; for models that read patches
            ``[patches, width]``; for sounds ``[1, bins, frames]``.
        size: Height and width before it was cut into tiles, where the family needs them.
        beside: Further inputs of the encoder, by name.
    """

    units: Array
    size: tuple[int, int] | None = None
    beside: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class _Features:
    """Rows ``[rows, H]`` of one picture, the placeholders that stand for them, and what the encoder told of them.

    Where the decoder attends to merged tokens one by one, `assign` says which row each placeholder reads.
    """

    rows: Array
    chunks: tuple[Chunk, ...]
    told: Mapping[str, Array]
    assign: Array | None = None


class VisionLanguage:
    """Runs encoder, embedding and decoder of a bundle.

    Args:
        source: The bundle, or its folder.
        threads: Of the runtime; 0 = its default.

    Raises:
        UsageError: The bundle has no such parts.
    """

    def __init__(self, source: Bundle | str | Path, *, threads: int = 0) -> None:
        self.bundle = source if isinstance(source, Bundle) else Bundle.open(source)
        media = self.bundle.manifest.media
        if media is None:
            raise UsageError(
                f"`{self.bundle.path}` reads text alone",
                needed="a bundle of a model that reads images or sounds",
                help="use tokcc.backends.generation.Generator",
            )
        self.media = media
        part = self.bundle.part(media.part)
        self._encoder = Session(part.engine("onnx"), threads=threads)
        contract = next(item for item in part.manifest.inputs if item.name == media.input)
        # An engine for one image has no axis to count images.
        self._batched = isinstance(contract.shape[0], str)
        self._dtype = contract.dtype
        self.tile = contract.shape[-1] if isinstance(contract.shape[-1], int) else 0
        """Side of what the encoder reads, in pixels, for models that read images."""
        self.engine = DecoderEngine(self.bundle, threads=threads)
        marks = {name: f"{media.output}.{name}" for name, item in self.engine.added.items() if item.shape == ("B", "S")}
        # What a step in the encoder marks its tokens with, and one in the decoder reads.
        told = {name: output for name, output in marks.items() if output in self._encoder.outputs}
        self._told = {name: output for name, output in told.items() if output != media.assign}
        self._line_end = np.load(self.bundle.path / media.line_end) if media.line_end else None

    def encode(self, pictures: Sequence[Picture]) -> list[Array]:
        """Return the features ``[rows, H]`` of pictures, as they come into prompts.

        Raises:
            UsageError: A picture does not fit the encoder.
        """
        return [features.rows for features in self._encode(pictures)]

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        pictures: Sequence[Sequence[Picture | Array]],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: Sequence[int] | None = None,
    ) -> Generation:
        """Generate step by step.

        Args:
            prompts: Token ids with placeholders; see :func:`tokcc.backends.placeholders.expand` for how many.
            pictures: The pictures of each prompt, in order; prompts may have different numbers of them, or none.
            max_new_tokens: At most this many in each row.
            sampling: How tokens are chosen; the most probable one by default.
            stop: Tokens that end a row; by default what the files of the bundle say.

        Returns:
            An iterator over the steps.

        Raises:
            UsageError: A prompt is empty, or pictures and placeholders do not fit.
        """
        if not prompts or not all(len(row) for row in prompts) or len(pictures) != len(prompts):
            raise UsageError(
                "prompts and pictures do not fit", needed="a list of pictures for every prompt, maybe empty"
            )
        if max_new_tokens < 1:
            raise UsageError("nothing is to be generated", needed="max_new_tokens of at least 1")
        rows, media = self.prepare(prompts, pictures)
        ends = frozenset(stop_tokens(self.bundle.path) if stop is None else stop)
        return Generation(self.engine, rows, max_new_tokens, sampling or Sampling(), ends, media=media)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        pictures: Sequence[Sequence[Picture | Array]],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Generate at once; returns the new tokens of each row. Arguments as of :meth:`stream`."""
        return self.stream(prompts, pictures, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop).finish()

    def prepare(
        self, prompts: Sequence[Sequence[int]], pictures: Sequence[Sequence[Picture | Array]]
    ) -> tuple[list[list[int]], Media]:
        """Return prompts with a placeholder for every feature, and what the decoder reads in place of their tokens."""
        given = [[item if isinstance(item, Picture) else Picture(item) for item in row] for row in pictures]
        made = iter(self._encode([item for row in given for item in row]))
        features = [[next(made) for _ in row] for row in given]
        chunks = [[chunk for item in row for chunk in item.chunks] for row in features]
        rows = [expand(row, self.media.token_id, own) for row, own in zip(prompts, chunks, strict=True)]
        ids, mask = left_padded(rows)
        embeds = self.engine.embed(ids).copy()
        places = (ids == self.media.token_id) & (mask == 1)
        beside = {name: places.astype(np.int64) for name in self.media.masks}
        nothing = self.engine.nothing(*ids.shape)
        beside |= {name: nothing[name] for name in self._told}
        for number, own in enumerate(features):
            if own and self.media.assign is None:
                embeds[number, places[number]] = np.concatenate([item.rows for item in own])
                for name in self._told:
                    beside[name][number, places[number]] = np.concatenate([item.told[name] for item in own])
        if self.media.assign is not None:
            embeds, beside[TOKEN_ASSIGN.name] = self._shared(rows, embeds, features)
        if self.media.positions == "rows":
            return rows, Media(embeds, beside=beside)
        positions = np.zeros((self.engine.position_axes, *ids.shape), np.int64)
        for number, row in enumerate(rows):
            positions[:, number, ids.shape[1] - len(row) :] = grid_positions(row, self.media.token_id, chunks[number])
        return rows, Media(embeds, positions, beside)

    def _shared(
        self, rows: Sequence[Sequence[int]], embeds: Array, features: Sequence[Sequence[_Features]]
    ) -> tuple[Array, Array]:
        """Return embeddings ``[B, U, H]`` that tokens share, and which one each token reads, int64 ``[B, N]``."""
        made: list[tuple[Array, Array]] = []
        for row, words, own in zip(rows, embeds, features, strict=True):
            starts = np.cumsum([0, *(len(item.rows) for item in own)])
            pairs = [(item.assign, start) for item, start in zip(own, starts, strict=False) if item.assign is not None]
            assign = np.concatenate([np.zeros(0, np.int64), *(index + start for index, start in pairs)])
            token, feature, read = shared_rows(row, self.media.token_id, assign)
            values: Array = words[len(words) - len(row) :][token]
            if own:
                values[feature >= 0] = np.concatenate([item.rows for item in own])[feature[feature >= 0]]
            made.append((values, read))
        longest = max(len(values) for values, _ in made)
        shared = np.zeros((len(made), longest, embeds.shape[2]), embeds.dtype)
        assigned: Array = np.zeros(embeds.shape[:2], np.int64)
        for number, (values, read) in enumerate(made):
            shared[number, longest - len(values) :] = values
            assigned[number, assigned.shape[1] - len(read) :] = read + longest - len(values)
        return shared, assigned

    def _encode(self, pictures: Sequence[Picture]) -> list[_Features]:
        if not pictures:
            return []
        units = [self._units(picture) for picture in pictures]
        counts = [len(item) if self._batched else 1 for item in units]
        calls: list[dict[str, Array]]
        beside = sorted({name for picture in pictures for name in picture.beside})
        if self._batched:
            calls = [{self.media.input: np.concatenate(units)}]
            calls[0] |= {name: np.concatenate([p.beside[name] for p in pictures]) for name in beside}
        else:
            calls = [{self.media.input: item, **picture.beside} for item, picture in zip(units, pictures, strict=True)]
        results = [self._run(call) for call in calls]
        features = np.concatenate([result[self.media.output] for result in results])
        index = None if self.media.index is None else np.concatenate([result[self.media.index] for result in results])
        there = self._there(results, features)
        told = {name: np.concatenate([result[output] for result in results]) for name, output in self._told.items()}
        assign = None
        if self.media.assign is not None:
            assign = np.concatenate([result[self.media.assign] for result in results])
        made, start = [], 0
        for picture, count in zip(pictures, counts, strict=True):
            span = slice(start, start + count)
            own = {name: values[span][there[span]] for name, values in told.items()}
            places = None if index is None else index[span]
            found = self._of_picture(picture, features[span], places, there[span], own)
            made.append(found if assign is None else _reading(found, assign[span], there[span]))
            start += count
        return made

    def _units(self, picture: Picture) -> Array:
        units = np.asarray(picture.units).astype(self._dtype, copy=False)
        rank = len(self._encoder.session.get_inputs()[self._encoder.inputs.index(self.media.input)].shape)
        return units[None] if units.ndim == rank - 1 and self._batched else units

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        missing = [name for name in self._encoder.inputs if name not in feeds]
        if missing:
            raise UsageError(f"the encoder also reads `{missing[0]}`", help="give it as `Picture(units, beside={...})`")
        try:
            return self._encoder.run(feeds)
        except Exception as error:  # onnxruntime raises its own, undocumented classes
            wanted = {item.name: item.shape for item in self._encoder.session.get_inputs()}
            raise LoweringError(
                "the encoder does not take the picture",
                needed=", ".join(f"{name} {shape}" for name, shape in wanted.items()),
                found=", ".join(f"{name} {list(value.shape)}" for name, value in feeds.items()),
            ) from error

    def _there(self, results: Sequence[Mapping[str, Array]], features: Array) -> Array:
        """Return which rows of each unit count, bool ``[n, N]``: of sounds, and where a policy chooses how many."""
        if self.media.valid is not None:
            return np.concatenate([result[self.media.valid] for result in results]).astype(bool)
        if self.media.lengths is None:
            return np.ones(features.shape[:2], bool)
        lengths = np.concatenate([result[self.media.lengths] for result in results])
        return np.arange(features.shape[1])[None] < lengths[:, None]

    def _of_picture(
        self, picture: Picture, features: Array, index: Array | None, there: Array, told: Mapping[str, Array]
    ) -> _Features:
        """Return the rows of one picture: of its units one after the other, or as its tiles lie."""
        media = self.media
        if media.packing == "anyres":
            whole = media.tokens == media.stock_tokens
            if whole and told:
                raise UsageError(
                    f"the encoder tells `{min(told)}` of the tokens of each tile, and tiles are laid side by side",
                    needed="a policy that leaves fewer tokens of a tile, which then follow each other",
                )
            tiles = features if whole else np.zeros((len(features), media.stock_tokens, features.shape[2]))
            rows = packed(tiles, picture.size, media.pinpoints, self.tile, self._line_end)
            # Fewer tokens have no place in a grid: they follow each other, and stand for all of the image.
            chunk = Chunk(len(rows), len(rows) if whole else int(there.sum()))
            return _Features(rows if whole else features[there], (chunk,), told)
        chunks = tuple(
            Chunk(
                media.stock_tokens if media.lengths is None else int(own.sum()),
                int(own.sum()),
                media.grid,
                None if index is None else index[number][own],
                last=number == len(features) - 1,
            )
            for number, own in enumerate(there)
        )
        return _Features(features[there], chunks, told)


def _reading(features: _Features, assign: Array, there: Array) -> _Features:
    """Return features of which each placeholder, as many as the model was made with, reads one.

    Args:
        features: Of one picture.
        assign: int64 ``[n, N]``: the slot that each token of a unit went to.
        there: bool ``[n, K]``: slots that hold a feature.
    """
    before = np.concatenate([[0], there.sum(1).cumsum()[:-1]])
    rank = there.cumsum(1) - 1 + before[:, None]
    chunks = tuple(replace(chunk, rows=chunk.stock, kept=None) for chunk in features.chunks)
    return replace(features, chunks=chunks, assign=np.take_along_axis(rank, assign, 1).reshape(-1))
