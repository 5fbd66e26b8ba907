"""Reading tokens with a decoder's engine, its cache carried along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from tokcc.backends.generation.decoder import Past
from tokcc.capture.hf_decoder import CausalDecoder
from tokcc.capture.loaded import Loaded
from tokcc.capture.vlm.parts import EmbeddedDecoder
from tokcc.ir.program import Program

__all__ = ["PIECE", "Engine", "Reading", "model_positions", "positions_beside"]

Array = npt.NDArray[Any]
PIECE = 256
"""Tokens of a call while a text is read."""
_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len")


class Engine(Protocol):
    """What is needed of :class:`tokcc.backends.generation.DecoderEngine`."""

    batch: int | None

    def empty_past(self, batch: int) -> Past:
        """Return the cache before the first call."""

    def read(self, ids: Array, mask: Array, positions: Array, past: Past) -> tuple[Array, Past]:
        """Run one call; logits of its tokens, and the cache after it."""


class Reading:
    """A text that an engine has read so far. All rows of the batch read the same.

    Args:
        engine: The engine.
        batch: Rows.

    Attributes:
        engine: The engine.
        past: The cache.
        seen: Tokens so far.
    """

    def __init__(self, engine: Engine, batch: int = 1) -> None:
        self.engine = engine
        self.past = engine.empty_past(batch)
        self.seen = 0
        self._batch = batch

    @property
    def cache_bytes(self) -> int:
        """Bytes of everything that is carried."""
        return sum(value.nbytes for value in self.past.values())

    def read(self, ids: Array) -> Array:
        """Read tokens ``[S]``; returns the logits of the first row ``[S, V]``, or ``[1, V]`` where it has no more."""
        logits, self.past = self._call(ids)
        self.seen += len(ids)
        return np.asarray(logits[0])

    def peek(self, ids: Array) -> Array:
        """Return what :meth:`read` would, and leave everything as it is."""
        return np.asarray(self._call(ids)[0][0])

    def branch(self) -> Reading:
        """Return a reading that goes on from here by itself."""
        other = Reading(self.engine, self._batch)
        # Caches with a slot for every token are written over.
        own = getattr(self.engine, "slots", None) is not None
        other.past = {name: value.copy() if own else value for name, value in self.past.items()}
        other.seen = self.seen
        return other

    def _call(self, ids: Array) -> tuple[Array, Past]:
        stop = self.seen + len(ids)
        rows = np.broadcast_to(np.asarray(ids, np.int64), (self._batch, len(ids)))
        positions = np.broadcast_to(np.arange(self.seen, stop, dtype=np.int64), rows.shape)
        mask = np.ones((self._batch, stop), np.int64)
        return self.engine.read(np.ascontiguousarray(rows), mask, np.ascontiguousarray(positions), self.past)


def model_positions(loaded: Loaded, program: Program) -> int | None:
    """Return how many positions a model has: by its configuration, and by its table of them."""
    found = [_table(program)]
    if isinstance(loaded.module, CausalDecoder | EmbeddedDecoder):
        model: Any = loaded.module.model
        config = model.config.get_text_config()
        found.append(_limit({name: getattr(config, name, None) for name in _LIMITS}))
    return min((limit for limit in found if limit is not None), default=None)


def positions_beside(engine: Path) -> int | None:
    """Return how many positions a model has, by the configuration beside its engine; None when there is none."""
    try:
        content = json.loads((engine.parent / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict):
        return None
    inner = content.get("text_config")
    return _limit({**content, **(inner if isinstance(inner, dict) else {})})


def _limit(config: dict[str, Any]) -> int | None:
    values = [config.get(name) for name in _LIMITS]
    return min((value for value in values if isinstance(value, int) and value > 0), default=None)


def _table(program: Program) -> int | None:
    """Return how many learned positions there are, or None."""
    for node in program.user_inputs:
        if "position" not in node.name:
            continue
        for user in node.users:
            table = user.args[0] if user.args else None
            if user.target is torch.ops.aten.embedding.default and hasattr(table, "meta"):
                return int(table.meta["val"].shape[0])  # type: ignore[union-attr]  # a node
    return None
