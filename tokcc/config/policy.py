"""The policy: what to reduce, where and by how much. Frozen models; anything unknown is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_serializer, model_validator

from tokcc.config.checks import Strict, problem, real, show, whole
from tokcc.config.layers import At

__all__ = [
    "Blocks",
    "Budget",
    "KvBudget",
    "KvOptions",
    "NodeKind",
    "OutputContract",
    "PieceSpec",
    "Policy",
    "Protect",
    "Ramp",
    "Rows",
    "Step",
    "find_conflict",
]

NodeKind = Literal[
    "prune", "merge", "unmerge", "sparse_attention", "bias_attention", "evict_kv", "store_kv", "filter_scan"
]
_KEEPING = ("store_kv", "unmerge", "sparse_attention", "bias_attention")

_AMOUNTS = ("keep", "tokens", "remove", "stride", "schedule", "total_remove", "kv", "flops")
# Without a model, two steps are said to contradict only if they do at every depth up to this one.
_DEEPEST = 128


class PieceSpec(Strict):
    """A score, select or reduce piece by kind, with its parameters; the piece itself checks them.

    Written flat: ``{kind: topk, foo: 1}``, or just ``topk``.
    """

    kind: str = Field(min_length=1)
    params: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _only_known_keys(cls, data: Any) -> Any:
        """Take the flat form: everything beside ``kind`` is a parameter."""
        if isinstance(data, cls):
            return data
        if isinstance(data, str):
            return {"kind": data}
        if not isinstance(data, Mapping):
            raise problem("not a piece", needed="a mapping with `kind` and the parameters of that kind")
        if "kind" not in data:
            raise problem("`kind` is missing", needed="a mapping with `kind` and the parameters of that kind")
        if set(data) == {"kind", "params"} and isinstance(data["params"], Mapping):
            return data
        return {"kind": data["kind"], "params": {key: value for key, value in data.items() if key != "kind"}}

    @model_serializer
    def _flat(self) -> dict[str, Any]:
        return {"kind": self.kind, **self.params}


class Ramp(Strict):
    """How the kept fraction falls from 1 to ``keep`` over the chosen layers.

    Attributes:
        warmup_layers: Chosen layers, counted from the first, that keep everything.
        warmup_fraction: The same as a share of the chosen layers.
    """

    warmup_layers: Annotated[int, whole(least=0)] = 0
    warmup_fraction: Annotated[float, real(least=0, below=1)] = 0.0


class KvBudget(Strict):
    """A cache capacity, split: first tokens, most recent tokens, heavy hitters. The sum is the capacity."""

    sinks: Annotated[int, whole(least=0)] = 0
    recent: Annotated[int, whole(least=0)] = 0
    heavy: Annotated[int, whole(least=0)] = 0

    @model_validator(mode="after")
    def _not_empty(self) -> KvBudget:
        if self.sinks + self.recent + self.heavy < 1:
            raise problem("the cache capacity is 0", needed="sinks + recent + heavy of at least 1")
        return self


def _check_schedule(value: Any) -> Any:
    needed = "a list with one entry for each chosen layer: a whole number of tokens, or a kept fraction up to 1.0"
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not value:
        raise problem("not a schedule", needed=needed)
    for entry in value:
        if isinstance(entry, bool) or not isinstance(entry, int | float):
            raise problem(f"{show(entry)} is not a schedule entry", needed=needed)
        if isinstance(entry, int) and entry < 1:
            raise problem(f"schedule entry {entry} keeps no token", needed=needed)
        if isinstance(entry, float) and not 0 < entry <= 1:
            raise problem(f"schedule entry {entry} is out of range", needed=needed)
    return tuple(value)


class Budget(Strict):
    """How many tokens stay. Exactly one of the amounts is given; they count tokens that may be dropped or kept.

    Attributes:
        keep: Kept fraction of the candidates.
        tokens: Kept tokens.
        remove: Removed tokens, in each chosen layer.
        stride: One of so many tokens stays, an incomplete rest is dropped.
        schedule: One entry for each chosen layer: int = kept tokens, fraction = kept share.
        total_remove: Fraction removed over all chosen layers together, at the same rate in each.
        kv: A cache capacity, split.
        flops: Reserved.
        rounding: How a fraction becomes a number of tokens.
        of: Whether fractions count the tokens that are there, or those that the model began with.
        inflection: With ``remove``: ToMe's schedule, from -1 (decreasing) over 0 (constant) to 1 (increasing).
        ramp: With ``keep``: a linear fall over the layers.
        compound: With ``keep``: the i-th chosen layer keeps ``keep ** i``, i from 1; with ``of: initial`` the same
            share is lost at each, without adding up what rounding leaves.
    """

    keep: Annotated[float | None, real(above=0, most=1)] = None
    tokens: Annotated[int | None, whole(least=1)] = None
    remove: Annotated[int | None, whole(least=0)] = None
    stride: Annotated[int | None, whole(least=1)] = None
    schedule: Annotated[tuple[int | float, ...] | None, BeforeValidator(_check_schedule)] = None
    total_remove: Annotated[float | None, real(above=0, below=1)] = None
    kv: KvBudget | None = None
    flops: Annotated[float | None, real(above=0, most=1)] = None
    rounding: Literal["ceil", "floor", "round"] = "ceil"
    of: Literal["current", "initial"] = "current"
    inflection: Annotated[float | None, real(least=-1, most=1)] = None
    ramp: Ramp | None = None
    compound: bool | None = None

    @model_validator(mode="after")
    def _one_amount(self) -> Budget:
        given = [name for name in _AMOUNTS if getattr(self, name) is not None]
        if len(given) != 1:
            raise problem(
                f"`{given[0]}` and `{given[1]}` are given together" if given else "the budget names no amount",
                needed="exactly one of " + ", ".join(f"`{name}`" for name in _AMOUNTS),
                key=given[1] if given else None,
            )
        if self.inflection is not None and self.remove is None:
            raise problem("`inflection` goes with `remove` only", needed="`remove`", key="inflection")
        if self.ramp is not None and self.keep is None:
            raise problem("`ramp` goes with `keep` only", needed="`keep`", key="ramp")
        if self.compound and (self.keep is None or self.ramp is not None):
            raise problem("`compound` goes with `keep` only", needed="`keep`, without `ramp`", key="compound")
        return self

    @property
    def amount(self) -> str:
        """The name of the amount that is given."""
        return next(name for name in _AMOUNTS if getattr(self, name) is not None)


def _check_first(value: Any) -> Any:
    if value == "auto":
        return value
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise problem("not a number of tokens", needed='a whole number of at least 0, or "auto"')
    return value


def _check_ids(value: Any) -> Any:
    ids = value if isinstance(value, list | tuple) else [value]
    if any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in ids):
        raise problem("not token ids", needed="a list of whole numbers of at least 0")
    return tuple(ids)


class Protect(Strict):
    """Tokens that no step may drop or merge away.

    Attributes:
        first: How many from the front; ``auto`` protects the class and register tokens that are found.
        last: How many from the end.
        segment: A named segment of the input.
        ids: Input token ids.
    """

    first: Annotated[int | Literal["auto"], BeforeValidator(_check_first)] = "auto"
    last: Annotated[int, whole(least=0)] = 0
    segment: str | None = None
    ids: Annotated[tuple[int, ...], BeforeValidator(_check_ids)] = ()


class Blocks(Strict):
    """How sparse attention cuts a sequence: into blocks of queries and blocks of keys.

    Attributes:
        query: Queries that read the same keys.
        key: Neighbouring keys that are read together.
    """

    query: Annotated[int, whole(least=1)] = 128
    key: Annotated[int, whole(least=1)] = 128


class Step(Strict):
    """One reduction, spelled out.

    Attributes:
        name: The preset's name or the node kind, for messages.
        preset: The preset this step came from, if any.
        heads: For caches: the key heads that the step is for; all by default.
        store: For caches: how entries are held between calls.
        blocks: For sparse attention: what queries and keys are cut into.
        bias: For biased attention: what is added to its logits.
    """

    name: str
    preset: str | None = None
    node: NodeKind
    at: At = At()
    score: PieceSpec | None = None
    select: PieceSpec | None = None
    reduce: PieceSpec | None = None
    heads: PieceSpec | None = None
    store: PieceSpec | None = None
    blocks: Blocks | None = None
    bias: PieceSpec | None = None
    budget: Budget
    protect: Protect = Protect()
    positions: Literal["keep", "compact"] = "keep"
    restore: Literal["none", "unmerge", "scatter"] = "none"
    seed: Annotated[int, whole(least=0)] = 0

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or not isinstance(data.get("node"), str):
            return data
        # Storing and biases keep every entry, unmerging every token, and what is read a selector may know itself.
        whole = {"budget": {"keep": 1.0}} if data["node"] in _KEEPING else {}
        return {"name": data["node"], **whole, **data}

    @model_validator(mode="after")
    def _only_sparse_attention_has_blocks(self) -> Step:
        given = {"blocks": self.blocks, "at": self.at.stage or self.at.length}
        for key, value in given.items() if self.node != "sparse_attention" else ():
            if value is not None:
                words = "`blocks`" if key == "blocks" else "`stage` and `length`"
                raise problem(
                    f"{words} are for sparse attention",
                    needed="`node: sparse_attention`",
                    hint="leave them out: `tokcc presets` lists the methods that have them",
                    key=key,
                )
        return self

    @model_validator(mode="after")
    def _only_biased_attention_has_a_bias(self) -> Step:
        if (self.bias is None) == (self.node == "bias_attention"):
            raise problem(
                "`node: bias_attention` says no `bias`" if self.bias is None else "`bias` is for biased attention",
                needed="`node: bias_attention` with a `bias`, such as `{kind: first_key, gamma: 0.6}`",
                key="bias" if self.bias is not None else None,
            )
        return self

    @model_validator(mode="after")
    def _schedule_fits_layers(self) -> Step:
        """Refuse a schedule that cannot match its layers in any model."""
        layers = self.at.layers
        if self.budget.schedule is None or isinstance(layers, str):
            return self
        if all(isinstance(item, int | float) for item in layers) and len(layers) != len(self.budget.schedule):
            raise problem(
                f"the schedule has {len(self.budget.schedule)} entries for {len(layers)} layers",
                needed="one entry for each chosen layer",
                key="budget",
            )
        order = [(item < 0, item) for item in layers if isinstance(item, int)]
        if order != sorted(order):
            raise problem(
                "layers with a schedule are not in ascending order",
                needed="ascending layers: entry i belongs to the i-th chosen layer",
                key="at",
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the long form as plain data; feeding it back gives the same step."""
        plain = self.model_dump(mode="json", exclude_none=True, exclude={"preset"})
        return plain if plain["name"] != plain["node"] else {k: v for k, v in plain.items() if k != "name"}


class Rows(Strict):
    """An output of which only some rows are wanted."""

    rows: Annotated[tuple[int, ...], Field(min_length=1)]


OutputContract = Literal["full", "reduced", "last_token"] | Rows


def _check_contract(value: Any) -> Any:
    if isinstance(value, Rows) or value in ("full", "reduced", "last_token"):
        return value
    rows = value.get("rows") if isinstance(value, Mapping) and set(value) == {"rows"} else None
    if not isinstance(rows, list | tuple) or not rows or any(type(row) is not int for row in rows):
        raise problem(
            "not an output contract", needed="`full`, `reduced`, `last_token`, or `{rows: [...]}` with whole numbers"
        )
    return Rows(rows=tuple(rows))


class KvOptions(Strict):
    """How decoders keep their cache.

    Attributes:
        layout: ``merged``: as long as there are entries; ``slots``: buffers of one fixed length.
        tokens: For ``slots`` of caches from which nothing is evicted: how many tokens a sequence may have.
    """

    layout: Literal["merged", "slots"] = "merged"
    tokens: Annotated[int | None, whole(least=1)] = None

    @model_validator(mode="after")
    def _only_slots_are_counted(self) -> KvOptions:
        if self.tokens is not None and self.layout != "slots":
            raise problem("`tokens` goes with `layout: slots`", needed="`layout: slots`", key="tokens")
        return self


class Policy(Strict):
    """A validated policy, with every preset spelled out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    name: str = "policy"
    steps: tuple[Step, ...]
    outputs: dict[str, Annotated[OutputContract, BeforeValidator(_check_contract)]] = Field(default_factory=dict)
    segments: dict[str, dict[str, Annotated[int, whole(least=0)]]] = Field(default_factory=dict)
    kv: KvOptions = KvOptions()

    def to_dict(self) -> dict[str, Any]:
        """Return the policy as plain data, every step in the long form; feeding it back gives the same steps."""
        plain = self.model_dump(mode="json", exclude_none=True, exclude={"steps"})
        head = {key: plain.pop(key) for key in ("version", "name")}
        return {**head, "steps": [step.to_dict() for step in self.steps], **{k: v for k, v in plain.items() if v}}


def find_conflict(steps: Sequence[Step], num_layers: int | None = None) -> tuple[int, int] | None:
    """Return the indices of two steps that ask for different budgets at one place, or None.

    Args:
        steps: The steps of a policy.
        num_layers: The depth of the model. Without it, only steps that meet at every depth count.
    """
    for later, step in enumerate(steps):
        for earlier in range(later):
            other = steps[earlier]
            same_place = all(getattr(step, k) == getattr(other, k) for k in ("node", "heads", "protect"))
            same_place = same_place and step.at.site == other.at.site and step.at.stage == other.at.stage
            if same_place and step.budget != other.budget and _meet(other.at, step.at, num_layers):
                return earlier, later
    return None


def _meet(first: At, second: At, num_layers: int | None) -> bool:
    if num_layers is not None:
        return bool(set(first.resolve(num_layers)) & set(second.resolve(num_layers)))
    meetings = []
    for depth in range(1, _DEEPEST + 1):
        try:
            chosen = set(first.resolve(depth)), set(second.resolve(depth))
        except ValueError:
            continue  # the model is too shallow for one of the two
        meetings.append(bool(chosen[0] & chosen[1]))
    return bool(meetings) and all(meetings)
