"""Inputs to check a decoder with: calls that follow each other, as a runtime makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from tokcc.backends.feeds import Feeds
from tokcc.backends.generation.added import nothing_for
from tokcc.backends.parity import Tolerance, oracle
from tokcc.errors import ParityError
from tokcc.ir.program import Program
from tokcc.passes.inputs import EngineInput, random_values
from tokcc.passes.prompt.plan import PromptPlan

__all__ = ["check_rebuilt", "decoder_calls", "empty_past", "lengths_past", "next_past"]

_PAST, _PRESENT = "past_key_values.", "present."
LENGTHS = (12, 1, 1, 6, 1, 1, 1, 1)
"""A prompt, single tokens, a second piece of text, more single tokens."""


def lengths_past(waits: int, most: int | None = None) -> tuple[int, ...]:
    """Return new tokens of each call, the second piece of text longer by what waits to be held in another form.

    Args:
        waits: How much longer.
        most: How many tokens there may be: pieces of text are shorter then, and the last calls are left out.
    """
    lengths = [*LENGTHS[:3], LENGTHS[3] + waits, *LENGTHS[4:]]
    over = 0 if most is None else sum(lengths) - most
    for place in (3, 0):
        fewer = min(max(over, 0), lengths[place] - 1)
        lengths[place], over = lengths[place] - fewer, over - fewer
    return tuple(lengths[:most])


def next_past(names: Sequence[str], outputs: Sequence[torch.Tensor]) -> Feeds:
    """Return the cache inputs of the next call from the outputs of this one."""
    named = zip(names, outputs, strict=True)
    return {name.replace(_PRESENT, _PAST): value for name, value in named if name.startswith(_PRESENT)}


def decoder_calls(
    program: Program,
    example: Feeds,
    reference: Callable[[Feeds], list[torch.Tensor]],
    *,
    seed: int = 0,
    lengths: Sequence[int] = LENGTHS,
    added: Sequence[EngineInput] = (),
    prompt: PromptPlan | None = None,
    before: int = 0,
    rows: int = 3,
) -> tuple[list[Feeds], list[list[torch.Tensor]]]:
    """Run the reference call after call from an empty cache and return what went in and what came out.

    One of the rows is padded on the left where there are several and the model takes a mask. No row has a token twice:
    keys of equal tokens tie, and which of them a runtime keeps is then a matter of rounding.

    Args:
        program: The decoder.
        example: Example inputs: their largest token bounds the random ones.
        reference: The eager oracle.
        seed: Of the tokens.
        lengths: New tokens of each call.
        added: Inputs that the policy added: random values for texts, and nothing for single tokens.
        prompt: Where prompts get shorter: the first call then is one that can.
        before: How many tokens the mask says there were before the first call, for decoders that read long texts in
            another way.
        rows: Texts of a call.
    """
    if prompt is not None:
        lengths = (max(lengths[0], prompt.shortest + 9), *lengths[1:])
    total, generator = sum(lengths), torch.Generator().manual_seed(seed)
    name, tokens = _random_tokens(example, total, rows, generator)
    mask = torch.ones(rows, total, dtype=torch.int64)
    if rows > 1 and "attention_mask" in example:
        mask[1, : min(lengths[0] // 3, 8)] = 0
    earlier = torch.ones(rows, before, dtype=torch.int64)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    past = empty_past(program, len(tokens))
    feeds: list[Feeds] = []
    outputs: list[list[torch.Tensor]] = []
    start = 0
    for length in lengths:
        stop = start + length
        known = {
            name: tokens[:, start:stop],
            "attention_mask": torch.cat([earlier, mask[:, :stop]], 1),
            "position_ids": _for_axes(example, positions[:, start:stop]),
        }
        known |= {each: known[each].to(example[each].dtype) for each in known if each in example}
        known |= past
        if length > 1:
            known |= random_values(program, added, known, generator)
        else:
            known |= {s.name: torch.from_numpy(nothing_for(s, len(tokens), 1)).to(s.dtype) for s in added}
        if prompt is not None and start == 0:
            known |= prompt.dressed(known)
        feed = {given: known[given] for given in (program.public_name(node) for node in program.user_inputs)}
        feeds.append(feed)
        outputs.append(reference(feed))
        past = next_past(program.output_names, outputs[-1])
        start = stop
    return feeds, outputs


def _random_tokens(example: Feeds, total: int, rows: int, generator: torch.Generator) -> tuple[str, torch.Tensor]:
    """Return the name of the tokens' input, and rows of random ones ``[B, T]`` or ``[B, T, H]``."""
    known = example.get("inputs_embeds")
    if known is not None:
        return "inputs_embeds", torch.randn(rows, total, known.shape[2], generator=generator)
    largest = int(example["input_ids"].max())
    if largest >= total:
        texts = [torch.randperm(largest, generator=generator)[:total] + 1 for _ in range(rows)]
    else:
        texts = [torch.randint(0, largest + 1, (total,), generator=generator) for _ in range(rows)]
    return "input_ids", torch.stack(texts)


def _for_axes(example: Feeds, positions: torch.Tensor) -> torch.Tensor:
    """Repeat positions ``[B, S]`` where a model takes them by frame, row and column: ``[3, B, S]``."""
    known = example.get("position_ids")
    return positions if known is None or known.ndim == 2 else positions.expand(known.shape[0], -1, -1)


def check_rebuilt(original: Program, rebuilt: Program, example: Feeds, lengths: Sequence[int] = (9,)) -> None:
    """Make sure that a decoder whose caches were rebuilt computes what it did before, on a padded prompt.

    Args:
        original: The decoder as it was captured.
        rebuilt: The same with its caches rebuilt and nothing evicted.
        example: Example inputs.
        lengths: New tokens of each call, fewer together than the smallest sliding window holds.

    Raises:
        ParityError: When it does not: the model's attention does more than was recognised.
    """
    before = oracle(original)
    inputs = zip(original.user_inputs, rebuilt.user_inputs, strict=True)
    names = {original.public_name(a): rebuilt.public_name(b) for a, b in inputs}
    for feed, got in zip(*decoder_calls(rebuilt, example, oracle(rebuilt), lengths=lengths), strict=True):
        wanted = before({name: feed[other] for name, other in names.items()})
        new = feed["input_ids" if "input_ids" in feed else "inputs_embeds"].shape[1]
        real = feed["attention_mask"][:, -new:].to(torch.bool) if "attention_mask" in feed else None
        for name, a, b in zip(rebuilt.output_names, wanted, got, strict=True):
            if name.startswith(_PRESENT):
                continue
            if real is not None and a.shape[:2] == real.shape:
                a, b = a[real], b[real]
            difference = float((a.double() - b.double()).abs().max())
            atol, _ = Tolerance().of(a, float(a.abs().max()))
            if not difference <= atol:
                raise ParityError(
                    "the decoder with rebuilt caches does not compute what the model does",
                    needed=f"`{name}` within {atol:.3g}",
                    found=f"a difference of {difference:.3g}",
                    help="the model's attention is not what tokcc took it for; please report it",
                )


def empty_past(program: Program, batch: int) -> Feeds:
    """Return the cache before the first call."""
    past: Feeds = {}
    for node in program.user_inputs:
        name, fake = program.public_name(node), node.meta.get("val")
        if name.startswith(_PAST) and isinstance(fake, torch.Tensor):
            # Fixed slots and states are there from the beginning.
            sizes: Iterable[object] = fake.shape[1:]
            own = [size if isinstance(size, int) else 0 for size in sizes]
            past[name] = torch.zeros(batch, *own, dtype=fake.dtype)
    return past
