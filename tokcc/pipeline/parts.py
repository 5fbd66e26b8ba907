"""Models that are compiled in parts: an encoder, an embedding, a decoder, and what ties them together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tokcc.backends.bundle import Manifest
from tokcc.backends.manifest import FieldEntry, Media, PartEntry
from tokcc.backends.runtime_files import edit_fields, save_processor_files
from tokcc.capture.export import capture
from tokcc.capture.vlm.family import FieldEdit, Placeholders
from tokcc.capture.vlm.load import DECODER, EMBED, LoadedParts
from tokcc.config import LoadedPolicy, Policy, Step
from tokcc.errors import PlanError, UsageError
from tokcc.passes.prompt.unmerge_plan import TOKEN_ASSIGN
from tokcc.pipeline.engines import Options, Place, write_engines
from tokcc.pipeline.stages import Stages

__all__ = ["FOLDER", "policy_of", "write_parts"]

FOLDER = "parts"
"""Where reports, references and applied policies lie, by part."""
_ENGINES = "onnx"
_FILES = {DECODER: "decoder_model_merged"}
"""Names of files that are not those of their parts: where transformers.js looks."""
_LINE_END = "line_end.npy"
_DECODER_NODES = ("evict_kv", "store_kv", "bias_attention", "unmerge", "filter_scan")


def write_parts(root: Path, loaded: LoadedParts, policy: LoadedPolicy, options: Options, stages: Stages) -> Manifest:
    """Compile every part under its share of the policy.

    Args:
        root: The bundle, while it is written.
        loaded: The model.
        policy: The policy: steps that name no part belong to the decoder where they are about caches, else to the
            encoder.
        options: How; calibration data by part.
        stages: Progress.

    Raises:
        TokccError: One of its kinds, by stage.
    """
    if options.gates:
        raise UsageError("gates are for one engine, and this model has three", help="measure the parts by themselves")
    data = _data_by_part(options.calibration, loaded)
    remarks = save_processor_files(loaded.source, root)
    made: dict[str, Manifest] = {}
    unnamed = set(options.tensorrt.shapes)
    for name, part in loaded.parts():
        place = Place(root, root / FOLDER / name, f"{_ENGINES}/{_FILES.get(name, name)}", name)
        place.folder.mkdir(parents=True)
        place.engine("").parent.mkdir(exist_ok=True)
        with stages.stage(f"capture {name}"):
            program = capture(part)
        # A table of embeddings has nothing to reduce, and so nothing to compare.
        inputs = {program.public_name(node) for node in program.user_inputs}
        shapes = {known: three for known, three in options.tensorrt.shapes.items() if known in inputs}
        unnamed -= shapes.keys()
        own = replace(
            options,
            calibration=data.get(name),
            calibrate=options.calibrate and name != EMBED,
            tensorrt=replace(options.tensorrt, shapes=shapes),
        )
        made[name] = write_engines(place, part, program, policy_of(policy, name), own, stages)
    if unnamed:
        raise UsageError(
            f"shapes are given for `{min(unnamed)}`, which is no input of any part",
            help="`tokcc inspect` shows the parts and their inputs",
        )
    inputs = {contract.name for contract in made[DECODER].inputs}
    media = _media(loaded, made[loaded.family.medium.part], unmerged=TOKEN_ASSIGN.name in inputs)
    masks = [
        f"{name}_mask" for name, given in policy.policy.segments.items() if given.get("input_ids") == loaded.token_id
    ]
    media = media.model_copy(update={"masks": tuple(name for name in masks if name in inputs)})
    if loaded.line_end is not None:
        np.save(root / _LINE_END, loaded.line_end.detach().float().numpy())
        media = media.model_copy(update={"line_end": _LINE_END})
    if (root / "config.json").is_file():  # a model from Python brings no files, and leaves none to edit
        edit_fields(root, media.edits)
    first = made[DECODER]
    entries = {
        name: PartEntry(
            folder=f"{FOLDER}/{name}",
            inputs=manifest.inputs,
            outputs=manifest.outputs,
            ranges=manifest.ranges,
            backends=manifest.backends,
        )
        for name, manifest in made.items()
    }
    return Manifest(
        tokcc=first.tokcc,
        created=first.created,
        model=loaded.source,
        policy=policy.policy.name,
        parts=entries,
        media=media,
        notes=(*loaded.family.notes, *remarks),
        versions=first.versions,
    )


def policy_of(policy: LoadedPolicy, part: str) -> LoadedPolicy:
    """Return a part's share of a policy."""
    if part == EMBED:
        return LoadedPolicy(Policy(name="none", steps=()), policy.origin, {})
    decoder = part == DECODER
    steps = [i for i, step in enumerate(policy.policy.steps) if (_part(step) == "decoder") == decoder]
    outputs = {}
    for name, contract in policy.policy.outputs.items():
        # What presets for encoders say of all outputs is about features, not about logits.
        everywhere = name == "*" and (not decoder or contract in ("full", "last_token"))
        if everywhere or (name != "*" and (name == "logits") == decoder):
            outputs[name] = contract
    return policy.only(steps, outputs)


def _part(step: Step) -> str:
    """Return the part that a step is for: caches, and segments and rows of a prompt, are the decoder's."""
    of_text = step.node in _DECODER_NODES or step.protect.segment is not None
    return step.at.part or ("decoder" if of_text else "encoder")


def _data_by_part(calibration: Any, loaded: LoadedParts) -> Mapping[str, Any]:
    if calibration is None:
        return {}
    names = [loaded.family.medium.part, DECODER]
    if not isinstance(calibration, Mapping) or not set(calibration) <= set(names):
        raise UsageError(
            "the calibration data does not say which part it is for",
            needed=f"a mapping with {' or '.join(names)}: data for the encoder, text for the decoder",
            help="leave it out to measure on random inputs",
        )
    return calibration


def _media(loaded: LoadedParts, encoder: Manifest, *, unmerged: bool) -> Media:
    """Say how many tokens a unit has now, and how prompts come by as many placeholders.

    Args:
        loaded: The model.
        encoder: What its encoder gives.
        unmerged: The decoder attends to merged tokens one by one.
    """
    family = loaded.family
    output = next(contract for contract in encoder.outputs if contract.name == family.medium.output)
    count = output.shape[1]
    if not isinstance(count, int):
        raise PlanError(
            "the number of tokens that an image leaves depends on the input",
            needed="one number for every image: prompts are written before the encoder runs",
            found=f"`{output.name}` {list(output.shape)}",
            help="use a budget in `tokens` or `keep`",
        )
    stock = _stock(loaded)
    changed = count != stock
    found: Placeholders = family.placeholders(loaded.config, stock, count) if changed else Placeholders()
    names = [contract.name for contract in encoder.outputs]
    index, valid = (_named(names, f"{output.name}.{what}") for what in ("token_index", "token_valid"))
    if changed and family.medium.lengths is not None:
        raise PlanError(
            "sounds are padded, and an encoder that gives fewer tokens does not say which of them are padding",
            found=f"`{output.name}` {list(output.shape)}, {stock} without the policy",
            help="use `outputs: full`, or reduce in the decoder",
        )
    if changed and family.positions == "grid" and index is None:
        raise PlanError(
            "merged tokens have no frame, row and column",
            needed="a policy that drops tokens, or gives all of them back",
            help="use `node: prune`",
        )
    assign = _named(names, f"{output.name}.{TOKEN_ASSIGN.name}") if unmerged else None
    if assign is not None and family.packing == "anyres":
        raise PlanError(
            "tiles lie side by side, and what they merge has no place there",
            needed="a family whose images are one after the other, for a decoder that attends to merged tokens",
            found=f"`{family.name}`",
            help="leave the decoder's `unmerge` step out",
        )
    if assign is not None:
        found = Placeholders(refusal=f"prompts keep all {stock}, and the decoder also takes `{assign}`")
    elif valid is not None:
        found = Placeholders(refusal="how many tokens an image keeps depends on the image")
    return Media(
        task=loaded.task,
        family=family.name,
        part=family.medium.part,
        input=family.medium.input,
        output=family.medium.output,
        index=index,
        assign=assign,
        valid=valid,
        token_id=loaded.token_id,
        unit=family.unit,
        stock_tokens=stock,
        tokens=count,
        positions=family.positions,
        packing=family.packing,
        lengths=family.medium.lengths,
        pixels=loaded.pixels,
        pinpoints=tuple((int(h), int(w)) for h, w in getattr(loaded.config, "image_grid_pinpoints", None) or ()),
        grid=loaded.grid,
        edits=_entries(found.edits),
        javascript=_entries(found.javascript),
        refusal=found.refusal,
    )


def _named(names: Sequence[str], name: str) -> str | None:
    return name if name in names else None


def _stock(loaded: LoadedParts) -> int:
    """Return the tokens of a unit as the model was made: by running its encoder once on nothing."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    assert loaded.encoder.module is not None
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        features = loaded.encoder.module(**loaded.encoder.example_kwargs)[loaded.family.medium.output]
    return int(features.shape[1])


def _entries(edits: tuple[FieldEdit, ...]) -> tuple[FieldEntry, ...]:
    return tuple(FieldEntry(file=edit.file, field=edit.field, value=edit.value) for edit in edits)
