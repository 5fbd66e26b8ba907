"""``tokcc profile``: measure the heads of a decoder, for methods that treat them differently."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokcc.analysis.cache_sites import cache_sites
from tokcc.analysis.head_numbers import copies, cut_error, heard_attention, span_mass
from tokcc.backends.atomic import replace_file
from tokcc.backends.calls import empty_past
from tokcc.backends.parity import oracle
from tokcc.config import load_policy
from tokcc.errors import PlanError, UsageError
from tokcc.ir.program import Program
from tokcc.passes.cache.planning import make_cache_plan
from tokcc.passes.cache.rebuild import RebuildCaches
from tokcc.passes.methods import library
from tokcc.pipeline.request import ModelRequest
from tokcc.pipeline.stages import Stages
from tokcc.progress import Progress, silent

__all__ = ["HeadProfile", "profile"]

ROUNDS = 4
"""How often the text of different tokens is repeated."""
SPAN = 16
"""Tokens of the span that is copied."""
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Where it stands, as a share of the text."""
WINDOW = 8
"""Last queries that choose what is kept when a layer's error is measured."""


@dataclass(frozen=True)
class HeadProfile:
    """Numbers of heads, a row for each layer of the model.

    Attributes:
        echo: Attention of each query head to earlier copies of the current token.
        induction: Attention to what followed those copies.
        retrieval: Attention to a span while it is being copied.
        heads: The query heads of each layer with the highest retrieval.
        errors: What each layer loses when a part of its entries is kept, chosen by those heads.
        measured: How it was measured.
    """

    echo: tuple[tuple[float, ...], ...]
    induction: tuple[tuple[float, ...], ...]
    retrieval: tuple[tuple[float, ...], ...]
    heads: tuple[tuple[int, ...], ...]
    errors: tuple[float, ...]
    measured: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data, as policies name it."""
        names = ("echo", "induction", "retrieval", "heads", "errors", "measured")
        return {name: getattr(self, name) for name in names}

    def save(self, path: str | Path) -> None:
        """Write it as JSON, whole or not at all.

        Raises:
            OutputError: It cannot be written.
        """
        replace_file(Path(path), json.dumps(self.to_dict(), indent=1).encode())


def profile(
    model: Any,
    *,
    tokens: int = 512,
    heads: int = 4,
    keep: float = 0.25,
    seed: int = 0,
    task: str | None = "text-generation",
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> HeadProfile:
    """Measure the heads of a decoder on random tokens: no data is needed.

    Args:
        model: As for ``compile``.
        tokens: Length of the texts.
        heads: Query heads of each layer that count as retrieving.
        keep: Share of the entries that stay when a layer's error is measured.
        seed: Of the tokens.
        task: As for ``compile``.
        allow_pickle: As for ``compile``.
        progress: Shown while it runs.

    Raises:
        UsageError: A number is out of range.
        PlanError: The model is not a decoder with a cache.
    """
    if tokens < ROUNDS * SPAN:
        raise UsageError("the texts are too short", needed=f"at least {ROUNDS * SPAN} tokens", found=str(tokens))
    if not 0 < keep < 1 or heads < 1:
        raise UsageError("a number is out of range", needed="keep between 0 and 1, and at least one head")
    stages = Stages(progress or silent())
    _, program = ModelRequest(model, task=task, allow_pickle=allow_pickle).open(stages)
    with stages.stage("annotate"):
        sites = cache_sites(program)
        if not sites:
            raise PlanError("the model has no cache whose heads could be measured", needed="a causal language model")
        plan = make_cache_plan(load_policy("none", presets=library()), program, sites)
        whole = RebuildCaches(plan).run(program).program
    listener = _Listener(whole, torch.Generator().manual_seed(seed))
    with stages.stage("measure heads", 1 + 2 * len(DEPTHS)) as advance:
        echo, induction = listener.copying(tokens)
        advance(1)
        retrieval = torch.zeros_like(echo)
        texts = [listener.with_copied_span(tokens, depth) for depth in DEPTHS]
        for ids, span in texts:
            retrieval += listener.attending(ids, span) / len(texts)
            advance(1)
        chosen = [sorted(row.argsort(descending=True, stable=True)[:heads].tolist()) for row in retrieval]
        errors = torch.zeros(len(chosen), dtype=torch.float64)
        for ids, _ in texts:
            errors += torch.tensor(listener.losing(ids, chosen, max(round(keep * tokens), 2 * WINDOW))) / len(texts)
            advance(1)
    return HeadProfile(
        _rows(echo),
        _rows(induction),
        _rows(retrieval),
        tuple(map(tuple, chosen)),
        tuple(errors.tolist()),
        {"tokens": tokens, "rounds": ROUNDS, "span": SPAN, "depths": DEPTHS, "keep": keep, "seed": seed},
    )


def _rows(table: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in table.tolist())


@dataclass(frozen=True)
class _Listener:
    """Runs texts through a decoder and reads its attention."""

    program: Program
    generator: torch.Generator

    @property
    def vocabulary(self) -> int:
        position = list(self.program.output_names).index("logits")
        node = self.program.output_values[self.program.user_output_positions[position]]
        return int(node.meta["val"].shape[-1])

    def random(self, count: int) -> Tensor:
        """Different tokens where there are enough of them."""
        if self.vocabulary >= count:
            return torch.randperm(self.vocabulary, generator=self.generator)[:count]
        return torch.randint(0, self.vocabulary, (count,), generator=self.generator)

    def copying(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Return echo and induction, ``[layers, H]``."""
        period = tokens // ROUNDS
        rows: list[tuple[Tensor, Tensor]] = []
        self.run(self.random(period).repeat(ROUNDS), lambda layer, probs, value: rows.append(copies(probs, period)))
        return torch.stack([echo for echo, _ in rows]), torch.stack([induction for _, induction in rows])

    def with_copied_span(self, tokens: int, depth: float) -> tuple[Tensor, range]:
        """Return a text that ends with a copy of a span inside it, and where the span is."""
        text = self.random(tokens - SPAN)
        start = round(depth * (len(text) - SPAN))
        span = range(start, start + SPAN)
        return torch.cat([text, text[span.start : span.stop]]), span

    def attending(self, ids: Tensor, span: range) -> Tensor:
        """Return ``[layers, H]``: how much the copy attends to its original."""
        rows: list[Tensor] = []
        copy = range(len(ids) - len(span), len(ids))
        self.run(ids, lambda layer, probs, value: rows.append(span_mass(probs, copy, span)))
        return torch.stack(rows)

    def losing(self, ids: Tensor, heads: Sequence[Sequence[int]], kept: int) -> list[float]:
        """Return the error of each layer."""
        errors: list[float] = []
        self.run(ids, lambda layer, probs, value: errors.append(cut_error(probs, value, heads[layer], kept, WINDOW)))
        return errors

    def run(self, ids: Tensor, hear: Any) -> None:
        known = {
            "input_ids": ids[None],
            "attention_mask": torch.ones(1, len(ids), dtype=torch.int64),
            "position_ids": torch.arange(len(ids))[None],
        }
        feeds = empty_past(self.program, 1)
        for node in self.program.user_inputs:
            name = self.program.public_name(node)
            if name in known:
                feeds[name] = known[name].to(node.meta["val"].dtype)
        with torch.no_grad(), heard_attention(hear):
            oracle(self.program)(feeds)
