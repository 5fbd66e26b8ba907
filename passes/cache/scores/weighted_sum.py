"""A sum of other scores."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from tokcc.config import PieceSpec
from tokcc.errors import PolicyError
from tokcc.passes.cache.cut import PROTECTED, CacheCut
from tokcc.passes.cache.piece import CacheScore
from tokcc.passes.piece import resolve_piece

__all__ = ["Term", "WeightedSum"]

_TINY = 1e-20


class Term(BaseModel):
    """One score in a sum.

    Attributes:
        score: Kind and parameters, as anywhere in a policy.
        weight: Its part in the sum.
        invert: What the score rates low is important: the term is subtracted.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    score: PieceSpec
    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    invert: bool = False

    @field_validator("score")
    @classmethod
    def _known(cls, value: PieceSpec) -> PieceSpec:
        try:
            resolve_piece(value, CacheScore, "cache.scores", "")
        except PolicyError as error:
            raise ValueError(error.what) from error
        return value

    @property
    def piece(self) -> CacheScore:
        """The score itself."""
        return resolve_piece(self.score, CacheScore, "cache.scores", "")


class WeightedSum(CacheScore):
    """``sum_t weight_t (s_t - min s_t) / (max s_t - min s_t)``: any scores, each brought to [0, 1] in every head.

    Minimum and maximum run over the entries that are not padding. A score that is the same everywhere adds nothing.

    Attributes:
        terms: The scores.
        heads: Whether key heads are rated one by one, or by the mean of each score over them: one set in all heads.
    """

    kind: ClassVar[str] = "weighted_sum"

    terms: tuple[Term, ...] = Field(min_length=1)
    heads: Literal["each", "mean"] = "each"

    # The base class has constants here; those of a sum depend on its terms.

    @property
    def states(self) -> tuple[str, ...]:  # type: ignore[override]
        """What the terms carry."""
        return tuple(_own_name(i, name) for i, term in enumerate(self.terms) for name in term.piece.states)

    @property
    def once(self) -> bool:  # type: ignore[override]
        """A term that rates prompts only makes the whole sum such a score."""
        return any(term.piece.once for term in self.terms)

    @property
    def keeps_sinks(self) -> bool:  # type: ignore[override]
        """Only where every term does."""
        return all(term.piece.keeps_sinks for term in self.terms)

    @property
    def by_key_norm(self) -> bool:  # type: ignore[override]
        """A doubt about one term is worth a warning."""
        return any(term.piece.by_key_norm for term in self.terms)

    @property
    def looks_ahead(self) -> bool:  # type: ignore[override]
        """Where one term does."""
        return any(term.piece.looks_ahead for term in self.terms)

    def held(self) -> int:
        """See :meth:`CacheScore.held`."""
        return max(term.piece.held() for term in self.terms)

    def emit(self, cut: CacheCut) -> Any:
        """See :class:`WeightedSum`."""
        b = cut.b
        total = None
        for i, term in enumerate(self.terms):
            piece = term.piece
            own = replace(cut, states={name: cut.states[_own_name(i, name)] for name in piece.states}, left={})
            score = piece.emit(own)
            cut.left.update({_own_name(i, name): value for name, value in own.left.items()})
            score = self._normalised(cut, score)
            part = b.mul(score, -term.weight if term.invert else term.weight)
            total = part if total is None else b.add(total, part)
        return total

    def _normalised(self, cut: CacheCut, score: Any) -> Any:
        """Bring ``[B, heads, L]`` to [0, 1] over its real entries."""
        b = cut.b
        if self.heads == "mean":
            score = b.mean(score, 1, keepdim=True)
        real = b.unsqueeze(cut.real, 1)
        low = b.amin(b.where(real, score, PROTECTED), 2, keepdim=True)
        high = b.amax(b.where(real, score, -PROTECTED), 2, keepdim=True)
        return b.div(b.sub(score, low), b.clamp_min(b.sub(high, low), _TINY))


def _own_name(number: int, state: str) -> str:
    """Name a term's state: two terms may use one name, and runtimes carry what begins with `key`."""
    return f"key_term{number}_{state}"
