"""How far two arrays are apart: row by row, in float64."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Array",
    "Floats",
    "as_logits",
    "cosine_rows",
    "finite_pair",
    "kl_rows",
    "log_softmax",
    "relative_error_rows",
    "take_tokens",
]

Array: TypeAlias = NDArray[np.generic]
Floats: TypeAlias = NDArray[np.float64]


def cosine_rows(first: Array, second: Array) -> Floats:
    """Cosine similarity of each row, all further axes flattened; two zero rows are equal, one zero row has cosine 0."""
    a, b = _flat(first), _flat(second)
    cosine = (_unit(a) * _unit(b)).sum(axis=1)
    both_zero = ~a.any(axis=1) & ~b.any(axis=1)
    return np.asarray(np.where(both_zero, 1.0, np.clip(cosine, -1.0, 1.0)), dtype=np.float64)


def relative_error_rows(reference: Array, other: Array) -> Floats:
    """``|other - reference| / |reference|`` (L2) of each row; where the reference is zero, the absolute error."""
    a, b = _flat(reference), _flat(other)
    scale = np.linalg.norm(a, axis=1)
    return np.asarray(np.linalg.norm(b - a, axis=1) / np.where(scale > 0, scale, 1.0), dtype=np.float64)


def log_softmax(logits: Array) -> Floats:
    """Logarithm of the softmax over the last axis, in float64; ``-inf`` (a masked entry) stays ``-inf``."""
    values = np.asarray(logits, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):  # a row that is masked altogether becomes NaN
        shifted = values - values.max(axis=-1, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)), dtype=np.float64)


def kl_rows(reference: Array, other: Array) -> Floats:
    """``KL(softmax(reference) || softmax(other))`` of each row, in nats."""
    log_p, log_q = log_softmax(reference), log_softmax(other)
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):
        terms = np.where(p > 0, p * (log_p - log_q), 0.0)  # 0 log 0 = 0, also where both are masked
    return np.asarray(np.maximum(terms.sum(axis=-1), 0.0), dtype=np.float64)  # rounding can leave -1e-17


def _unit(rows: Floats) -> Floats:
    """Scale rows to length one; by the largest entry first, so that squares neither vanish nor overflow."""
    largest = np.abs(rows).max(axis=1, keepdims=True, initial=0.0)
    scaled = rows / np.where(largest > 0, largest, 1.0)
    norm = np.linalg.norm(scaled, axis=1, keepdims=True)
    return np.asarray(scaled / np.where(norm > 0, norm, 1.0), dtype=np.float64)


def _flat(values: Array) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    return array.reshape(len(array), -1) if array.ndim else array.reshape(1, 1)


def take_tokens(values: Array, index: NDArray[np.integer]) -> Array:
    """Gather rows of the token axis (1) of ``[B, N, ...]`` by ``[B, K]``."""
    if values.ndim < 2 or index.ndim != 2 or len(index) != len(values):
        return values
    return np.take_along_axis(values, index.reshape(index.shape + (1,) * (values.ndim - 2)), axis=1)


def finite_pair(a: Array, b: Array) -> tuple[Floats, Floats, bool]:
    """Return a sample of both as float64, what is not finite in the baseline set to zero, and whether it counts.

    What is already NaN or infinite in the baseline (masked logits are ``-inf``) is no fault of the reduction.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    finite = np.isfinite(first)
    if finite.all() and np.isfinite(second).all():
        return first, second, True
    usable = bool(np.isfinite(second[finite]).all())
    return np.where(finite, first, 0.0), np.where(finite, second, 0.0), usable


def as_logits(rows: Array) -> Floats:
    """Return logits; rows that already are probabilities become their logarithms."""
    values = np.asarray(rows, dtype=np.float64)
    if (values >= 0).all() and np.allclose(values.sum(axis=-1), 1.0, atol=1e-3):
        # A probability that underflowed is small, not impossible: log(0) would make the divergence infinite.
        return np.asarray(np.log(np.maximum(values, 1e-38)), dtype=np.float64)
    return values
