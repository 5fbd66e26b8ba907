"""``block_sparse_attention``: attention of a prompt, every block of queries to the blocks of keys that it lists."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokcc.kernels.configs import Config, dtype_of, kind
from tokcc.kernels.decompositions import overload
from tokcc.plugins_trt.attention import check_widths, head_constants, refuse_bias, wide
from tokcc.plugins_trt.description import Plugin
from tokcc.plugins_trt.parts import Attribute, Call, Input, Output

__all__ = ["PLUGIN"]

# BQ, BK, warps, stages, in order of preference: within 48 KiB and without spills on sm_80. The last fits any block.
_TILES: Mapping[tuple[str, int], tuple[tuple[int, int, int, int], ...]] = {
    ("half", 64): ((128, 64, 8, 3), (64, 64, 4, 2), (32, 32, 4, 2), (16, 16, 4, 1)),
    ("half", 128): ((128, 32, 8, 2), (64, 32, 4, 2), (32, 32, 4, 2), (16, 16, 4, 1)),
    ("half", 256): ((32, 32, 4, 1), (16, 16, 4, 1)),
    ("fp32", 64): ((32, 32, 4, 2), (16, 16, 4, 1)),
    ("fp32", 128): ((16, 16, 4, 1),),
    ("fp32", 256): ((16, 16, 8, 1),),
}
_MOST_TACTICS = 2


def _constants(dtype: str, attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **head_constants(dtype, attributes),
        "BLOCK_Q": attributes["block_q"],
        "BLOCK_K": attributes["block_k"],
        "CAUSAL": bool(attributes["causal"]),
    }


def _tactics(dtype: str, attributes: Mapping[str, Any]) -> tuple[Config, ...]:
    tiles = _TILES[kind(dtype_of(dtype)), wide(attributes)]
    filled = [t for t in tiles if attributes["block_q"] % t[0] == 0 and attributes["block_k"] % t[1] == 0]
    return tuple(
        Config({"BQ": bq, "BK": bk}, warps, stages) for bq, bk, warps, stages in (filled or tiles[-1:])[:_MOST_TACTICS]
    )


def _arguments(
    query: Any,
    key: Any,
    value: Any,
    index: Any,
    count: Any,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
    valid: Any = None,
    softcap: float = 0.0,
    bias: Any = None,
) -> Call:
    refuse_bias("block_sparse_attention", bias)
    return Call(
        {"query": query, "key": key, "value": value, "index": index, "count": count, "valid": valid},
        {"block_q": block_q, "block_k": block_k, "causal": int(causal), "scale": scale, "softcap": softcap},
    )


def _compute(inputs: Mapping[str, Any], attributes: Mapping[str, Any]) -> Any:
    given = (inputs[name] for name in ("query", "key", "value", "index", "count"))
    block_q, block_k, causal, scale, cap = (
        attributes[name] for name in ("block_q", "block_k", "causal", "scale", "softcap")
    )
    operation = overload("block_sparse_attention")
    return operation(*given, block_q, block_k, bool(causal), scale, inputs["valid"], cap)


def _check(attributes: Mapping[str, Any]) -> None:
    check_widths(attributes)
    if min(attributes["block_q"], attributes["block_k"]) < 1:
        raise ValueError("blocks of at least 1", f"{attributes['block_q']} x {attributes['block_k']}")


PLUGIN = Plugin(
    op="block_sparse_attention",
    doc="Attend to listed blocks of keys; the softmax is over what is listed and visible.",
    replaces="tokcc::block_sparse_attention",
    kernel=("tokcc.kernels.block_sparse_attention.triton", "block_sparse_attention_plugin"),
    inputs=(
        Input("query", "float", ("B", "H", "S", "D"), "the queries: the last S of the L keys"),
        Input("key", "float", ("B", "Hkv", "L", "D"), "the keys"),
        Input("value", "float", ("B", "Hkv", "L", "DV"), "the values"),
        Input("index", "int32", ("B", "Hs", "MQ", "K"), "blocks of keys that each block of queries lists"),
        Input("count", "int32", ("B", "Hs", "MQ"), "how many of them are meant"),
        Input("valid", "bool", ("B", "T"), "keys that may be seen; there are T of them", flag="has_valid"),
    ),
    attributes=(
        Attribute("block_q", int, "queries in a block"),
        Attribute("block_k", int, "keys in a block"),
        Attribute("causal", int, "1: queries see only keys up to their own"),
        Attribute("scale", float, "factor of the logits"),
        Attribute("softcap", float, "softcap * tanh(logits / softcap); 0: none"),
        Attribute("has_valid", int, "1: `valid` is given"),
        Attribute("width", int, "numbers of a key's head", axis="D"),
        Attribute("value_width", int, "numbers of a value's head", axis="DV"),
    ),
    scalars={
        "rows": "S",
        "stored": "L",
        "keys": "T if has_valid else L",
        "heads": "H",
        "groups": "H // Hkv",
        "lists": "Hs",
        "row_blocks": "MQ",
        "slots": "K",
    },
    outputs=(Output("attended", ("B", "H", "S", "DV"), "the attended values"),),
    grid=("MQ * cdiv(block_q, BQ) * B * H", "1", "1"),
    constants=_constants,
    tactics=_tactics,
    arguments=_arguments,
    compute=_compute,
    check=_check,
)
