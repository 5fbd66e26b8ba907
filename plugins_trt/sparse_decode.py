"""``sparse_decode``: attention of one query to listed tokens or pages of the cache.

One kernel whose programs walk a whole list each. The kernel of :mod:`tokcc.kernels.sparse_decode` splits lists and
joins the parts in a second one; a plugin is one kernel and has no memory to leave parts in. The device is filled by
samples times groups of heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokcc.kernels.configs import Config, dtype_of, kind, row
from tokcc.kernels.decompositions import overload
from tokcc.kernels.gpu import BASE_ARCH, pow2
from tokcc.plugins_trt.attention import check_widths, head_constants, wide
from tokcc.plugins_trt.description import Plugin
from tokcc.plugins_trt.parts import Attribute, Call, Input, Output

__all__ = ["PLUGIN"]

_MOST_SHARING = 64


def _constants(dtype: str, attributes: Mapping[str, Any]) -> dict[str, Any]:
    rows = attributes["sharing"]
    return {
        **head_constants(dtype, attributes),
        "PAGE": attributes["page"],
        "ROWS": rows,
        "RP": max(16, pow2(rows)),
    }


def _tactics(dtype: str, attributes: Mapping[str, Any]) -> tuple[Config, ...]:
    return row("sparse_decode", "part", BASE_ARCH, f"{kind(dtype_of(dtype))} {wide(attributes)}")


def _arguments(
    query: Any,
    key: Any,
    value: Any,
    index: Any,
    count: Any,
    page: int,
    scale: float,
    valid: Any = None,
    softcap: float = 0.0,
) -> Call:
    return Call(
        {"query": query, "key": key, "value": value, "index": index, "count": count, "valid": valid},
        {"page": page, "scale": scale, "softcap": softcap},
    )


def _compute(inputs: Mapping[str, Any], attributes: Mapping[str, Any]) -> Any:
    given = (inputs[name] for name in ("query", "key", "value", "index", "count"))
    page, scale, cap = (attributes[name] for name in ("page", "scale", "softcap"))
    return overload("sparse_decode")(*given, page, scale, inputs["valid"], cap)


def _derive(sizes: Mapping[str, Any]) -> dict[str, int]:
    heads, kv_heads, lists = (sizes.get(letter) for letter in ("H", "Hkv", "Hs"))
    # Left out where a size is dynamic, which is refused as a missing attribute.
    return {"sharing": heads // max(lists, kv_heads)} if heads and kv_heads and lists else {}


def _check(attributes: Mapping[str, Any]) -> None:
    check_widths(attributes)
    if not 1 <= attributes["sharing"] <= _MOST_SHARING:
        raise ValueError(f"1 to {_MOST_SHARING} query heads of a list and key head", str(attributes["sharing"]))
    if attributes["page"] < 1:
        raise ValueError("pages of at least 1 token", str(attributes["page"]))


PLUGIN = Plugin(
    op="sparse_decode",
    doc="Attend from the newest token to listed pages of the cache; a list of nothing gives zeros.",
    replaces="tokcc::sparse_decode",
    kernel=("tokcc.kernels.sparse_decode.triton", "sparse_decode_plugin"),
    inputs=(
        Input("query", "float", ("B", "H", "1", "D"), "the query"),
        Input("key", "float", ("B", "Hkv", "L", "D"), "the keys"),
        Input("value", "float", ("B", "Hkv", "L", "DV"), "the values"),
        Input("index", "int32", ("B", "Hs", "K"), "pages, unique up to the count"),
        Input("count", "int32", ("B", "Hs"), "how many of them are meant"),
        Input("valid", "bool", ("B", "L"), "tokens that are not padding", flag="has_valid"),
    ),
    attributes=(
        Attribute("page", int, "tokens in a page"),
        Attribute("scale", float, "factor of the logits"),
        Attribute("softcap", float, "softcap * tanh(logits / softcap); 0: none"),
        Attribute("has_valid", int, "1: `valid` is given"),
        Attribute("width", int, "numbers of a key's head", axis="D"),
        Attribute("value_width", int, "numbers of a value's head", axis="DV"),
        Attribute("sharing", int, "query heads that share a list and a key head: H // max(Hs, Hkv)"),
    ),
    scalars={"keys": "L", "heads": "H", "kv_heads": "Hkv", "lists": "Hs", "slots": "K"},
    outputs=(Output("attended", ("B", "H", "1", "DV"), "the attended values"),),
    grid=("B * (H // sharing)", "1", "1"),
    constants=_constants,
    tactics=_tactics,
    arguments=_arguments,
    compute=_compute,
    derive=_derive,
    check=_check,
)
