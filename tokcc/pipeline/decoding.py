"""Filling the report of a decoder: what its caches hold, how fast it generates, and what that costs on a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tokcc.analysis.computed import computed
from tokcc.analysis.ledger import node_flops
from tokcc.backends.calls import empty_past
from tokcc.backends.generation.added import nothing_for
from tokcc.backends.generation.text import Tokenizer
from tokcc.backends.parity import oracle
from tokcc.backends.runtime_files import TOKENIZER_FILES
from tokcc.capture.loaded import Loaded
from tokcc.errors import UsageError
from tokcc.ir.program import Program
from tokcc.passes.cache.plan import CachePlan
from tokcc.passes.cache.rebuild import ATTEND
from tokcc.passes.inputs import EngineInput
from tokcc.pipeline.decoder_quality import LONGEST, SHORTEST, refuse_single_rows
from tokcc.pipeline.decoder_speed import Limits, reached
from tokcc.pipeline.generating import Generated, Pair
from tokcc.pipeline.measuring import Measurement, latency_of
from tokcc.pipeline.reading import model_positions
from tokcc.pipeline.reducing import Reduced
from tokcc.pipeline.stages import Stages
from tokcc.report.schema import LayerRow, Report, Totals
from tokcc.report.tokens import TokenText, load_tokens

__all__ = ["cache_facts", "measure_decoder", "prompt_flops", "read_text", "tokenized", "with_generated"]

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
_PAST, _PRESENT = "past_key_values.", "present."


def read_text(data: Any, folder: Path, *, plan: CachePlan | None = None) -> TokenText:
    """Read the calibration text of a decoder.

    Args:
        data: A path, texts, or token ids.
        folder: Where the tokenizer's files are; they are only read for text.
        plan: What is compiled, if it is.

    Raises:
        UsageError: There is no tokenizer, the data does not fit, or the engine could not be measured on it.
    """
    if plan is not None and plan.last_token_outputs:
        raise refuse_single_rows()
    if plan is not None and plan.prompt is not None:
        raise UsageError(
            "a text says nothing about prompts that get shorter",
            found="tokens of a text share no rows"
            if plan.prompt.unmerge is not None
            else "a text is read piece by piece, and only the first piece gets shorter",
            help="leave the calibration data out: the first call is timed on random tokens",
        )
    return load_tokens(data, tokenized(folder), shortest=SHORTEST, longest=LONGEST)


def tokenized(folder: Path | None) -> Callable[[str], Sequence[int]]:
    """Return what makes token ids of a text, with the tokenizer of a folder.

    It raises a UsageError where there is none; texts that are token ids already do without.
    """

    def encode(text: str) -> Sequence[int]:
        if folder is None or not any((folder / name).is_file() for name in TOKENIZER_FILES):
            raise UsageError(
                "calibration with text needs the model's tokenizer, and none came with the model",
                help="compile from a folder that has one, or give token ids in an .npz (`input_ids`) or .npy",
            )
        return Tokenizer(folder).encode(text)

    return encode


def cache_facts(report: Report, reduced: Reduced, loaded: Loaded) -> Report:
    """Add what each layer's cache will hold at the longest context, and the FLOPs of a step there: nothing is run."""
    context = reached(_positions(loaded, reduced))[-1]
    if reduced.caches is not None and reduced.caches.prompt is not None:
        context = max(context, reduced.caches.prompt.shortest)
    before, after = (
        _planned(reduced.original, context),
        _planned(reduced.program, context, reduced.declared_inputs),
    )
    return _with_layers(report, reduced, before, after, context)


def measure_decoder(
    report: Report,
    reduced: Reduced,
    loaded: Loaded,
    engine: Path,
    baseline: Path,
    text: TokenText | None,
    how: Measurement,
    stages: Stages,
) -> Measurement:
    """Let engine and whole cache read the same tokens, and say what each costs.

    Args:
        report: The facts.
        reduced: The programs.
        loaded: The model.
        engine: The engine.
        baseline: The engine that keeps everything.
        text: The calibration text, or None.
        how: Seed, threads, budget.
        stages: Progress.
    """
    positions = _positions(loaded, reduced)
    try:
        pair = Pair(baseline, engine, positions=positions, threads=how.threads, seed=how.seed)
    except UsageError as error:
        if text is not None:
            raise
        report = cache_facts(report, reduced, loaded)
        return replace(how, report=report.noted(f"nothing was measured: {error.what}"))
    assert reduced.caches is not None
    prompts = reduced.caches.for_prompts
    found = pair.measure(stages, text=text, limits=Limits(steps_s=how.budget_s), prompts=prompts)
    growth = found.growth
    before = {**found.feeds, **growth.before}
    for name in found.feeds:
        if name.startswith(_PAST) and name not in growth.before:
            del before[name]
    report = _with_layers(report, reduced, before, found.feeds, growth.context)
    if found.prompts is not None:
        flops = prompt_flops(reduced, found.prompts.longest)
        report = report.model_copy(update={"totals": Totals.of(*flops, shapes=_shapes(found.timed_feeds))})
    return replace(how, report=with_generated(report, found, how.threads))


def _positions(loaded: Loaded, reduced: Reduced) -> int | None:
    """Return how many tokens may be read: as many as the model has positions, and the caches slots."""
    longest = None if reduced.caches is None else reduced.caches.longest
    known = (model_positions(loaded, reduced.original), longest)
    return min((limit for limit in known if limit is not None), default=None)


def with_generated(report: Report, found: Generated, threads: int) -> Report:
    """Add what was measured."""
    latency = latency_of(found.timed, found.timed_feeds, threads)
    known = report.totals
    # FLOPs are those of the context that the layer table is about.
    same = known.shapes.get("attention_mask") == latency.shapes["attention_mask"]
    totals = Totals.of(known.flops_before, known.flops_after, latency=latency if same else None, shapes=known.shapes)
    acts = any(row.step for row in report.layers)
    warnings = found.quality.warnings if found.quality and acts else ()
    return report.model_copy(
        update={
            "latency": latency,
            "totals": totals,
            "break_even": found.break_even,
            "decoding": found.decoding,
            "fidelity": found.quality.fidelity if found.quality else report.fidelity,
            "notes": tuple(dict.fromkeys((*report.notes, *found.notes))),
            "warnings": (*report.warnings, *warnings),
        }
    )


def _with_layers(report: Report, reduced: Reduced, before: Feeds, after: Feeds, context: int) -> Report:
    """Add what the caches hold that a step after a context is given, and its FLOPs."""
    assert reduced.caches is not None
    plan = reduced.caches
    steps = (reduced.original, before, plan.without_changes()), (reduced.program, after, plan)
    flops = [_attention_flops(program, _shapes(feeds), of) for program, feeds, of in steps]
    slots = [_slots(feeds, of) for _, feeds, of in steps]
    rows = []
    changed = {eviction.layer for eviction in plan.evictions} | set(plan.storages)
    for site in plan.sites:
        layer = site.layer
        names = sorted({part.name for part in plan.parts if part.layer == layer})
        sizes = [_layer_bytes(feeds, layer) for feeds in (before, after)]
        rows.append(
            LayerRow(
                layer=layer,
                site="" if not names else "cache" if layer in changed else "attention",
                step=", ".join(names),
                tokens_in=slots[0][layer],
                tokens_out=slots[0][layer] if slots[1][layer] is None else slots[1][layer],
                flops_before=flops[0][layer],
                flops_after=flops[1][layer],
                bytes_before=sizes[0],
                bytes_after=sizes[1],
                kv_bytes_before=sizes[0],
                kv_bytes_after=sizes[1],
            )
        )
    total = [_total_flops(program, _shapes(feeds)) for program, feeds, _ in steps]
    note = f"per layer: slots and bytes of the cache, and FLOPs of the attention over it, one token after {context}"
    return report.model_copy(
        update={
            "layers": tuple(rows),
            "totals": Totals.of(total[0], total[1], shapes=_shapes(after)),
            "notes": (*report.notes, note),
            "warnings": (*report.warnings, *plan.warnings),
            "model": report.model.model_copy(update={"blocks": len(plan.sites)}),
        }
    )


def _slots(feeds: Feeds, plan: CachePlan) -> list[int | None]:
    """Return the entries that a head of each layer holds on average; None where a storage holds all in its own way."""
    found: list[int | None] = []
    for site in plan.sites:
        planned = plan.storages.get(site.layer)
        groups = plan.groups(site.layer)
        if planned is not None and not planned.storage.evicts:
            found.append(None)
            continue
        held = [len(g.heads) * (g.storage.always() or feeds[g.name("key")].shape[2]) for g in groups]
        found.append(round(sum(held) / sum(len(g.heads) for g in groups)))
    return found


def _planned(program: Program, context: int, added: Sequence[EngineInput] = ()) -> dict[str, Array]:
    """Return the inputs of a single token after a context: caches as long as the program leaves them."""
    lengths = _lengths(program, context, added)
    feeds: dict[str, Array] = {spec.name: nothing_for(spec, 1, 1) for spec in added}
    for node in program.user_inputs:
        name, fake = program.public_name(node), node.meta["val"]
        if name.startswith(_PAST):
            shape = (1, int(fake.shape[1]), lengths[name], int(fake.shape[3]))
            feeds[name] = np.zeros(shape, str(fake.dtype).removeprefix("torch."))
        elif name not in feeds:
            feeds[name] = _plain(name, context, 1, fake)
    return feeds


def _plain(name: str, context: int, new: int, fake: torch.Tensor) -> Array:
    if fake.is_floating_point():  # embeddings
        return np.ones((1, new, int(fake.shape[2])), np.float32)
    if "mask" in name:
        return np.ones((1, context + new), np.int64)
    if "position" in name:
        # Some models take them by frame, row and column.
        return np.broadcast_to(np.arange(context, context + new), (*fake.shape[:-2], 1, new))
    return np.ones((1, new), np.int64)


def prompt_flops(reduced: Reduced, length: int) -> tuple[int, int]:
    """Return the FLOPs of a first call of so many tokens, before and after."""
    found = []
    for program, added in ((reduced.original, ()), (reduced.program, reduced.declared_inputs)):
        feeds: dict[str, Any] = {name: value.numpy() for name, value in empty_past(program, 1).items()}
        feeds |= {spec.name: nothing_for(spec, 1, length) for spec in added}
        prompt = reduced.caches.prompt if added and reduced.caches is not None else None
        if prompt is not None and prompt.refill is not None:
            feeds |= {name: value.numpy() for name, value in prompt.refill.random(length, 0).items()}
        shared = prompt is not None and prompt.unmerge is not None and prompt.unmerge.rows(length)
        for node in program.user_inputs:
            name = program.public_name(node)
            if name not in feeds:
                of_rows = name in ("input_ids", "inputs_embeds")
                feeds[name] = _plain(name, 0, (of_rows and shared) or length, node.meta["val"])
        found.append(_total_flops(program, _shapes(feeds)))
    before, after = found
    return before, after


def _lengths(program: Program, context: int, added: Sequence[EngineInput]) -> dict[str, int]:
    """Return how long each tensor of a cache is after a prompt as long as the context: from a run without numbers."""
    run = oracle(program)
    with FakeTensorMode(allow_non_fake_inputs=True):
        feeds = empty_past(program, 1)
        for spec in added:
            feeds[spec.name] = torch.zeros(nothing_for(spec, 1, context).shape, dtype=spec.dtype)
        for node in program.user_inputs:
            name = program.public_name(node)
            if name not in feeds:
                fake = node.meta["val"]
                feeds[name] = torch.zeros(_plain(name, 0, context, fake).shape, dtype=fake.dtype)
        outputs = run(feeds)
    return {
        name.replace(_PRESENT, _PAST): int(value.shape[2])
        for name, value in zip(program.output_names, outputs, strict=True)
        if name.startswith(_PRESENT)
    }


def _shapes(feeds: Feeds) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in feeds.items()}


def _layer_bytes(feeds: Feeds, layer: int) -> int:
    prefix = f"{_PAST}{layer}."
    return sum(value.nbytes for name, value in feeds.items() if name.startswith(prefix))


def _attention_flops(program: Program, shapes: Mapping[str, Sequence[int]], plan: CachePlan) -> list[int]:
    """Return the FLOPs of the attention of each layer: one node for each of its caches.

    Those with a label are not among them: a score attends beside the layers.
    """
    bindings = program.bindings(shapes)
    taken = computed(program, bindings)
    flops = {node: node_flops(node, bindings) if node in taken else 0 for node in program.graph.nodes}
    op = torch.ops.tokcc.cached_attention.default
    each = iter([count for node, count in flops.items() if node.target is op and "tokcc" not in node.meta])
    found = []
    for site in plan.sites:
        labels = {f"{ATTEND}@{site.layer}"}
        if site.layer in plan.sparse:
            labels |= {f"{planned.name}@{site.layer}" for planned in plan.sparse[site.layer].each}
        own = [count for node, count in flops.items() if node.meta.get("tokcc") in labels]
        own += [next(each) for group in plan.groups(site.layer) if not group.written_out]
        found.append(sum(own))
    return found


def _total_flops(program: Program, shapes: Mapping[str, Sequence[int]]) -> int:
    bindings = program.bindings(shapes)
    return sum(node_flops(node, bindings) for node in computed(program, bindings) if node.op == "call_function")
