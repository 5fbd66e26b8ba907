"""The three kinds of pieces a reduction is composed of, and their discovery by folder."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, ValidationInfo

from tokcc.config import PieceSpec
from tokcc.errors import PolicyError
from tokcc.ir.space import TokenSpace
from tokcc.passes.budget import Count
from tokcc.passes.cut import Chosen, Cut

__all__ = [
    "OtherReducer",
    "OtherScore",
    "Piece",
    "Reducer",
    "Score",
    "Selector",
    "other_piece",
    "parts_of",
    "pieces",
    "resolve_piece",
    "scores_of",
    "written_out",
]


_USES = {
    "": "encoders",
    "prompt": "prompts of decoders",
    "cache": "caches of decoders",
    "sparse": "sparse attention of decoders",
    "sparse.grids": "sparse attention of encoders",
}
"""What pieces are for, by where their folders lie."""


class Piece(BaseModel):
    """Base of all pieces: frozen parameters, unknown ones refused.

    Attributes:
        kind: The name in a policy.
        needs: What the model must have: ``cls``, ``attention``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()


class Score(Piece):
    """Rates tokens."""

    full_attention: ClassVar[bool] = False
    """True when the formula needs every row of the attention matrix."""

    def layers(self, layer: int, num_layers: int) -> tuple[int, ...]:
        """Return the layers whose attention is read."""
        del num_layers
        return (layer,)

    def emit(self, cut: Cut) -> Any:
        """Return ``[B, N]``, larger = more important."""
        raise NotImplementedError


class Selector(Piece):
    """Chooses tokens, or pairs of tokens."""

    wants_score: ClassVar[bool] = True
    around_middle: ClassVar[bool] = False
    """True when a protected token may stand between the candidates."""
    pairwise: ClassVar[bool] = False
    """True when tokens go in pairs, so that at most half of the candidates can."""

    @property
    def of_batch(self) -> bool:
        """True when a budget is for all samples together, which are the crops of one image."""
        return False

    def removes(self, count: Count) -> bool:
        """Return False when a budget leaves every token in place, whatever the input."""
        return not count.nothing

    def select(self, cut: Cut, score: Any) -> Chosen:
        """Return what was chosen."""
        raise NotImplementedError


class Reducer(Piece):
    """Makes the smaller stream and its token space."""

    takes: ClassVar[tuple[type, ...]]
    always: ClassVar[bool] = False
    """True when tokens change even where as many are left."""
    marks: ClassVar[bool] = False
    """True when something is noted about the tokens, which stay what they are: there is no smaller space."""
    bypasses: ClassVar[bool] = False
    """True when the tokens that are not selected pass the layer behind the cut by and come back."""

    def reduce(self, cut: Cut, chosen: Any, child: TokenSpace) -> Any:
        """Return the reduced stream ``[B, K, C]`` and fill in the maps of ``child``."""
        raise NotImplementedError


P = TypeVar("P", bound=Piece)


@cache
def pieces(folder: str) -> dict[str, type[Piece]]:
    """Return the pieces of ``scores``, ``selectors`` or ``reducers`` by kind: one class per file."""
    package = importlib.import_module(f"tokcc.passes.{folder}")
    found: dict[str, type[Piece]] = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for value in vars(module).values():
            own = isinstance(value, type) and issubclass(value, Piece) and value.__module__ == module.__name__
            if own and "kind" in vars(value):
                found[value.kind] = value
    return found


def resolve_piece(spec: PieceSpec, base: type[P], folder: str, where: str) -> P:
    """Make a piece from its spec.

    Args:
        spec: Kind and parameters.
        base: Expected base class.
        folder: Where such pieces live.
        where: Place in the policy, for messages.

    Raises:
        PolicyError: Unknown kind or parameter (with the nearest name), or a value out of range.
    """
    known = pieces(folder)
    word = folder.removesuffix("s")
    if spec.kind not in known:
        use = _elsewhere(spec.kind, folder)
        if use is not None:
            raise PolicyError(
                f"the {word.rpartition('.')[2]} `{spec.kind}` is for {use}",
                policy=where,
                needed="one of " + ", ".join(sorted(known)),
                help=f"use a method for {_USES[folder.rpartition('.')[0]]}: `tokcc presets` lists them",
            )
        near = difflib.get_close_matches(spec.kind, known, n=1, cutoff=0.5)
        raise PolicyError(
            f"unknown {word} `{spec.kind}`",
            policy=where,
            needed="one of " + ", ".join(sorted(known)),
            help=f"did you mean `{near[0]}`?" if near else "use one of these",
        )
    kind = known[spec.kind]
    try:
        made = kind.model_validate(spec.params, context={"where": where})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        near = difflib.get_close_matches(key, kind.model_fields, n=1, cutoff=0.5)
        raise PolicyError(
            f"{word} `{spec.kind}`, `{key}`: {first['msg'].lower()}",
            policy=where,
            needed="parameters " + (", ".join(sorted(kind.model_fields)) or "none"),
            found=repr(first.get("input")),
            help=_advice(kind, first["type"], key, near),
        ) from error
    assert isinstance(made, base)
    return made


def _advice(kind: type[Piece], problem: str, key: str, near: Sequence[str]) -> str:
    """Say what to write instead of a parameter that was not taken."""
    if problem == "extra_forbidden":
        return f"did you mean `{near[0]}`?" if near else "leave it out"
    if problem == "missing":
        return f"give `{key}` in the step: this depends on the model"
    return f"`tokcc presets --show NAME` and the docstring of `{kind.__name__}` say what it takes"


def parts_of(*given: Piece | None) -> Iterator[Piece]:
    """Yield pieces, and those that are parameters of them."""
    for piece in given:
        if piece is None:
            continue
        yield piece
        for _, value in piece:
            own = value if isinstance(value, tuple) else (value,)
            yield from parts_of(*(part for part in own if isinstance(part, Piece)))


def written_out(piece: Piece, but: Sequence[str] = ()) -> dict[str, Any]:
    """Return a piece as a policy writes it, with the pieces that are parameters of it.

    Args:
        piece: The piece.
        but: Parameters that are left out.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, Piece):
            return written_out(value)
        return [plain(part) for part in value] if isinstance(value, tuple) else value

    own = {name: plain(value) for name, value in piece if name not in but}
    pure = piece.model_dump(mode="json", include={name for name, value in own.items() if value == getattr(piece, name)})
    return {"kind": piece.kind, **own, **pure}


def _elsewhere(kind: str, folder: str) -> str | None:
    """Return what pieces of this kind are for, if they are no part of this folder but of one like it."""
    own, _, group = folder.rpartition(".")
    if group not in ("scores", "selectors", "reducers"):
        return None
    for use in (use for use in _USES if use != own):
        folder = f"{use}.{group}".lstrip(".")
        if find_spec(f"tokcc.passes.{folder}") is not None and kind in pieces(folder):  # not all have all groups
            return _USES[use]
    return None


def other_piece(base: type[Piece], folder: str) -> BeforeValidator:
    """Let a parameter be a piece, or what a policy writes for one."""

    def validated(value: Any, info: ValidationInfo) -> Any:
        where = (info.context or {}).get("where", "")
        return value if isinstance(value, base) else resolve_piece(PieceSpec.model_validate(value), base, folder, where)

    return BeforeValidator(validated)


OtherScore = Annotated[Score, other_piece(Score, "scores")]
"""A parameter of a piece that is a score, beside the step's own: ``by: {kind: attention_received, layer: 8}``."""

OtherReducer = Annotated[Reducer, other_piece(Reducer, "reducers")]
"""A parameter of a reducer that is another one, whose tokens it goes on with."""


def scores_of(*given: Piece | None) -> Iterator[Score]:
    """Yield the scores among some pieces, and those that are parameters of them."""
    yield from (part for part in parts_of(*given) if isinstance(part, Score))
