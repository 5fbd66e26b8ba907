"""``kv_update``: new entries written into the fixed slots of a cache, in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokcc.errors import LoweringError
from tokcc.kernels.configs import Config, dtype_of, kind, row
from tokcc.kernels.gpu import BASE_ARCH, pow2
from tokcc.kernels.kv_update.reference import reference
from tokcc.plugins_trt.description import Plugin
from tokcc.plugins_trt.parts import Attribute, Call, Input, Output

__all__ = ["PLUGIN"]

_WIDEST = 1024
_SLOTS = 2


def _constants(dtype: str, attributes: Mapping[str, Any]) -> dict[str, Any]:
    del dtype
    return {"D": attributes["width"], "DP": pow2(attributes["width"])}


def _tactics(dtype: str, attributes: Mapping[str, Any]) -> tuple[Config, ...]:
    del attributes
    return row("kv_update", "kv_update_plugin", BASE_ARCH, kind(dtype_of(dtype)))


def _arguments(cache: Any, dim: int, place: Any, new: Any) -> Call:
    """Take the arguments of ``aten.index_copy``."""
    if dim not in (_SLOTS, _SLOTS - 4):
        raise LoweringError(
            "the TensorRT plugin `kv_update` writes slots only",
            needed=f"a cache [B, H, N, D], written along axis {_SLOTS}",
            found=f"axis {dim}",
            help="use the graph without plugins",
        )
    return Call({"cache": cache, "new": new, "place": place}, {})


def _compute(inputs: Mapping[str, Any], attributes: Mapping[str, Any]) -> Any:
    del attributes
    return reference(inputs["cache"], inputs["new"], inputs["place"])


def _check(attributes: Mapping[str, Any]) -> None:
    if not 1 <= attributes["width"] <= _WIDEST:
        raise ValueError(f"heads of at most {_WIDEST} numbers", str(attributes["width"]))


PLUGIN = Plugin(
    op="kv_update",
    doc="Write new entries into the slots of a cache, in place; the other slots are not touched.",
    replaces="aten::index_copy",
    kernel=("tokcc.kernels.kv_update.triton", "kv_update_plugin"),
    inputs=(
        Input("cache", "float", ("B", "H", "N", "D"), "the slots, written over"),
        Input("new", "float", ("B", "H", "S", "D"), "the new entries"),
        Input("place", "int64", ("S",), "the slot of each, no two the same; one that is not there is left out"),
    ),
    attributes=(Attribute("width", int, "numbers of an entry", axis="D"),),
    scalars={"rows": "B * H * S", "count": "S", "slots": "N"},
    outputs=(Output("updated", ("B", "H", "N", "D"), "the cache", alias="cache"),),
    grid=("cdiv(B * H * S, BT)", "1", "1"),
    constants=_constants,
    tactics=_tactics,
    arguments=_arguments,
    compute=_compute,
    check=_check,
)
