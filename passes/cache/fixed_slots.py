"""The layout of fixed slots: every cache of a model in buffers of one length, as onnxruntime-genai allocates them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from tokcc.config import LoadedPolicy
from tokcc.errors import PlanError
from tokcc.passes.cache.piece import CacheSelector
from tokcc.passes.cache.plan import PlannedEviction, PlannedStorage
from tokcc.passes.cache.storage import CacheForm, CacheStorage
from tokcc.passes.cache.storages.in_place import InPlace
from tokcc.passes.cache.storages.slots import Slots

__all__ = ["fixed_slots"]


def fixed_slots(
    policy: LoadedPolicy,
    forms: Sequence[CacheForm],
    windows: Sequence[int],
    evictions: Sequence[PlannedEviction],
    storages: Mapping[int, PlannedStorage],
    attention_mask: str | None,
) -> CacheStorage:
    """Return how all caches are held.

    Args:
        policy: The policy.
        forms: What the layers hold, without states.
        windows: Sliding window of each layer, 0 = none.
        evictions: What is evicted.
        storages: How other steps want layers to be held.
        attention_mask: Name of the padding mask input, or None.

    Raises:
        PlanError: The caches cannot have one fixed length.
    """
    place = policy.where(("kv", "layout"))
    if attention_mask is None:
        raise PlanError(
            "fixed slots need a padding mask, which says how many of them are filled",
            policy=place,
            needed="a model with an input `attention_mask` that its attention reads",
            help="use `layout: merged`",
        )
    for planned in storages.values():
        raise PlanError(
            f"`{planned.name}` holds a cache in another way than fixed slots do",
            policy=planned.where,
            found=f"layout `slots` and a storage for layer {planned.layer}",
            help="leave one of the two out",
        )
    widths = {(form.kv_heads, form.key_width, form.value_width) for form in forms}
    if len(widths) > 1:
        raise PlanError(
            "layers cache different numbers of heads or widths: fixed slots have one form for all",
            policy=place,
            found=", ".join(f"{heads} heads of {key} and {value}" for heads, key, value in sorted(widths)),
            help="use `layout: merged`",
        )
    tokens = policy.policy.kv.tokens
    if tokens is not None:
        _refuse_two_numbers(policy, tokens, evictions)
        return InPlace(slots=tokens)
    slots = _slots(place, windows, evictions)
    whole = list(forms)
    for eviction in evictions:
        form = forms[eviction.layer]
        whole[eviction.layer] = replace(form, states=eviction.states, front=eviction.reduce.fronted)
    storage = Slots(slots=slots, rows=max(Slots.rows_of(form, slots) for form in whole))
    for layer, form in enumerate(whole):
        try:
            storage.check(form)
        except ValueError as error:
            raise PlanError(
                f"the cache of layer {layer} does not go into fixed slots",
                policy=place,
                needed=str(error),
                help="use `layout: merged`",
            ) from error
    return storage


def _slots(place: str, windows: Sequence[int], evictions: Sequence[PlannedEviction]) -> int:
    """Return the one number of slots that suits all layers."""
    for eviction in evictions:
        _refuse_growth(eviction)
    bounded = {eviction.layer for eviction in evictions}
    whole = [layer for layer, window in enumerate(windows) if not window and layer not in bounded]
    if whole:
        raise PlanError(
            f"layers {', '.join(map(str, whole))} keep everything: their caches fit into no fixed number of slots",
            policy=place,
            needed="an `evict_kv` step for every layer without a sliding window",
            help="say how many tokens there may be, `kv: {layout: slots, tokens: 8192}`, or add `at: {layers: all}` to "
            "the step, or use `layout: merged`",
        )
    widest = max(windows)
    # A query sees window - 1 earlier tokens.
    capacities = {int(e.capacity.amount): e.layer for e in reversed(evictions)} or {max(widest - 1, 1): 0}
    if len(capacities) > 1:
        found = sorted((layer, slots) for slots, layer in capacities.items())
        raise PlanError(
            "layers keep different numbers of entries: fixed slots are equally many in all of them",
            policy=place,
            needed="one capacity",
            found=", ".join(f"{slots} in layer {layer}" for layer, slots in found),
            help="give all steps the same `budget: {tokens: ...}`, or use `layout: merged`",
        )
    slots = next(iter(capacities))
    if slots < widest - 1:
        raise PlanError(
            f"{slots} slots are fewer than a sliding window reads",
            policy=place,
            needed=f"a capacity of at least {widest - 1}, for windows of {widest} tokens",
            found=str(slots),
            help=f"write `budget: {{tokens: {widest - 1}}}` or more, or use `layout: merged`",
        )
    return slots


def _refuse_two_numbers(policy: LoadedPolicy, tokens: int, evictions: Sequence[PlannedEviction]) -> None:
    for eviction in evictions:
        raise PlanError(
            f"`{eviction.name}` evicts entries, and slots for {tokens} tokens hold all of them",
            policy=policy.where(("kv", "tokens")),
            found=f"both for layer {eviction.layer}",
            help="leave `tokens` out: the step's budget says how many slots there are",
        )


def _refuse_growth(eviction: PlannedEviction) -> None:
    """Refuse evictions that leave a number of entries which is not known beforehand."""
    if eviction.heads is not None:
        raise PlanError(
            f"`{eviction.name}` treats heads of layer {eviction.layer} differently: fixed slots are one buffer a layer",
            policy=eviction.where,
            help="leave `heads` out, or use `layout: merged`",
        )
    if eviction.score.once:
        raise PlanError(
            f"`{eviction.name}` rates the prompt only and appends what is generated: it fits into no fixed slots",
            policy=eviction.where,
            needed="a method that evicts for every token, for instance h2o, tova or streaming-llm",
            help="use that, or `layout: merged`",
        )
    own = type(eviction.select).capacity is not CacheSelector.capacity
    if eviction.capacity.kind != "tokens" or own:
        why = "its selector" if own else "a share of the text"
        raise PlanError(
            f"`{eviction.name}` keeps as many entries as {why} says: fixed slots are equally many in all layers",
            policy=eviction.where,
            needed="`budget: {tokens: ...}`" + (" and a selector such as `best`" if own else ""),
            help="use that, or `layout: merged`",
        )
