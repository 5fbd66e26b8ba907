"""Attention of the last queries of a prompt, in chosen heads."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from tokcc.errors import PlanError
from tokcc.passes.cache.cut import CacheCut
from tokcc.passes.cache.profile import given_or_read
from tokcc.passes.cache.scores.window_attention import WindowAttention

__all__ = ["WindowHeads"]


class WindowHeads(WindowAttention):
    """What the last ``window`` queries of some query heads attend to: one set per layer (CompressKV, arXiv:2508.02401).

    The chosen heads' columns are summed over the window, smoothed and averaged; other heads say nothing.

    Attributes:
        profile: A file with an entry ``heads``.
        raters: Query heads from 0, by layer: a mapping, or a list with an entry for each layer of the model.
    """

    kind: ClassVar[str] = "window_heads"

    group: Literal["mean"] = "mean"
    when: Literal["after_pool"] = "after_pool"
    profile: str | None = None
    raters: dict[int, tuple[int, ...]] = Field(default_factory=dict, validate_default=True)

    @field_validator("raters", mode="before")
    @classmethod
    def _listed(cls, value: Any, info: ValidationInfo) -> Any:
        missing = "none are given: list the query heads of each layer, or name a `profile` with their `heads`"
        value = given_or_read(value, info.data.get("profile"), "heads", missing)
        return dict(enumerate(value)) if isinstance(value, list | tuple) else value

    @field_validator("raters")
    @classmethod
    def _some(cls, value: dict[int, tuple[int, ...]]) -> dict[int, tuple[int, ...]]:
        for layer, heads in value.items():
            if not heads or len(set(heads)) < len(heads) or min(heads) < 0:
                raise ValueError(f"layer {layer} needs one or more different heads, counted from 0")
        return value

    def emit(self, cut: CacheCut) -> Any:
        """See :class:`WindowHeads`."""
        b = cut.b
        chosen = self.raters.get(cut.layer, ())
        if not chosen or max(chosen) >= cut.heads:
            raise PlanError(
                f"the heads that rate layer {cut.layer} do not fit the model",
                needed=f"query heads between 0 and {cut.heads - 1} for each layer from which something is evicted",
                found=", ".join(map(str, chosen)) or f"heads of the layers {', '.join(map(str, sorted(self.raters)))}",
                help="measure the model that is compiled, or give `raters` for each of its layers",
            )
        rows = b.min_sizes(self.window, cut.new)
        sums = b.where(cut.newest(self.window), 0.0, b.sum(cut.probs(rows), 3))  # [B, Hkv, G, L]
        flat = b.reshape(sums, [-1, cut.heads, cut.total])
        own = b.cat([b.slice(flat, 1, head, head + 1) for head in chosen], 1)  # [B, chosen, L]
        return b.mean(self._pooled(b, own), 1, keepdim=True)
