"""From `store_kv` steps to how caches are held; their refusals happen here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from tokcc.analysis.cache_sites import CacheSite
from tokcc.analysis.rotation import Rotation, find_rotation
from tokcc.config import LoadedPolicy, Step
from tokcc.errors import PlanError, PolicyError
from tokcc.ir.program import Program
from tokcc.passes.cache.beside import TOKENS
from tokcc.passes.cache.plan import PlannedEviction, PlannedStorage
from tokcc.passes.cache.rating import TokenRating
from tokcc.passes.cache.storage import CacheForm, CacheStorage
from tokcc.passes.chosen_layers import chosen_layers
from tokcc.passes.piece import resolve_piece
from tokcc.passes.trained import with_weights

__all__ = ["add_storages", "key_rotations", "refuse_changes"]


def refuse_changes(evictions: Sequence[PlannedEviction], storages: Mapping[int, PlannedStorage]) -> None:
    """Refuse what a storage cannot hold."""
    for eviction in evictions:
        planned = storages.get(eviction.layer)
        if planned is None:
            continue
        if not planned.storage.evicts:
            raise PlanError(
                f"nothing can be evicted from a cache that `{planned.name}` holds",
                policy=eviction.where,
                found=f"both in layer {eviction.layer}",
                help="use one of the two, or give them different layers",
            )
        if eviction.reduce.changes and not planned.storage.as_they_are:
            raise PlanError(
                f"`{eviction.name}` changes entries, and `{planned.name}` rounds each of them once",
                policy=eviction.where,
                found=f"both in layer {eviction.layer}",
                help="use a method that only drops entries",
            )


def add_storages(
    policy: LoadedPolicy,
    number: int,
    step: Step,
    program: Program,
    sites: Sequence[CacheSite],
    forms: Sequence[CacheForm],
    windows: Sequence[int],
    storages: dict[int, PlannedStorage],
) -> Sequence[str]:
    """Add the storages of a step and return warnings.

    Raises:
        PlanError: A cache cannot be held this way.
        PolicyError: A piece or parameter is unknown, or one is missing.
    """
    place = policy.where(("steps", number, "store"))
    if step.store is None:
        raise PolicyError(
            "`node: store_kv` needs a storage",
            policy=policy.where(("steps", number)),
            help="add for instance `store: {kind: codes, bits: 8}`",
        )
    storage: CacheStorage = resolve_piece(step.store, CacheStorage, "cache.storages", place)
    if storage.always() is not None:
        raise PolicyError(
            f"`{step.store.kind}` is a layout of all caches, and nothing for single layers",
            policy=place,
            help=f"write `kv: {{layout: {step.store.kind}}}` beside `steps`",
        )
    rating = _rating(policy, number, step, storage, program)
    layers = chosen_layers(policy, number, step, len(forms))
    sliding = [layer for layer in layers if windows[layer] and not storage.evicts]
    if sliding and len(sliding) == len(layers):
        raise PlanError(
            f"every chosen layer has a sliding window, and nothing can be taken out of what `{step.name}` holds",
            policy=place,
            needed="layers that see the whole sequence, or a storage such as `codes`",
            help="use a method that holds tokens one by one, such as `agent-memory-q4`",
        )
    if storage.placed and (sliding or len(layers) < len(forms)):
        raise PlanError(
            f"`{step.name}` puts texts that were read apart behind each other, in every layer or in none",
            policy=place,
            needed="all layers, without sliding windows",
            found=f"layers {', '.join(str(layer) for layer in layers if layer not in sliding)} of {len(forms)}",
            help="use `at: {layers: all}` and a model without sliding windows",
        )
    for layer in layers:
        if layer in sliding:
            continue
        if layer in storages:
            raise PolicyError(
                f"two steps say how the cache of layer {layer} is held",
                policy=policy.where(("steps", number)),
                found=f"the other is {storages[layer].where}",
                help="give the steps different layers",
            )
        try:
            storage.check(forms[layer])
        except ValueError as error:
            raise PlanError(
                f"`{step.name}` cannot hold the cache of layer {layer}",
                policy=place,
                needed=str(error),
                help="change the parameters of `store`, or choose other layers",
            ) from error
        rotations = key_rotations(program, sites[layer], place) if storage.placed else None
        storages[layer] = PlannedStorage(
            number, layer, step.name, policy.where(("steps", number)), storage, rating, rotations
        )
    warnings = []
    if not storage.as_they_are:
        warnings.append(
            f"`{step.name}` holds caches in tensors of its own: `tokcc run` and callers that feed every output back can"
            " use them; optimum and onnxruntime-genai begin with keys and values as wide as a head"
        )
    if sliding:
        listed = ", ".join(map(str, sliding))
        warnings.append(
            f"layers {listed} have sliding windows, out of which entries fall: `{step.name}` leaves them as they are"
        )
    return warnings


def _rating(
    policy: LoadedPolicy, number: int, step: Step, storage: CacheStorage, program: Program
) -> TokenRating | None:
    """Return what rates the tokens of a call, for storages that hold some better than others."""
    place = policy.where(("steps", number, "score"))
    if not storage.rated:
        if step.score is not None:
            raise PolicyError(
                f"`{storage.kind}` holds all entries alike: nothing rates them",
                policy=place,
                help="leave `score` out, or use `store: {kind: quotas}`",
            )
        return None
    if step.score is None:
        raise PolicyError(
            f"`{storage.kind}` holds tokens by their ratings, and nothing rates them",
            policy=policy.where(("steps", number)),
            help="add for instance `score: {kind: expected_bits, weights: FILE.safetensors}`",
        )
    rating: TokenRating = resolve_piece(step.score, TokenRating, "cache.ratings", place)
    ids = next((node for node in program.user_inputs if program.public_name(node) == TOKENS), None)
    if ids is None and rating.reads_ids:
        raise PlanError(
            f"`{rating.kind}` reads tokens, and this model takes none",
            policy=place,
            needed=f"a model with an input `{TOKENS}` [batch, tokens]",
            found="inputs " + ", ".join(program.public_name(node) for node in program.user_inputs[:4]),
            help="export the decoder with token ids instead of embeddings",
        )
    return with_weights(rating, _sizes(ids), folder=policy.folder, where=place)


def key_rotations(program: Program, site: CacheSite, place: str) -> tuple[Rotation, Rotation]:
    """Return how a layer turns queries and keys, for caches of keys that are not turned.

    Raises:
        PlanError: It does not, or not in a form that can be repeated.
    """
    nodes = {node.name: node for node in program.graph.nodes}
    query, key = (find_rotation(program, nodes[name]) for name in (site.query, site.new_key))
    if query is None or key is None:
        raise PlanError(
            f"the positions of layer {site.layer} cannot be counted anew",
            policy=place,
            node=site.query if query is None else site.new_key,
            needed="queries and keys that are turned by position (rotary embeddings) just before the cache",
            found="keys that depend on the positions in another way, or not at all",
            help="use a method with `positions: keep`",
        )
    return query, key


def _sizes(ids: fx.Node | None) -> dict[str, int]:
    """Return what the shapes of weights depend on: the vocabulary, where the model looks tokens up in a table."""
    for user in () if ids is None else ids.users:
        if user.target is torch.ops.aten.embedding.default:
            table: Any = user.args[0]
            return {"V": int(table.meta["val"].shape[0])}
    return {}
