"""The part of a report that only decoders have: speed and bytes by context, text, needles, what a cache keeps."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from tokcc.report.parts import Count, Fraction, Part, Positive, Seconds, Spread

__all__ = ["ContextPoint", "Decoding", "LayerOccupancy", "NeedlePoint", "Occupancy", "PromptPoint", "TextPoint"]

Perplexity = Annotated[float, Field(ge=1)]


class ContextPoint(Part):
    """Generating one token after so many, with caches that come from reading them."""

    context: Count = Field(description="Tokens in front of the one that is timed.")
    seconds_before: Seconds = Field(description="Median seconds of a step, baseline engine.")
    seconds_after: Seconds = Field(description="The same, engine.")
    tokens_per_second_before: Positive = Field(description="Of all rows of the batch together, baseline engine.")
    tokens_per_second_after: Positive = Field(description="The same, engine.")
    speedup: Spread = Field(description="Baseline time / engine time of a step, engines in turns.")
    runs: Count = Field(description="Timed steps of each.")
    first_token_before: Seconds = Field(description="Seconds to read the context: the sum of its pieces, baseline.")
    first_token_after: Seconds = Field(description="The same, engine.")
    cache_bytes_before: Count = Field(description="Bytes of everything that the baseline carries to the step.")
    cache_bytes_after: Count = Field(description="The same, engine.")
    bound: Positive = Field(
        description="(weights + cache) bytes before / after: the speedup of a step that only waits for memory."
    )

    @property
    def cache_ratio(self) -> float:
        """Bytes of the cache after / before."""
        return self.cache_bytes_after / self.cache_bytes_before if self.cache_bytes_before else 1.0


class PromptPoint(Part):
    """Reading a prompt in one call."""

    tokens: Count = Field(description="Tokens of the prompt.")
    seconds_before: Seconds = Field(description="Median seconds of the call, baseline engine.")
    seconds_after: Seconds = Field(description="The same, engine.")
    speedup: Spread = Field(description="Baseline time / engine time, engines in turns.")
    runs: Count = Field(description="Timed calls of each.")


class TextPoint(Part):
    """Both engines on the first tokens of a text."""

    context: Count = Field(description="Tokens read.")
    predicted: Count = Field(description="Tokens predicted: all but the first.")
    perplexity_before: Perplexity | None = Field(default=None, description="Of the baseline engine; None = overflow.")
    perplexity_after: Perplexity | None = Field(default=None, description="The same, engine.")
    top1_agreement: Fraction | None = Field(default=None, description="Share of tokens with the same first guess.")
    kl: float | None = Field(default=None, description="Mean KL(baseline || engine) in nats.")


class NeedlePoint(Part):
    """A span of random tokens in the context, and again at its end: how much of the copy is predicted."""

    context: Count = Field(description="Tokens in front of the copy.")
    depth: Fraction = Field(description="Place of the span: 0 = first, 1 = last.")
    position: Count = Field(description="Its first token.")
    predictions: Count = Field(description="Tokens of the copy that are to be predicted, each after the true ones.")
    hits_before: Count = Field(description="How many of them the baseline predicts.")
    hits_after: Count = Field(description="The same, engine.")


class LayerOccupancy(Part):
    """What the cache of one layer keeps of a prompt."""

    layer: Count = Field(description="Block, counted from 0.")
    kept: tuple[Fraction, ...] = Field(description="Cell by cell, the share of entries that are left, over all heads.")


class Occupancy(Part):
    """Which positions of a prompt, read in one call, are left in the caches."""

    context: Count = Field(description="Tokens of the prompt.")
    cell: int = Field(ge=1, description="Positions in a cell; the last cell may have fewer.")
    layers: tuple[LayerOccupancy, ...] = Field(description="The layers that can be followed.")

    @model_validator(mode="after")
    def _aligned(self) -> Self:
        cells = -(-self.context // self.cell)
        for row in self.layers:
            if len(row.kept) != cells:
                raise ValueError(f"layer {row.layer} has {len(row.kept)} cells, {cells} are needed")
        return self


class Decoding(Part):
    """A decoder that generates, engine against the engine with the whole cache."""

    tokens: str = Field(description="What was read: random tokens, or the calibration text.")
    piece: Count = Field(description="Tokens of a call while a context is read; caches are evicted after each.")
    batch: Count = Field(default=1, description="Rows.")
    weight_bytes_before: Count = Field(description="Bytes of weights that a step reads, baseline engine.")
    weight_bytes_after: Count = Field(description="The same, engine.")
    points: tuple[ContextPoint, ...] = Field(default=(), description="By context.")
    break_even: Count | None = Field(
        default=None, description="First measured context from which on the engine is faster; None = from none."
    )
    prompts: tuple[PromptPoint, ...] = Field(
        default=(), description="Prompts in one call, by length; measured where a policy is about prompts."
    )
    prompt_break_even: Count | None = Field(
        default=None, description="First measured length from which on prompts are read faster; None = from none."
    )
    text: tuple[TextPoint, ...] = Field(default=(), description="On the calibration text, by context.")
    needles: tuple[NeedlePoint, ...] = Field(default=(), description="Copied needles, by context and depth.")
    occupancy: Occupancy | None = Field(default=None, description="What is left of a prompt; None = not followed.")
