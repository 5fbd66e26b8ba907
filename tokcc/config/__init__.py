"""The policy file: pydantic models, YAML with line numbers, presets and loading."""

from tokcc.config.layers import At
from tokcc.config.loading import LoadedPolicy, load_policy
from tokcc.config.policy import (
    Blocks,
    Budget,
    KvBudget,
    KvOptions,
    OutputContract,
    PieceSpec,
    Policy,
    Protect,
    Ramp,
    Rows,
    Step,
    find_conflict,
)
from tokcc.config.preset import ParamSpec, Preset
from tokcc.config.preset_file import load_preset

__all__ = [
    "At",
    "Blocks",
    "Budget",
    "KvBudget",
    "KvOptions",
    "LoadedPolicy",
    "OutputContract",
    "ParamSpec",
    "PieceSpec",
    "Policy",
    "Preset",
    "Protect",
    "Ramp",
    "Rows",
    "Step",
    "find_conflict",
    "load_policy",
    "load_preset",
]
