"""``merge_tokens``: keep some tokens and average others into them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokcc.kernels.configs import Config, dtype_of, kind, row
from tokcc.kernels.decompositions import overload
from tokcc.kernels.gpu import BASE_ARCH
from tokcc.plugins_trt.description import Plugin
from tokcc.plugins_trt.parts import Attribute, Call, Input, Output

__all__ = ["PLUGIN"]

_NARROW = Config({"BT": 16, "BR": 16, "BC": 32}, 4, 1)


def _constants(dtype: str, attributes: Mapping[str, Any]) -> dict[str, Any]:
    del dtype
    return {
        "CHANNELS": attributes["channels"],
        "FIRST": attributes["first"],
        "WEIGHTED": bool(attributes["weighted"]),
    }


def _tactics(dtype: str, attributes: Mapping[str, Any]) -> tuple[Config, ...]:
    del attributes
    # The narrower tile also does without spills where rows are not aligned.
    return (*row("merge_tokens", "merge", BASE_ARCH, kind(dtype_of(dtype))), _NARROW)


def _arguments(x: Any, weight: Any, keep: Any, source: Any, slot: Any, first: int, padded: bool) -> Call:
    del padded  # the kernel tells a slot of padding from its weights
    return Call({"x": x, "weight": weight, "keep": keep, "source": source, "slot": slot}, {"first": first})


def _compute(inputs: Mapping[str, Any], attributes: Mapping[str, Any]) -> Any:
    given = (inputs[name] for name in ("x", "weight", "keep", "source", "slot"))
    return overload("merge_tokens")(*given, attributes["first"], True)


def _check(attributes: Mapping[str, Any]) -> None:
    if attributes["channels"] < 1 or attributes["first"] < 0:
        raise ValueError("channels >= 1 and first >= 0", f"{attributes['channels']} and {attributes['first']}")


PLUGIN = Plugin(
    op="merge_tokens",
    doc="Merge source tokens into kept ones, weighted by how many tokens each stands for.",
    replaces="tokcc::merge_tokens",
    kernel=("tokcc.kernels.merge_tokens.triton", "merge_tokens_plugin"),
    inputs=(
        Input("x", "float", ("B", "N", "C"), "the tokens"),
        Input("weight", "float", ("B", "N"), "how many tokens each stands for", flag="weighted"),
        Input("keep", "int64", ("B", "K"), "the kept tokens, in output order"),
        Input("source", "int64", ("B", "R"), "the tokens that are merged away"),
        Input("slot", "int64", ("B", "R"), "the kept token that each source joins, counted from `first`"),
    ),
    attributes=(
        Attribute("channels", int, "numbers of a token", axis="C"),
        Attribute("first", int, "kept tokens before these, which nothing joins"),
        Attribute("weighted", int, "1: `weight` is given; 0: all weigh 1"),
    ),
    scalars={"tokens": "N", "kept": "K", "gone": "R"},
    outputs=(
        Output("merged", ("B", "K", "C"), "the tokens that are left"),
        Output("total", ("B", "K"), "how many tokens each stands for now"),
    ),
    grid=("B * cdiv(K, BT)", "cdiv(C, BC)", "1"),
    constants=_constants,
    tactics=_tactics,
    arguments=_arguments,
    compute=_compute,
    check=_check,
)
