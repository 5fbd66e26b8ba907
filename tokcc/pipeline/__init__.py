"""The compiler, from a model to a bundle. Each step takes the program and returns it, and is verified."""

from tokcc.pipeline.bundles import Measured, bench, calibrate, rebuild_report, verify
from tokcc.pipeline.compiling import DryRun, compile, reduce
from tokcc.pipeline.inspection import Inspection, inspect

__all__ = [
    "DryRun",
    "Inspection",
    "Measured",
    "bench",
    "calibrate",
    "compile",
    "inspect",
    "rebuild_report",
    "reduce",
    "verify",
]
