"""What cache storages work with: the tensors that travel from call to call, and the entries in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from tokcc.ir.builder import Builder
from tokcc.passes.cache.cut import CacheCut
from tokcc.passes.cache.pages import PageState, Touched
from tokcc.passes.inputs import EngineInput
from tokcc.passes.piece import Piece

__all__ = ["Arrangement", "CacheForm", "CacheStorage", "Front", "Held", "Left", "Stored"]

aten = torch.ops.aten


@dataclass(frozen=True)
class CacheForm:
    """What a cache has to hold.

    Attributes:
        kv_heads: Hkv.
        key_width: D.
        value_width: Dv.
        dtype: The model's.
        states: Names of what travels beside keys and values, fp32 ``[B, Hkv, slots]`` each.
        front: There is an entry before all others, which stands for any number of tokens.
        pages: What is remembered of pages of entries, for storages that are `paged`.
    """

    kv_heads: int
    key_width: int
    value_width: int
    dtype: torch.dtype
    states: tuple[str, ...] = ()
    front: bool = False
    pages: tuple[PageState, ...] = ()


@dataclass(frozen=True)
class Front:
    """The entry before all others. Before the first call there is no row, after it there is one.

    Attributes:
        key: ``[B, Hkv, 0 or 1, D]``.
        value: ``[B, Hkv, 0 or 1, Dv]``.
        weight: fp32 ``[B, Hkv, 0 or 1]``: how many tokens it stands for.
    """

    key: Any
    value: Any
    weight: Any


@dataclass(frozen=True)
class Stored:
    """A tensor ``[B, heads, rows, width]`` that an output leaves and the input of the next call takes.

    Attributes:
        name: ``key``, ``value``, or another one that begins with either: runtimes carry nothing else.
        heads: Size of axis 1.
        width: Size of axis 3.
        dtype: Its type.
        rows: What axis 2 counts: tensors of one storage with the same word are equally long.
        fixed: The size of axis 2 where it never changes.
    """

    name: str
    heads: int
    width: int
    dtype: torch.dtype
    rows: str = "slots"
    fixed: int | None = None


@dataclass(frozen=True)
class Arrangement:
    """Where entries stand and what they belong to.

    Attributes:
        places: True positions, int64 ``[B, N]``.
        segments: Numbers of segments, int64 ``[B, N]``; -1 = padding.
        allowed: bool ``[B, S, L]``: what each query of a call sees, but for itself.
    """

    places: Any
    segments: Any
    allowed: Any = None


@dataclass(frozen=True)
class Held:
    """The entries of a cache before a call.

    Attributes:
        key: ``[B, Hkv, P, D]``.
        value: ``[B, Hkv, P, Dv]``.
        states: fp32 ``[B, Hkv, P]`` by name.
        front: The entry before them, where the form has one.
        real: bool ``[B, P]``: entries that are not padding, from storages that change their order; None = they are in
            the order of the sequence.
        arranged: Where they stand, from storages that are `placed`.
    """

    key: Any
    value: Any
    states: dict[str, Any] = field(default_factory=dict)
    front: Front | None = None
    real: Any = None
    arranged: Arrangement | None = None


@dataclass(frozen=True)
class Left:
    """The entries of a cache after a call.

    ``P`` entries were held, ``S`` came, ``K`` stay. A storage that keeps entries in a form of its own takes the held
    ones in that form by ``take`` and turns only new ones into it, so that nothing is rounded twice.

    Attributes:
        key: ``[B, Hkv, K, D]``.
        value: ``[B, Hkv, K, Dv]``.
        states: fp32 ``[B, Hkv, K]`` by name.
        new_key: ``[B, Hkv, S, D]``.
        new_value: ``[B, Hkv, S, Dv]``.
        real: bool ``[B, P + S]``: slots that are not padding.
        past: P.
        new: S.
        index: int64 ``[B, Hkv, K]`` into the ``P + S`` slots, ascending; None = a run of slots up to the last one.
        start: First slot of that run.
        cut: The call before anything was evicted, for storages that rate entries themselves.
        front: The entry before them, of one row, where the form has one.
        arranged: Where all of them stand, for storages that are `placed`.
        rating: fp32 ``[B, 1, S]``: how important the call's tokens are, for storages that are `rated`.
        pages: The states of pages after the call, by name.
    """

    key: Any
    value: Any
    states: dict[str, Any]
    new_key: Any
    new_value: Any
    real: Any
    past: Any
    new: Any
    index: Any = None
    start: Any = 0
    cut: CacheCut | None = None
    front: Front | None = None
    arranged: Arrangement | None = None
    rating: Any = None
    pages: Mapping[str, Any] = field(default_factory=dict)

    def take(self, b: Builder, x: Any) -> Any:
        """Return what stays of ``[B, Hkv, P + S, ...]``."""
        if self.index is not None:
            return b.call(torch.ops.tokcc.gather_slots.default, x, self.index)
        return x if isinstance(self.start, int) and self.start == 0 else b.slice(x, 2, self.start, None)


class CacheStorage(Piece):
    """How the entries of a layer are held between calls.

    Attributes:
        as_they_are: Entries may be changed by a reducer: it stores whatever it is given.
        evicts: Entries may be taken out.
        placed: Entries say where they stand and what they belong to: they may lie in any order, and callers may put
            caches of texts that were read apart behind each other. For all layers or none.
        rated: Holds some tokens better than others, by what the step's `score` says of them: reads ``rating``.
        in_place: Entries are written where they stay before the attention reads them: keys and values of `Held` and
            `Left` are buffers, of which the first slots are filled.
        paged: Holds states of pages.
    """

    as_they_are: ClassVar[bool] = False
    evicts: ClassVar[bool] = True
    placed: ClassVar[bool] = False
    rated: ClassVar[bool] = False
    in_place: ClassVar[bool] = False
    paged: ClassVar[bool] = False

    def check(self, form: CacheForm) -> None:
        """Refuse a cache that cannot be held this way.

        Raises:
            ValueError: Says what is needed.
        """

    def basis(self, form: CacheForm) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the orthogonal matrices ``[D, D]`` and ``[Dv, Dv]`` that keys and values are held multiplied by.

        The attention works on such keys and values: a call's queries, keys and values are multiplied, and what was
        attended is multiplied back, which costs nothing for what is held. Not for storages from which entries may be
        taken out: scores read channels. None = as they are.
        """
        del form
        return None

    def inputs(self) -> Sequence[EngineInput]:
        """Return the inputs that it reads besides what travels."""
        return ()

    def arranged(self, b: Builder, held: Held, positions: Any, real: Any) -> Arrangement:
        """Return where all entries of a call stand, and what its queries see, for storages that are `placed`.

        Args:
            b: The builder.
            held: What was there.
            positions: True positions of the call's tokens, int ``[B, S]``.
            real: bool ``[B, S]``: which are no padding.
        """
        raise NotImplementedError

    def always(self) -> int | None:
        """Return how many entries it holds before and after every call; None = as many as there are."""
        return None

    def most(self) -> int | None:
        """Return how many tokens a sequence may have, padding counted; None = as many as the model reads."""
        return None

    def entered(self, b: Builder, held: Held, new_key: Any, new_value: Any, past: Any, new: Any) -> tuple[Any, Any]:
        """Return the buffers of keys and values with those of a call in them, for storages that are `in_place`.

        Args:
            b: The builder.
            held: The buffers.
            new_key: ``[B, Hkv, S, D]``.
            new_value: ``[B, Hkv, S, Dv]``.
            past: Slots that are filled.
            new: S.
        """
        raise NotImplementedError

    def paged_rows(self, b: Builder, state: Any, pages: Touched, fresh: Any) -> Any:
        """Return a state of pages after a call, for storages that are `paged`.

        Args:
            b: The builder.
            state: What was held.
            pages: Which pages the call touched.
            fresh: Their rows ``[B, heads, R, width]``.
        """
        raise NotImplementedError

    def held_rows(self, b: Builder, state: Any, pages: Touched) -> Any:
        """Return the rows of pages before a call ``[B, heads, R, width]``, for storages that are `paged`.

        Of pages that did not exist any finite numbers.

        Args:
            b: The builder.
            state: What was held.
            pages: Which pages.
        """
        raise NotImplementedError

    def held_whole(self, b: Builder, state: Any) -> Any:
        """Return the row of a whole text before a call ``[B, heads, 1, width]``, for storages that are `paged`.

        Before the first call any finite numbers.

        Args:
            b: The builder.
            state: What was held.
        """
        raise NotImplementedError

    def waits(self) -> int:
        """Return how many tokens may come in before the first of them is held in another form than it came."""
        return 0

    def tensors(self, form: CacheForm) -> tuple[Stored, ...]:
        """Return what travels; ``key`` and ``value`` first."""
        raise NotImplementedError

    @staticmethod
    def state_tensors(form: CacheForm) -> tuple[Stored, ...]:
        """Return a tensor ``[B, Hkv, P, 1]`` for every state, for storages that hold states as they are."""
        return tuple(Stored(name, form.kv_heads, 1, torch.float32) for name in form.states)

    @staticmethod
    def read_states(b: Builder, form: CacheForm, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Return the states that those tensors hold."""
        # Not a squeeze: runtimes start with no slots of any width (tokcc.backends.onnx frees it).
        return {name: b.call(torch.ops.aten.select.int, tensors[name], 3, 0) for name in form.states}

    @staticmethod
    def write_states(b: Builder, left: Left) -> dict[str, Any]:
        """Return those tensors after the call."""
        return {name: b.unsqueeze(value, 3) for name, value in left.states.items()}

    def read(self, b: Builder, form: CacheForm, tensors: Mapping[str, Any]) -> Held:
        """Return the entries that the tensors hold."""
        raise NotImplementedError

    def write(self, b: Builder, form: CacheForm, tensors: Mapping[str, Any], left: Left) -> dict[str, Any]:
        """Return the tensors after the call, by name."""
        raise NotImplementedError
