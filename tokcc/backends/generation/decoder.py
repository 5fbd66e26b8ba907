"""One call of a decoder's engine: tokens and cache in, logits and cache out, by the community's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tokcc.backends.bundle import Bundle
from tokcc.backends.generation.added import AddedInput, added_inputs
from tokcc.backends.ort import Session
from tokcc.errors import LoweringError, UsageError

__all__ = ["SLOTS", "TOKEN_BYTES", "Array", "DecoderEngine", "Past"]

TOKEN_BYTES = "tokcc.token_bytes"
"""Key of an engine's metadata: bytes of the keys and values of one token in all layers, as the model makes them."""

SLOTS = "tokcc.slots"
"""Key of an engine's metadata: tokens that its caches have slots for, which each call fills where they stay."""

Array = npt.NDArray[Any]
Past = dict[str, Array]
"""What is carried from call to call: ``past_key_values.*`` by name."""

_PAST, _PRESENT = "past_key_values.", "present."
_IDS, _EMBEDS = "input_ids", "inputs_embeds"
_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


@dataclass(frozen=True)
class _Carried:
    """An input that an output of the call before feeds.

    Attributes:
        name: The input.
        shape: Numbers, and symbols for what is free.
        width: Size of the last axis; where the input leaves it free, the output tells.
        dtype: numpy's.
    """

    name: str
    shape: tuple[Any, ...]
    width: Any
    dtype: Any

    @property
    def output(self) -> str:
        return self.name.replace(_PAST, _PRESENT, 1)

    @property
    def first(self) -> tuple[int, ...]:
        """Sizes behind the batch before the first call: no slots where their number is free."""
        return (*(size if isinstance(size, int) else 0 for size in self.shape[1:-1]), self.width)


class DecoderEngine:
    """A decoder's engine in ONNX Runtime. It knows names and shapes, and nothing of how the cache is reduced.

    Args:
        source: A bundle, its folder, or an ONNX file.
        threads: Of the runtime; 0 = its default.

    Raises:
        UsageError: There is no such engine, or it is not a decoder's.
        LoweringError: The runtime does not take it.
    """

    def __init__(self, source: Bundle | str | Path, *, threads: int = 0) -> None:
        self.path, self.folder = _engine_file(source)
        self._session = Session(self.path, threads=threads, patterns=False)
        inputs = {item.name: item for item in self._session.session.get_inputs()}
        outputs = {item.name: item for item in self._session.session.get_outputs()}
        metadata = self._session.session.get_modelmeta().custom_metadata_map
        self.added: Mapping[str, AddedInput] = added_inputs(metadata)
        """Inputs that the policy added, by name."""
        _check_decoder(self.path, list(inputs), list(outputs), list(self.added))
        self._inputs = {name: _dtype(item) for name, item in inputs.items()}
        self._carried = tuple(
            _Carried(name, tuple(item.shape), outputs[name.replace(_PAST, _PRESENT, 1)].shape[-1], self._inputs[name])
            for name, item in inputs.items()
            if name.startswith(_PAST)
        )
        for item in self._carried:
            state = len(item.shape) == 3  # of a scan, and as large before the first call as after it
            if not (len(item.shape) == 4 or state) or not all(isinstance(x, int) for x in (item.shape[1], item.width)):
                needed = f"`{item.name}` as [batch, heads, slots, width] or [batch, channels, width]"
                raise _not_a_decoder(self.path, needed, f"{list(item.shape)}")
        slots = metadata.get(SLOTS, "")
        self.slots: int | None = int(slots) if slots.isdecimal() else None
        """Tokens that there may be, padding counted, where the caches are buffers of one length. A call then writes
        into what it was given as ``past`` and returns that; a shorter mask takes a text back to an earlier token."""
        tokens = inputs[_IDS if _IDS in inputs else _EMBEDS]
        self._embed = (
            Session(_embedding_file(self.path), threads=threads, patterns=False) if _EMBEDS in inputs else None
        )
        place = inputs.get("position_ids")
        self.position_axes = 1 if place is None or len(place.shape) == 2 else int(place.shape[0])
        """Numbers that a position is made of: one, or frame, row and column."""
        batch, width = tokens.shape[0], outputs["logits"].shape[-1]
        self.batch: int | None = batch if isinstance(batch, int) else None
        """The batch size, where the engine fixes it."""
        self.vocabulary: int | None = width if isinstance(width, int) else None
        """The number of logits, where the engine tells."""

    @property
    def slot_bytes(self) -> int:
        """Bytes of the keys and values of one token in all layers: what a cache without eviction grows by."""
        known = self._session.session.get_modelmeta().custom_metadata_map.get(TOKEN_BYTES)
        if known is not None and known.isdecimal():
            return int(known)
        pairs = [item for item in self._carried if item.name.endswith((".key", ".value"))]
        return sum(item.shape[1] * item.width * np.dtype(item.dtype).itemsize for item in pairs)

    def empty_past(self, batch: int) -> Past:
        """Return the cache before the first call."""
        return {item.name: np.zeros((batch, *item.first), item.dtype) for item in self._carried}

    def nothing(self, batch: int, new: int) -> dict[str, Array]:
        """Return what stands for nothing in the inputs that the policy added."""
        return {name: item.nothing(batch, new, self._inputs[name]) for name, item in self.added.items()}

    def given(self, rows: Mapping[str, Sequence[Sequence[float]]], batch: int, new: int) -> dict[str, Array]:
        """Return rows of different lengths as arrays for those inputs.

        Raises:
            UsageError: There is no such input, or the rows do not fit.
        """
        for name in rows:
            if name not in self.added:
                raise UsageError(
                    f"the engine has no input `{name}` beside the model's own",
                    needed="one of " + ", ".join(self.added) if self.added else "a policy that adds one",
                )
        return {name: self.added[name].rows(given, batch, new, self._inputs[name]) for name, given in rows.items()}

    def call(
        self,
        ids: Array,
        mask: Array,
        positions: Array,
        past: Mapping[str, Array],
        given: Mapping[str, Array] | None = None,
    ) -> tuple[Array, Past]:
        """Run one call.

        Args:
            ids: int64 ``[B, S]``: the new tokens.
            mask: int64 ``[B, T]``: 1 = real token, for all tokens so far and the new ones; padding on the left.
            positions: int64 ``[B, S]``: true positions of the new tokens, as if nothing were ever evicted.
            past: What the call before returned, or :meth:`empty_past`; written over where there are :attr:`slots`.
            given: Values of inputs that the policy added; nothing where one is not given. Of an engine that reads
                embeddings also ``inputs_embeds`` ``[B, S, H]``, where they are not those of the tokens.

        Returns:
            The logits of the last new token ``[B, V]``, and what the next call takes as ``past``.

        Raises:
            UsageError: The cache is not one of this engine, it has too few slots, or a token is not in the vocabulary.
            LoweringError: The runtime fails.
        """
        logits, carried = self.read(ids, mask, positions, past, given)
        return logits[:, -1], carried

    def read(
        self,
        ids: Array,
        mask: Array,
        positions: Array,
        past: Mapping[str, Array],
        given: Mapping[str, Array] | None = None,
    ) -> tuple[Array, Past]:
        """Run one call as :meth:`call` does; return the logits of all new tokens ``[B, S, V]``.

        An engine that computes those of the last token alone gives ``[B, 1, V]``.
        """
        self._check(ids, past)
        self.refuse_more(mask.shape[1])
        if self.position_axes > 1 and positions.ndim == 2:
            positions = np.broadcast_to(positions, (self.position_axes, *positions.shape))
        known = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        known |= self.nothing(*ids.shape)
        known |= {name: ids == item.token for name, item in self.added.items() if item.token is not None}
        known |= dict(given or {})
        self._check_added(given or {}, len(ids), positions.shape[-1])
        if self._embed is not None and _EMBEDS not in known:
            known[_EMBEDS] = self.embed(ids)
        feeds = {
            name: known[name].astype(dtype, copy=False) if name in known else past[name]
            for name, dtype in self._inputs.items()
        }
        new = ids.shape[1]
        try:
            if self.slots is None:
                results = self._session.run(feeds)
            else:
                results = self._session.run_over(feeds, {item.output: item.name for item in self._carried})
        except Exception as error:  # onnxruntime raises its own, undocumented classes
            raise LoweringError(
                f"the engine `{self.path}` fails in a call of {new} tokens after {mask.shape[1] - new}",
                found=" ".join(str(error).split())[:300],
                help="a text longer than the model's positions is one reason, another is a prompt without the number of"
                " image tokens that the policy takes some of; `tokcc verify` checks the bundle",
            ) from error
        logits = results["logits"]
        rows = logits if logits.ndim == 3 else logits[:, None]
        return rows, {item.name: results[item.output] for item in self._carried}

    def embed(self, ids: Array) -> Array:
        """Return the embeddings ``[B, S, H]`` of tokens ``[B, S]``, of an engine that reads embeddings."""
        assert self._embed is not None
        made: Array = self._embed.run({_IDS: np.asarray(ids, np.int64)})[_EMBEDS]
        return made

    def refuse_more(self, tokens: int) -> None:
        """Refuse a sequence that the caches have no slots for.

        Raises:
            UsageError: There are more tokens than slots.
        """
        if self.slots is not None and tokens > self.slots:
            raise UsageError(
                "the sequence has more tokens than the caches have slots",
                needed=f"at most {self.slots}, prompt and padding counted",
                found=str(tokens),
                help="shorten it, or compile with a larger `kv: {layout: slots, tokens: ...}`",
            )

    def _check_added(self, given: Mapping[str, Array], batch: int, new: int) -> None:
        for name, item in self.added.items():
            known = {"B": batch, "S": new}
            wanted = [known.get(size, size) if isinstance(size, str) else size for size in item.shape]
            found = list(given[name].shape) if name in given else wanted
            if len(found) != len(wanted) or any(
                isinstance(want, int) and want != got for want, got in zip(wanted, found, strict=True)
            ):
                raise UsageError(
                    f"`{name}` does not fit the call",
                    node=f"input `{name}`",
                    needed=str(wanted),
                    found=str(found),
                    help=item.doc,
                )

    def _check(self, ids: Array, past: Mapping[str, Array]) -> None:
        if self.batch not in (None, ids.shape[0]):
            raise UsageError(
                "the engine has a fixed batch size", needed=f"{self.batch} prompts", found=f"{ids.shape[0]}"
            )
        smallest, largest = int(ids.min()), int(ids.max())
        if smallest < 0 or (self.vocabulary is not None and largest >= self.vocabulary):
            raise UsageError(
                "a token is not in the model's vocabulary",
                needed=f"0 to {self.vocabulary - 1}" if self.vocabulary else "no negative numbers",
                found=str(smallest if smallest < 0 else largest),
                help="the tokenizer is not the model's",
            )
        for item in self._carried:
            given = past.get(item.name)
            wanted = (ids.shape[0], *item.shape[1:])
            shape = given.shape if given is not None else ()
            fits = len(shape) == len(wanted) and all(
                not isinstance(want, int) or want == got for want, got in zip(wanted, shape, strict=True)
            )
            if given is None or not fits or given.dtype != item.dtype:
                sizes = ", ".join(str(size) if isinstance(size, int) else "any" for size in wanted)
                raise UsageError(
                    "the cache does not fit the engine",
                    node=f"input `{item.name}`",
                    needed=f"{np.dtype(item.dtype).name} [{sizes}]",
                    found="nothing" if given is None else f"{given.dtype.name} {list(shape)}",
                    help="start with empty_past() and pass on what each call returns",
                )


def _engine_file(source: Bundle | str | Path) -> tuple[Path, Path]:
    """Return the engine, and the folder of configuration and tokenizer."""
    path = source.path if isinstance(source, Bundle) else Path(source)
    if isinstance(source, Bundle) or path.is_dir():
        bundle = source if isinstance(source, Bundle) else Bundle.open(path)
        part = bundle.part("decoder") if bundle.manifest.parts else bundle
        return part.engine("onnx"), bundle.root
    if not path.is_file():
        raise UsageError(f"there is no bundle and no engine `{path}`", help="give what `tokcc compile -o` wrote")
    return path, path.parent


def _embedding_file(engine: Path) -> Path:
    path = engine.with_name("embed_tokens.onnx")
    if not path.is_file():
        raise UsageError(
            f"`{engine}` reads embeddings, and the table of them is not beside it",
            needed=path.name,
            help="keep the engines of a bundle together",
        )
    return path


def _check_decoder(path: Path, inputs: Sequence[str], outputs: Sequence[str], added: Sequence[str]) -> None:
    carried = [name for name in inputs if name.startswith(_PAST)]
    if not {_IDS, _EMBEDS} & {*inputs} or "logits" not in outputs or not carried:
        names = ", ".join((*inputs[:4], *(["..."] if len(inputs) > 4 else [])))
        raise _not_a_decoder(path, "input_ids and past_key_values.* in, logits and present.* out", f"inputs {names}")
    for name in carried:
        if name.replace(_PAST, _PRESENT, 1) not in outputs:
            raise _not_a_decoder(path, f"an output `{name.replace(_PAST, _PRESENT, 1)}`", "none of that name")
    known = (*carried, *added, _IDS, _EMBEDS, "attention_mask", "position_ids")
    foreign = [name for name in inputs if name not in known]
    if foreign:
        raise _not_a_decoder(path, "no inputs but tokens, mask, positions and cache", f"`{foreign[0]}`")


def _not_a_decoder(path: Path, needed: str, found: str) -> UsageError:
    return UsageError(
        f"`{path}` is not a decoder's engine",
        needed=needed,
        found=found,
        help="only causal language models generate: compile one with --task text-generation",
    )


def _dtype(item: Any) -> Any:
    try:
        return _DTYPES[item.type]
    except KeyError as error:
        raise LoweringError(
            f"input `{item.name}` has a type that numpy does not know",
            found=str(item.type),
            help="compile with --dtype float32 or float16",
        ) from error
