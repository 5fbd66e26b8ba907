"""Capacities that follow measured weights of the layers."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, ValidationInfo, field_validator

from tokcc.errors import PlanError
from tokcc.passes.budget import Count
from tokcc.passes.cache.cut import CacheCut
from tokcc.passes.cache.profile import given_or_read
from tokcc.passes.cache.selectors.best import Best

__all__ = ["LayerWeights"]


class LayerWeights(Best):
    """Keep the best entries, more in layers that need them (CompressKV, arXiv:2508.02401).

    With n layers, a capacity C and weights that sum to 1, layer l gets ``least + round(weight_l n (C - least))``,
    halves to even, within ``least`` and ``most C``. What is then missing from the sum ``n C`` is added one by one, the
    most important layer first; what is too much is taken away, the least important first. Equals go by layer.

    Attributes:
        profile: A file with an entry ``errors``.
        errors: What each layer of the model loses without its cache; brought to the sum 1 of their amounts.
        least: Entries of every layer.
        most: Bound of a layer as a multiple of C.
    """

    kind: ClassVar[str] = "layer_weights"
    by_layer: ClassVar[bool] = True

    profile: str | None = None
    errors: tuple[float, ...] = Field(default=(), validate_default=True)
    least: int = Field(default=32, ge=1)
    most: float = Field(default=3.0, ge=1)

    @field_validator("errors", mode="before")
    @classmethod
    def _given(cls, value: Any, info: ValidationInfo) -> Any:
        missing = "none are given: list one for each layer of the model, or name a `profile` with its `errors`"
        return given_or_read(value, info.data.get("profile"), "errors", missing)

    @field_validator("errors")
    @classmethod
    def _finite(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        total = sum(abs(error) for error in value)
        if not 0 < total < float("inf"):
            raise ValueError("errors are finite numbers, and not all of them zero")
        return value

    def capacity(self, cut: CacheCut, planned: Count) -> Any:
        """See :class:`LayerWeights`."""
        if planned.kind != "tokens":
            raise PlanError(
                "weights of layers share out a fixed capacity",
                needed="`budget: {tokens: ...}`",
                help="give a number of entries instead of a share",
            )
        if len(self.errors) != cut.num_layers:
            raise PlanError(
                "the weights of the layers do not fit the model",
                needed=f"one error for each of its {cut.num_layers} layers",
                found=f"{len(self.errors)} errors",
                help="measure the model that is compiled, and give one number for each of its layers",
            )
        if self.least > planned.amount or self.least < cut.recent + cut.sinks:
            raise PlanError(
                f"layers with {self.least} entries do not fit the budget",
                needed=f"`select: {{least: ...}}` between the {cut.sinks + cut.recent} protected entries and the "
                f"capacity of {planned.amount}",
                found=str(self.least),
                help="choose `least` between the two, or a larger budget",
            )
        return self.shares(int(planned.amount))[cut.layer]

    def shares(self, mean: int) -> list[int]:
        """Return the capacities of all layers; their sum is ``mean`` times the layers."""
        layers = len(self.errors)
        whole = sum(abs(error) for error in self.errors)
        weights = [abs(error) / whole for error in self.errors]
        most = int(self.most * mean)
        spare = layers * (mean - self.least)
        kept = [min(max(self.least + round(weight * spare), self.least), most) for weight in weights]
        missing = layers * mean - sum(kept)
        step = 1 if missing > 0 else -1
        order = sorted(range(layers), key=lambda layer: -step * weights[layer])
        while missing:
            for layer in order:
                if missing and self.least <= kept[layer] + step <= most:
                    kept[layer] += step
                    missing -= step
        return kept
