"""What happens to the cache of each layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tokcc.analysis.cache_sites import CacheSite
from tokcc.analysis.key_bias import KeyBias
from tokcc.analysis.rotation import Rotation
from tokcc.config import LoadedPolicy
from tokcc.passes.budget import Count
from tokcc.passes.cache.bias import AttentionBias
from tokcc.passes.cache.cut import CacheCut
from tokcc.passes.cache.piece import CacheReducer, CacheScore, CacheSelector
from tokcc.passes.cache.rating import TokenRating
from tokcc.passes.cache.storage import CacheForm, CacheStorage
from tokcc.passes.cache.storages.merged import Merged
from tokcc.passes.inputs import EngineInput, declared_inputs
from tokcc.passes.piece import written_out
from tokcc.passes.prompt.plan import PlannedPrune, PromptPlan
from tokcc.passes.sparse.plan import MODEL, PlannedSparse

__all__ = ["WEIGHT", "CachePlan", "HeadGroup", "PlannedBias", "PlannedEviction", "PlannedStorage"]

WEIGHT = "key_weight"
"""The state that says how many tokens an entry stands for."""


@dataclass(frozen=True)
class PlannedEviction:
    """The eviction of one layer, or of some of its heads.

    Attributes:
        step: Index of the policy's step.
        layer: 0-based.
        name: Preset or node kind, for labels.
        where: Place in the policy.
        capacity: Slots that stay after a call.
        sinks: Protected first tokens.
        recent: Protected last tokens.
        score: Rates entries.
        select: Chooses them.
        reduce: Makes the smaller cache.
        rotations: For `positions: compact`, how the layer turns queries and keys: the cache then holds keys that are
            not turned, and every call turns them by their place in the cache.
        heads: The key heads that it is for; None = all of the layer.
        turn: For scores that look ahead, how the layer turns its queries; None = it does not.
    """

    step: int
    layer: int
    name: str
    where: str
    capacity: Count
    sinks: int
    recent: int
    score: CacheScore
    select: CacheSelector
    reduce: CacheReducer
    rotations: tuple[Rotation, Rotation] | None = None
    heads: tuple[int, ...] | None = None
    turn: Rotation | None = None

    @property
    def weighted(self) -> bool:
        """Whether entries stand for more or less than one token."""
        return self.select.weighted or self.reduce.weighted

    @property
    def states(self) -> tuple[str, ...]:
        """Names of what travels beside keys and values."""
        return (*self.score.states, *([WEIGHT] if self.weighted else []))

    def slots(self, cut: CacheCut) -> Any:
        """Return how many slots stay after a call."""
        b = cut.b
        kept = self.select.capacity(cut, self.capacity)
        if self.score.once:
            # A single token of a running generation is appended: 2 - S is 1 then, and 0 for a prompt.
            single = b.max_sizes(b.sub_sizes(2, cut.new), 0)
            kept = b.add_sizes(kept, b.mul_sizes(single, 2**31))
        return b.min_sizes(kept, cut.total)

    @property
    def length(self) -> tuple[Any, ...]:
        """What the length of the cache depends on: layers with equal ones have equally long caches."""
        own = self.select.by_layer and (self.layer, self.select, self.recent)
        return self.capacity, self.score.once, self.reduce.fronted, own


@dataclass(frozen=True)
class PlannedStorage:
    """How the cache of one layer is held.

    Attributes:
        step: Index of the policy's step.
        layer: 0-based.
        name: Preset or node kind.
        where: Place in the policy.
        storage: How.
        rating: Rates the tokens of a call, for storages that hold some better than others.
        rotations: For storages that are `placed`, how the layer turns queries and keys.
    """

    step: int
    layer: int
    name: str
    where: str
    storage: CacheStorage
    rating: TokenRating | None = None
    rotations: tuple[Rotation, Rotation] | None = None


@dataclass(frozen=True)
class PlannedBias:
    """What is added to the logits of one layer, or of some of its heads.

    Attributes:
        step: Index of the policy's step.
        layer: 0-based.
        name: Preset or node kind.
        where: Place in the policy.
        bias: What is added.
        heads: The key heads that it is for: all query heads of each.
    """

    step: int
    layer: int
    name: str
    where: str
    bias: AttentionBias
    heads: tuple[int, ...]


@dataclass(frozen=True)
class HeadGroup:
    """Key heads of one layer that share a cache.

    Attributes:
        layer: 0-based.
        number: Among the groups of the layer; part of the names of all but the first.
        heads: Key heads, ascending.
        eviction: What is evicted; None = nothing.
        storage: How entries are held.
        window: Sliding window, 0 = none.
        form: What has to be held.
        stage: How often the prompt got shorter in front of the layer.
        rating: Rates the tokens of a call, for storages that hold some better than others.
        rotations: How the layer turns queries and keys, where keys are held as they are before it does.
        refilled: Old entries stand for the tokens of a call that did not come to the layer.
        sparse: What its queries read; None = everything.
        biases: What is added to the logits of some of its heads.
    """

    layer: int
    number: int
    heads: tuple[int, ...]
    eviction: PlannedEviction | None
    storage: CacheStorage
    window: int
    form: CacheForm
    stage: int = 0
    rating: TokenRating | None = None
    rotations: tuple[Rotation, Rotation] | None = None
    refilled: bool = False
    sparse: PlannedSparse | None = None
    biases: tuple[PlannedBias, ...] = ()

    @property
    def written_out(self) -> bool:
        """Whether the attention is written out: what a query sees is no run of slots up to its own."""
        return self.storage.placed or self.refilled

    @property
    def length(self) -> tuple[Any, ...]:
        """What the length of the cache depends on."""
        return self.window, self.eviction and self.eviction.length, self.storage, self.stage

    def name(self, part: str, direction: str = "past_key_values") -> str:
        """Return the public name of a tensor."""
        suffix = f"_{self.number}" if self.number else ""
        return f"{direction}.{self.layer}.{part}{suffix}"


@dataclass(frozen=True)
class CachePlan:
    """What will be done to the caches.

    Attributes:
        policy: The policy it came from.
        sites: The caches, by layer.
        forms: What each of them holds, without states.
        windows: Sliding window of each layer, 0 = none.
        evictions: In the order of layers, and of steps within a layer; their heads do not overlap.
        storages: By layer, where it is not `otherwise`.
        otherwise: How all other layers are held.
        attention_mask: Name of the padding mask input, or None.
        warnings: What the report must say.
        last_token_outputs: Positions of the outputs that hold the last token's row only.
        prompt: Where the prompt gets shorter between layers, or None.
        sparse: What queries read, by layer; everything where nothing is said.
        biases: What is added to logits.
        key_biases: What layers add to the logits of keys, by layer.
        own_sparse: What of ``sparse`` the model itself does, also where a step says otherwise.
    """

    policy: LoadedPolicy
    sites: tuple[CacheSite, ...]
    forms: tuple[CacheForm, ...]
    windows: tuple[int, ...]
    evictions: tuple[PlannedEviction, ...] = ()
    storages: Mapping[int, PlannedStorage] = field(default_factory=dict)
    otherwise: CacheStorage = field(default_factory=Merged)
    attention_mask: str | None = None
    warnings: tuple[str, ...] = ()
    last_token_outputs: tuple[int, ...] = ()
    prompt: PromptPlan | None = None
    sparse: Mapping[int, PlannedSparse] = field(default_factory=dict)
    biases: tuple[PlannedBias, ...] = ()
    key_biases: Mapping[int, KeyBias] = field(default_factory=dict)
    own_sparse: Mapping[int, PlannedSparse] = field(default_factory=dict)

    @property
    def changes(self) -> bool:
        """Whether caches are anything but whole, or attention is."""
        planned = self.evictions or self.storages or self.prompt or self._planned_sparse or self.biases
        return bool(planned) or self.otherwise != Merged()

    @property
    def _planned_sparse(self) -> tuple[PlannedSparse, ...]:
        """What steps say that queries read."""
        return tuple(one for planned in self.sparse.values() for one in planned.each if one.step != MODEL)

    @property
    def fixed(self) -> bool:
        """Whether caches have a fixed length, empty or not."""
        return self.otherwise.always() is not None

    @property
    def longest(self) -> int | None:
        """How many tokens a sequence may have, where the caches say."""
        return self.otherwise.most()

    @property
    def reads_beside(self) -> bool:
        """Whether tokens are read beside those of a call."""
        return any(eviction.score.reads_beside for eviction in self.evictions)

    @property
    def inputs(self) -> tuple[EngineInput, ...]:
        """What engines take beside the model's own inputs and what travels."""
        given = dict.fromkeys(declared_inputs(eviction.score for eviction in self.evictions))
        for planned in self.storages.values():
            given |= dict.fromkeys(planned.storage.inputs())
        return (*given, *(self.prompt.inputs if self.prompt else ()))

    @property
    def for_prompts(self) -> bool:
        """Whether calls with several tokens read sparsely."""
        return any(planned.new[1] > 1 for planned in self._planned_sparse)

    @property
    def parts(self) -> tuple[PlannedEviction | PlannedStorage | PlannedPrune | PlannedSparse | PlannedBias, ...]:
        """Everything that is done to single layers."""
        prunes = self.prompt.prunes if self.prompt else ()
        return (*self.evictions, *self.storages.values(), *prunes, *self._planned_sparse, *self.biases)

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token in all layers, as the model makes them."""
        widths = ((form.kv_heads * (form.key_width + form.value_width), form.dtype.itemsize) for form in self.forms)
        return sum(count * size for count, size in widths)

    @property
    def waits(self) -> int:
        """How many tokens may come in before anything is done to the first: a check has to read more than these."""
        storages = (planned.storage.waits() for planned in self.storages.values())
        # With some blocks more there is something to leave out.
        attentions = (p.least + 4 * p.block_k for planned in self.sparse.values() for p in planned.each)
        # Of a share something goes at any length; of what layers or heads share out, some of them lose tokens by then.
        evictions = (int(own.capacity.amount) for own in self.evictions if own.capacity.kind == "tokens")
        return max((*storages, *attentions, *evictions), default=0)

    def without_changes(self) -> CachePlan:
        """Return the plan that keeps everything that can still be seen, as it is."""
        return replace(self, evictions=(), storages={}, otherwise=Merged(), warnings=(), prompt=None,
                       sparse=self.own_sparse, biases=())  # fmt: skip

    def of_layer(self, layer: int) -> tuple[PlannedEviction, ...]:
        """Return the evictions of a layer."""
        return tuple(eviction for eviction in self.evictions if eviction.layer == layer)

    def groups(self, layer: int) -> tuple[HeadGroup, ...]:
        """Return the caches of a layer: heads that keep everything first."""
        return tuple(self._groups(layer))

    def _groups(self, layer: int) -> Iterator[HeadGroup]:
        form, planned = self.forms[layer], self.storages.get(layer)
        storage = self.otherwise if planned is None else planned.storage
        everyone = tuple(range(form.kv_heads))
        evictions = self.of_layer(layer)
        chosen = [everyone if eviction.heads is None else eviction.heads for eviction in evictions]
        rest = tuple(head for head in everyone if not any(head in heads for heads in chosen))
        parts: list[tuple[tuple[int, ...], PlannedEviction | None]] = [(rest, None)] if rest else []
        parts += list(zip(chosen, evictions, strict=True))
        for number, (heads, eviction) in enumerate(parts):
            states = eviction.states if eviction else ()
            front = eviction is not None and eviction.reduce.fronted
            sparse = self.sparse.get(layer)
            pages = () if sparse is None else sparse.states(form.kv_heads, form.key_width, form.dtype)
            own = replace(form, kv_heads=len(heads), states=states, front=front, pages=pages)
            stage = 0 if self.prompt is None else self.prompt.stage(layer)
            rating, rotations = (None, None) if planned is None else (planned.rating, planned.rotations)
            if eviction is not None:
                rotations = eviction.rotations
            refilled = self.prompt is not None and self.prompt.refills(layer)
            window = self.windows[layer]
            biases = tuple(p for p in self.biases if p.layer == layer and {*p.heads} & {*heads})
            yield HeadGroup(
                layer, number, heads, eviction, storage, window, own, stage, rating, rotations, refilled, sparse, biases
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the applied policy in the long form, with the layers and heads that were chosen: replayable."""
        data = self.policy.policy.to_dict()
        for number, step in enumerate(data["steps"]):
            layers = sorted({part.layer for part in self.parts if part.step == number})
            # A schedule has an entry for every layer, also for one where nothing goes.
            if layers and len(step["budget"].get("schedule", layers)) == len(layers):
                step["at"]["layers"] = layers
            mine = [eviction for eviction in self.evictions if eviction.step == number]
            by_head: list[PlannedEviction | PlannedBias] = [
                *mine,
                *(planned for planned in self.biases if planned.step == number),
            ]
            if by_head and step.get("heads"):
                everyone = {e.layer: range(self.forms[e.layer].kv_heads) for e in by_head}
                heads = {e.layer: list(everyone[e.layer] if e.heads is None else e.heads) for e in by_head}
                step["heads"] = {"kind": "listed", "heads": heads}
            chosen = [*mine, *(planned for planned in self._planned_sparse if planned.step == number)]
            for name in ("score", "select") if chosen else ():
                piece = getattr(chosen[0], name)
                if getattr(piece, "profile", None):
                    # What was read from a file is written out: the bundle needs nothing but itself.
                    step[name] = written_out(piece, but=("profile",))
        return data
