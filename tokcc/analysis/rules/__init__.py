"""Axis rules: how the token axis travels through each operation, one file per family.

A rule takes the context and the old node's arguments (tensors as :class:`~tokcc.ir.value.Value`) and returns the new
value, or a tuple of values for an operation with several outputs. It first aligns its operands, then emits the
operation with rebuilt sizes, then states the axes of the result. What a reduced axis does not allow is an
:class:`~tokcc.errors.AxisError`: a rule never guesses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tokcc.analysis.rules import attention, indexing, matmul, norm, pointwise, reduction, sampling, sequence, views

__all__ = ["Rule", "rule_for", "rules"]

Rule = Callable[..., Any]

_TABLES: tuple[dict[Any, Rule], ...] = (
    views.RULES,
    indexing.RULES,
    matmul.RULES,
    attention.RULES,
    norm.RULES,
    reduction.RULES,
    pointwise.RULES,
    sequence.RULES,
    sampling.RULES,
)


def rules() -> dict[Any, Rule]:
    """Return every explicit rule by operation."""
    return {target: rule for table in _TABLES for target, rule in table.items()}


_ALL = rules()


def rule_for(target: Any) -> Rule | None:
    """Return the rule of an operation: an explicit one, or the pointwise rule where torch tags the operation so."""
    rule = _ALL.get(target)
    if rule is None and torch.Tag.pointwise in getattr(target, "tags", ()):
        return pointwise.pointwise
    return rule
