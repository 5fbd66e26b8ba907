"""Fidelity: how far the outputs of the engine are from those of the baseline engine.

All sums are in float64 and every number is per sample first, then combined over the batches, so batch size and order
do not matter. A sample where the engine alone gives NaN or infinity has no similarity: it is counted, kept out of the
means, and fails every accuracy gate.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np

from tokcc.errors import UsageError
from tokcc.report.distances import (
    Array,
    as_logits,
    cosine_rows,
    finite_pair,
    kl_rows,
    log_softmax,
    relative_error_rows,
    take_tokens,
)
from tokcc.report.schema import Fidelity, OutputFidelity, TaskMetric

__all__ = ["Contract", "FidelityMeter"]

Contract: TypeAlias = Literal["full", "reduced", "last_token"] | Mapping[str, Sequence[int]]

_ROWS_AT_ONCE = 512
"""Rows of logits converted to float64 at a time: a vocabulary of 150 000 would otherwise need gigabytes."""

_EMBEDDING_WORDS = ("embed", "pool", "hidden", "feature", "state")
_LOGIT_WORDS = ("logit", "score", "prob")


@dataclass
class _Sums:
    """Running totals of one output."""

    cosines: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    rows: int = 0
    same_top: int = 0
    kl_total: float = 0.0
    kl_rows: int = 0
    entries: int = 0
    equal: int = 0
    nonfinite: int = 0
    integer: bool = False
    hits: tuple[int, int] = (0, 0)
    labelled: int = 0
    surprise: tuple[float, float] = (0.0, 0.0)
    predicted: int = 0


class FidelityMeter:
    """Compares the outputs of two engines batch by batch.

    Example:
        >>> meter = FidelityMeter()
        >>> logits = np.array([[1.0, 2.0], [3.0, 0.0]], dtype=np.float32)
        >>> meter.update({"logits": logits}, {"logits": logits}, labels=[1, 0])
        >>> meter.result(source="two rows").outputs[0].top1_agreement
        1.0

    Args:
        logits: Names of the outputs that are class or token scores (top-1 agreement and KL make sense for them). By
            default those whose name says so, and two-dimensional ones whose name does not say that they are embeddings.
        contracts: The policy's output contracts, to compare `last_token` and `rows` outputs with the same rows of the
            baseline. Outputs that are `reduced` are aligned through their ``.token_index`` or ``.token_assign``.
    """

    def __init__(
        self, *, logits: Collection[str] | None = None, contracts: Mapping[str, Contract] | None = None
    ) -> None:
        self._logits = None if logits is None else frozenset(logits)
        self._contracts = dict(contracts or {})
        self._sums: dict[str, _Sums] = {}
        self._skipped: dict[str, str] = {}
        self._samples = 0

    @property
    def nonfinite_samples(self) -> int:
        """Samples of any output where the engine alone has NaN or infinity."""
        return sum(sums.nonfinite for sums in self._sums.values())

    def update(
        self,
        baseline: Mapping[str, Array],
        engine: Mapping[str, Array],
        *,
        labels: Sequence[int] | None = None,
        tokens: Array | None = None,
        mask: Array | None = None,
    ) -> None:
        """Take in one batch.

        Args:
            baseline: Outputs of the baseline engine by name.
            engine: Outputs of the engine by name.
            labels: Class of each sample, for accuracy.
            tokens: Token ids ``[B, S]`` that a language model read, for perplexity.
            mask: Which tokens are real, ``[B, S]``: padding is left out of every number of an output ``[B, S, ...]``.

        Raises:
            UsageError: The engine lacks an output, or the labels do not fit.
        """
        count = 0
        for name, reference in baseline.items():
            if name not in engine:
                raise UsageError(f"the engine has no output {name}", found=", ".join(engine))
            pair = self._aligned(name, np.asarray(reference), np.asarray(engine[name]), engine)
            count = max(count, len(reference) if np.ndim(reference) else 1)
            if pair is None:
                continue
            self._skipped.pop(name, None)
            self._compare(name, *pair, labels=labels, tokens=tokens, mask=mask)
        self._samples += count

    def result(self, *, source: str, weights: Literal["trained", "random", "unknown"] = "unknown") -> Fidelity:
        """Return the fidelity section over everything taken in."""
        metrics = [metric for name, sums in self._sums.items() for metric in _metrics(name, sums)]
        return Fidelity(
            source=source,
            samples=self._samples,
            outputs=tuple(_summary(name, sums) for name, sums in self._sums.items()),
            metrics=tuple(metrics),
            skipped=dict(self._skipped),
            weights=weights,
        )

    def _aligned(
        self, name: str, reference: Array, other: Array, engine: Mapping[str, Array]
    ) -> tuple[Array, Array] | None:
        if name + ".token_index" in engine:
            index = np.asarray(engine[name + ".token_index"])
            reference = take_tokens(reference, index.astype(np.int64))
        elif name + ".token_assign" in engine:
            other = take_tokens(other, np.asarray(engine[name + ".token_assign"]).astype(np.int64))
        else:
            contract = self._contracts.get(name, self._contracts.get("*", "full"))
            if reference.shape != other.shape and reference.ndim >= 2:
                if contract == "last_token":
                    reference = reference[:, -1:].reshape(other.shape)
                elif isinstance(contract, Mapping):
                    reference = reference[:, list(contract["rows"])]
        if reference.shape != other.shape:
            self._skipped[name] = f"shapes differ: baseline {list(reference.shape)}, engine {list(other.shape)}"
            return None
        if reference.dtype.kind not in "fiub":
            self._skipped[name] = f"type {reference.dtype} is not a number"
            return None
        return reference, other

    def _compare(
        self,
        name: str,
        reference: Array,
        other: Array,
        *,
        labels: Sequence[int] | None,
        tokens: Array | None,
        mask: Array | None,
    ) -> None:
        sums = self._sums.setdefault(name, _Sums())
        if reference.dtype.kind != "f":
            sums.integer = True
            sums.entries += reference.size
            sums.equal += int((reference == other).sum())
            return
        scores = self._are_scores(name, reference)
        real = None if mask is None or reference.ndim < 3 else np.asarray(mask).astype(bool)
        if real is not None and real.shape != reference.shape[:2]:
            real = None  # the mask is about another token axis
        for row, (a, b) in enumerate(zip(np.atleast_1d(reference), np.atleast_1d(other), strict=True)):
            if real is not None:
                a, b = a[real[row]], b[real[row]]
            first, second, usable = finite_pair(a, b)
            if not usable:
                sums.nonfinite += 1
                continue
            sums.cosines.append(float(cosine_rows(first[None], second[None])[0]))
            sums.errors.append(float(relative_error_rows(first[None], second[None])[0]))
            if scores:
                _compare_scores(sums, a, b)
        if scores and reference.ndim == 2 and labels is not None:
            _compare_labels(sums, name, reference, other, labels)
        if scores and reference.ndim == 3 and tokens is not None and tokens.shape == reference.shape[:2]:
            _compare_tokens(sums, reference, other, tokens, mask)

    def _are_scores(self, name: str, values: Array) -> bool:
        if values.ndim < 2 or values.shape[-1] < 2:
            return False
        if self._logits is not None:
            return name in self._logits
        lowered = name.lower()
        if any(word in lowered for word in _LOGIT_WORDS):
            return True
        return values.ndim == 2 and not any(word in lowered for word in _EMBEDDING_WORDS)


def _compare_scores(sums: _Sums, reference: Array, other: Array) -> None:
    """Top-1 agreement and KL of one sample: ``[C]`` or ``[..., C]``."""
    width = reference.shape[-1]
    first, second = reference.reshape(-1, width), other.reshape(-1, width)
    for start in range(0, len(first), _ROWS_AT_ONCE):
        a, b = first[start : start + _ROWS_AT_ONCE], second[start : start + _ROWS_AT_ONCE]
        sums.rows += len(a)
        sums.same_top += int((a.argmax(axis=-1) == b.argmax(axis=-1)).sum())
        divergence = kl_rows(as_logits(a), as_logits(b))
        counted = np.isfinite(divergence)
        sums.kl_total += float(divergence[counted].sum())
        sums.kl_rows += int(counted.sum())


def _compare_labels(sums: _Sums, name: str, reference: Array, other: Array, labels: Sequence[int]) -> None:
    truth = np.asarray(labels, dtype=np.int64)
    if truth.shape != (len(reference),):
        raise UsageError(
            "labels do not fit the batch", needed=f"{len(reference)} labels", found=f"shape {list(truth.shape)}"
        )
    if truth.size and (truth.min() < 0 or truth.max() >= reference.shape[1]):
        raise UsageError(
            f"a label is not a class of output {name}",
            needed=f"0..{reference.shape[1] - 1}",
            found=f"{truth.min()}..{truth.max()}",
            help="labels are class indices of the model",
        )
    before, after = (int((values.argmax(axis=1) == truth).sum()) for values in (reference, other))
    sums.hits = (sums.hits[0] + before, sums.hits[1] + after)
    sums.labelled += len(truth)


def _compare_tokens(sums: _Sums, reference: Array, other: Array, tokens: Array, mask: Array | None) -> None:
    """Next-token cross entropy: the row of position ``i`` predicts token ``i + 1``."""
    ids = np.asarray(tokens, dtype=np.int64)
    real = np.ones(ids.shape, dtype=bool) if mask is None else np.asarray(mask).astype(bool)
    counted = real[:, 1:] & real[:, :-1]
    totals = []
    for values in (reference, other):
        total = 0.0
        for row in range(len(ids)):
            for start in range(0, ids.shape[1] - 1, _ROWS_AT_ONCE):
                piece = slice(start, min(start + _ROWS_AT_ONCE, ids.shape[1] - 1))
                following = slice(piece.start + 1, piece.stop + 1)
                chosen = np.take_along_axis(log_softmax(values[row, piece]), ids[row, following, None], axis=-1)[:, 0]
                total -= float(chosen[counted[row, piece]].sum())
        totals.append(total)
    sums.surprise = (sums.surprise[0] + totals[0], sums.surprise[1] + totals[1])
    sums.predicted += int(counted.sum())


def _summary(name: str, sums: _Sums) -> OutputFidelity:
    if sums.integer:
        return OutputFidelity(output=name, samples=0, exact_match=sums.equal / sums.entries if sums.entries else None)
    if not sums.cosines:
        return OutputFidelity(output=name, samples=0, nonfinite_samples=sums.nonfinite)
    return OutputFidelity(
        output=name,
        samples=len(sums.cosines),
        cosine_mean=math.fsum(sums.cosines) / len(sums.cosines),
        cosine_min=min(sums.cosines),
        relative_error_mean=math.fsum(sums.errors) / len(sums.errors),
        relative_error_max=max(sums.errors),
        top1_agreement=sums.same_top / sums.rows if sums.rows else None,
        kl=sums.kl_total / sums.kl_rows if sums.kl_rows else None,
        nonfinite_samples=sums.nonfinite,
    )


def _metrics(name: str, sums: _Sums) -> list[TaskMetric]:
    found = []
    if sums.labelled:
        before, after = (hits / sums.labelled for hits in sums.hits)
        found.append(TaskMetric(name="accuracy", output=name, before=before, after=after, samples=sums.labelled))
    if sums.predicted:
        before, after = (_exp(total / sums.predicted) for total in sums.surprise)
        if math.isfinite(before) and math.isfinite(after):
            found.append(
                TaskMetric(
                    name="perplexity",
                    output=name,
                    before=before,
                    after=after,
                    samples=sums.predicted,
                    higher_is_better=False,
                )
            )
    return found


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
