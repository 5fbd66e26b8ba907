"""``tokcc profile``: measure the heads or the scans of a decoder, for methods that treat them differently."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokcc.analysis.cache_sites import CacheSite, cache_sites
from tokcc.analysis.channel_numbers import Channels, ChannelSums
from tokcc.analysis.head_numbers import Attended, Heard, copies, cut_error, heard_attention, span_mass
from tokcc.analysis.pair_numbers import OrderedPairs, PairAgreement
from tokcc.analysis.rotation_pairs import Pairs, channel_pairs
from tokcc.analysis.state_sites import state_sites
from tokcc.backends.calls import empty_past
from tokcc.backends.parity import oracle
from tokcc.capture.loaded import Loaded
from tokcc.config import load_policy
from tokcc.errors import PlanError, UsageError
from tokcc.ir.program import Program
from tokcc.passes.cache.planning import make_cache_plan
from tokcc.passes.cache.rebuild import RebuildCaches
from tokcc.passes.methods import library
from tokcc.pipeline.decoding import tokenized
from tokcc.pipeline.profiling_densities import DensitySums
from tokcc.pipeline.profiling_patterns import PatternSearch
from tokcc.pipeline.profiling_scans import ScanProfile, profile_scans
from tokcc.pipeline.profiling_thresholds import ThresholdSearch
from tokcc.pipeline.request import ModelRequest
from tokcc.pipeline.saved_profile import SavedProfile
from tokcc.pipeline.stages import Stages
from tokcc.progress import Progress, silent
from tokcc.report.tokens import load_tokens

__all__ = ["HeadProfile", "profile"]

ROUNDS = 4
"""How often the text of different tokens is repeated."""
SPAN = 16
"""Tokens of the span that is copied."""
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Where it stands, as a share of the text."""
TEXTS = 5
"""Texts on which scans are measured, at most."""
WINDOW = 8
"""Last queries that choose what is kept when a layer's error is measured."""


@dataclass(frozen=True)
class HeadProfile(SavedProfile):
    """Numbers of heads, a row for each layer of the model.

    Attributes:
        echo: Attention of each query head to earlier copies of the current token.
        induction: Attention to what followed those copies.
        retrieval: Attention to a span while it is being copied.
        heads: The query heads of each layer with the highest retrieval.
        errors: What each layer loses when a part of its entries is kept, chosen by those heads.
        measured: How it was measured.
        patterns: What each query head reads best in sparse attention, as a policy writes it; None without a text.
        key_channels: Of each layer and key head, the channels in which products of queries and keys are largest first.
        query_channels: The same of each query head alone.
        key_pairs: Of each layer and key head, the pairs of channels that one frequency turns, first those which alone
            find most of what is attended to; None in a model without rotations.
        query_pairs: The same of each query head alone.
        thresholds: Estimated ratios that each query head may leave out in sparse attention; None without a text.
        densities: How evenly each layer rates the blocks of a text, 1 = all alike.
    """

    echo: tuple[tuple[float, ...], ...]
    induction: tuple[tuple[float, ...], ...]
    retrieval: tuple[tuple[float, ...], ...]
    heads: tuple[tuple[int, ...], ...]
    errors: tuple[float, ...]
    measured: dict[str, Any]
    patterns: tuple[tuple[dict[str, Any], ...], ...] | None = None
    key_channels: Channels | None = None
    query_channels: Channels | None = None
    key_pairs: OrderedPairs | None = None
    query_pairs: OrderedPairs | None = None
    thresholds: tuple[tuple[float, ...], ...] | None = None
    densities: tuple[float, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """See :class:`SavedProfile`."""
        return {name: value for name, value in super().to_dict().items() if value is not None}

    def summary(self) -> str:
        """See :class:`SavedProfile`."""
        highest = max(max(row) for row in self.induction)
        said = f"{len(self.echo)} layers of {len(self.echo[0])} heads, induction up to {highest:.2f}"
        kinds = Counter(pattern["kind"] for row in self.patterns or () for pattern in row)
        return said + "".join(f", {count} {kind}" for kind, count in kinds.most_common())

    def content(self) -> bytes:
        """See :class:`SavedProfile`."""
        return json.dumps(self.to_dict(), indent=1).encode()


def profile(
    model: Any,
    *,
    tokens: int = 512,
    heads: int = 4,
    keep: float = 0.25,
    block: int = 64,
    seed: int = 0,
    data: Any = None,
    task: str | None = "text-generation",
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> HeadProfile | ScanProfile:
    """Measure the heads of a decoder on random tokens, or the scans of a state-space decoder.

    Random tokens do for what heads look back at. Scans are better measured on a text: what they take in depends on it;
    and patterns and thresholds of sparse attention are only found on one, best as long as the prompts that are meant.

    Args:
        model: As for ``compile``.
        tokens: Length of the texts; for scans, of those that the model was trained on.
        heads: Query heads of each layer that count as retrieving.
        keep: Share of the entries that stay when a layer's error is measured, and of the blocks that a pattern reads.
        block: Queries and keys in a block of those patterns.
        seed: Of random tokens.
        data: A text as for ``calibration``, for scans and for patterns.
        task: As for ``compile``.
        allow_pickle: As for ``compile``.
        progress: Shown while it runs.

    Raises:
        UsageError: A number is out of range, or the text does not fit.
        PlanError: The model is not a decoder with a cache.
    """
    if tokens < ROUNDS * SPAN:
        raise UsageError("the texts are too short", needed=f"at least {ROUNDS * SPAN} tokens", found=str(tokens))
    if not 0 < keep < 1 or heads < 1:
        raise UsageError("a number is out of range", needed="keep between 0 and 1, and at least one head")
    stages = Stages(progress or silent())
    loaded, program = ModelRequest(model, task=task, allow_pickle=allow_pickle).open(stages)
    generator = torch.Generator().manual_seed(seed)
    scans = state_sites(program)
    if scans:
        with stages.stage("measure scans"):
            read = _texts(program, tokens, generator) if data is None else _pieces_of(data, tokens, loaded)
            measured = {"tokens": tokens, "texts": len(read), "of": f"seed {seed}" if data is None else str(data)}
            return profile_scans(program, scans, read, measured)
    if data is not None and not 1 <= block <= tokens // 2:
        raise UsageError("a number is out of range", needed=f"blocks of 1 to {tokens // 2} tokens: two in a text")
    with stages.stage("annotate"):
        sites = cache_sites(program)
        if not sites:
            raise PlanError("the model has no cache whose heads could be measured", needed="a causal language model")
        plan = make_cache_plan(load_policy("none", presets=library()), program, sites)
        whole = RebuildCaches(plan).run(program).program
    listener = _Listener(whole, generator)
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
    patterns, thresholds, channels = None, None, ChannelSums()
    pairs = _pairs_of_layers(program, sites)
    agreement = PairAgreement(pairs)
    densities = DensitySums(block)
    of_any_text = [channels.hear, densities.hear, *([agreement.hear] if pairs else [])]
    if data is None:
        with stages.stage("measure channels"):
            listener.run(listener.random(tokens), _all(of_any_text))
    else:
        with stages.stage("choose patterns and thresholds"):
            search, losses = PatternSearch(tokens, block, keep), ThresholdSearch(block)
            for ids in _pieces_of(data, tokens, loaded):
                listener.run(ids, _all([search.hear, losses.hear, *of_any_text]))
            patterns, thresholds = search.found(), losses.found()
    return HeadProfile(
        _rows(echo),
        _rows(induction),
        _rows(retrieval),
        tuple(map(tuple, chosen)),
        tuple(errors.tolist()),
        {"tokens": tokens, "rounds": ROUNDS, "span": SPAN, "depths": DEPTHS, "keep": keep, "seed": seed},
        patterns,
        channels.of_key_heads(),
        channels.of_query_heads(),
        agreement.of_key_heads(),
        agreement.of_query_heads(),
        thresholds,
        densities.found(),
    )


def _all(hearers: Sequence[Attended]) -> Attended:
    def hear(heard: Heard) -> None:
        for each in hearers:
            each(heard)

    return hear


def _pairs_of_layers(program: Program, sites: Sequence[CacheSite]) -> dict[int, Pairs]:
    """Return the pairs of channels of each layer that are turned together; of no layer where one has none."""
    nodes = {node.name: node for node in program.graph.nodes}
    found = {site.layer: channel_pairs(program, nodes[site.new_key]) for site in sites}
    pairs = {layer: pairs for layer, pairs in found.items() if pairs is not None}
    return pairs if len(pairs) == len(found) else {}


def _texts(program: Program, tokens: int, generator: torch.Generator) -> list[Tensor]:
    listener = _Listener(program, generator)
    return [listener.random(tokens) for _ in range(TEXTS)]


def _pieces_of(data: Any, tokens: int, loaded: Loaded) -> list[Tensor]:
    """Cut a text into some as long as those of the training."""
    encode = tokenized(loaded.preprocessor)
    ids = torch.from_numpy(load_tokens(data, encode, shortest=tokens, longest=TEXTS * tokens).ids)
    return list(ids[: len(ids) // tokens * tokens].reshape(-1, tokens).unbind())


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
        self.run(self.random(period).repeat(ROUNDS), lambda heard: rows.append(copies(heard.probs, period)))
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
        self.run(ids, lambda heard: rows.append(span_mass(heard.probs, copy, span)))
        return torch.stack(rows)

    def losing(self, ids: Tensor, heads: Sequence[Sequence[int]], kept: int) -> list[float]:
        """Return the error of each layer."""
        errors: list[float] = []
        self.run(ids, lambda x: errors.append(cut_error(x.probs, x.value, heads[x.layer], kept, WINDOW)))
        return errors

    def run(self, ids: Tensor, hear: Attended) -> None:
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
