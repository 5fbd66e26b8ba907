"""The compiler, from a model to a bundle. Each step takes the program and returns it, and is verified."""

from tokcc.pipeline.bundles import Measured, bench, calibrate, rebuild_report, verify
from tokcc.pipeline.compiling import DryRun, compile, reduce
from tokcc.pipeline.gallery import gallery
from tokcc.pipeline.inspection import Inspection, inspect
from tokcc.pipeline.profiling import HeadProfile, profile

__all__ = [
    "DryRun",
    "HeadProfile",
    "Inspection",
    "Measured",
    "bench",
    "calibrate",
    "compile",
    "gallery",
    "inspect",
    "profile",
    "rebuild_report",
    "reduce",
    "verify",
]
