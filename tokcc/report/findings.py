"""What a user should act on, found in the numbers themselves."""

from __future__ import annotations

from tokcc.report.schema import Report
from tokcc.report.summary import percent, times

__all__ = ["findings"]

_POOR_USE = 0.6
"""Below this share of the ideal speedup something other than arithmetic decides."""

_NOISY = 0.25
"""Spread of the ratio, relative to its median, above which the median should not be trusted."""

_COSTLY_NODES = 0.2
"""Share of a run in inserted nodes that deserves a remark."""


def findings(report: Report) -> tuple[str, ...]:
    """Return warnings that follow from the report's own numbers, the gravest first."""
    return (*_fidelity(report), *_speed(report), *_shapes(report), *_caches(report))


def _fidelity(report: Report) -> list[str]:
    if report.fidelity is None:
        return []
    found = [
        f"output {output.output}: the engine gives NaN or infinity for {output.nonfinite_samples} samples "
        "where the baseline does not"
        for output in report.fidelity.outputs
        if output.nonfinite_samples
    ]
    if report.fidelity.weights == "random":
        found.append("the weights are random: fidelity was computed, but says nothing about a trained model")
    return found


def _speed(report: Report) -> list[str]:
    latency, totals = report.latency, report.totals
    if latency is None:
        return []
    speedup = latency.speedup
    found = []
    if speedup.median < 1:
        found.append(f"the engine is slower than the baseline at the measured shapes ({times(speedup.median)})")
    elif speedup.p10 < 1:
        found.append(f"the gain is within the noise: a tenth of the rounds saw {times(speedup.p10)} or less")
    elif (speedup.p90 - speedup.p10) / speedup.median > _NOISY:
        spread = f"{times(speedup.p10)} to {times(speedup.p90)}"
        found.append(f"the speedup is noisy ({spread}): measure again on a quiet machine (`tokcc bench`)")
    if totals.realised_over_ideal is not None and totals.realised_over_ideal < _POOR_USE:
        share = percent(totals.realised_over_ideal, digits=0)
        found.append(f"only {share} of the ideal speedup is realised: small inputs, overhead or memory bound it")
    if totals.inserted_share is not None and totals.inserted_share > _COSTLY_NODES:
        found.append(f"inserted nodes take {percent(totals.inserted_share, digits=0)} of a run: reduce in fewer layers")
    return found


def _shapes(report: Report) -> list[str]:
    """Say where the policy loses, and from which shape it pays."""
    points = report.break_even
    losing = [point for point in points if not point.pays]
    if not losing:
        return []
    names = ", ".join(f"{point.label or 'unnamed shape'} ({times(point.ratio.median)})" for point in losing)
    paying = next((point.label for point in points if point.pays and point.label), None)
    if paying is None:
        return [f"the policy does not pay at any measured shape: {names}"]
    return [f"the policy loses at {names}; it pays from {paying}"]


def _caches(report: Report) -> list[str]:
    """Say where a policy for caches has not yet done anything."""
    points = report.decoding.points if report.decoding else ()
    if not points or not any(row.site == "cache" for row in report.layers):
        return []
    if points[-1].cache_bytes_after >= points[-1].cache_bytes_before:
        return [f"the caches are not smaller after {points[-1].context} tokens: the policy pays for longer texts only"]
    return []
