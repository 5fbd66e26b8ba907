"""The tensorrt backend in a compile: the graph within the builder's rules, held against the oracle, and its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
import torch

from tokcc.backends.calls import decoder_calls, lengths_past
from tokcc.backends.feeds import Feeds
from tokcc.backends.float32 import open_in_float32
from tokcc.backends.onnx import build_onnx, save_onnx
from tokcc.backends.parity import Tolerance, oracle
from tokcc.backends.tensorrt.cache_lengths import MASK, tokens_name
from tokcc.backends.tensorrt.folder import Described, write_folder
from tokcc.backends.tensorrt.graph import Lowered, lower, target_for
from tokcc.backends.tensorrt.options import TensorrtOptions
from tokcc.backends.tensorrt.plugins import PluginNodes
from tokcc.backends.tensorrt.profiles import KINDS, Profile, make_profiles
from tokcc.backends.tensorrt.server import Tensor
from tokcc.capture.fold_constants import FoldConstants
from tokcc.config import LoadedPolicy
from tokcc.errors import PlanError
from tokcc.ir.program import Program
from tokcc.ir.widened import widened
from tokcc.pipeline.packaging import Packaged
from tokcc.pipeline.reducing import Reduced
from tokcc.pipeline.settling import check_engine
from tokcc.pipeline.stages import Stages
from tokcc.plugins_trt import write_plugins

__all__ = ["FOLDER", "calls_within", "lower_tensorrt", "write_graph", "write_tensorrt"]

_ROWS = 3
_SHORTEST = 4
"""Tracing assumes so much of a text."""
FOLDER = "tensorrt"
"""Where the folder is in the bundle."""


def lower_tensorrt(
    reduced: Reduced, policy: LoadedPolicy, example: Feeds, options: TensorrtOptions, opset: int
) -> Lowered:
    """Lower a reduced program for the shapes that its engine is made for.

    Raises:
        PlanError: A dynamic axis has no shapes.
        LoweringError: An operation has no form.
    """
    shapes = {name: tuple(value.shape) for name, value in example.items()}
    return lower(reduced.sliced, make_profiles(reduced.sliced, shapes, options.shapes), policy, opset=opset)


def write_tensorrt(
    folder: Path,
    name: str,
    reduced: Reduced,
    policy: LoadedPolicy,
    lowered: Lowered,
    options: TensorrtOptions,
    metadata: Mapping[str, str],
    feeds: Sequence[Feeds],
    expected: Sequence[Sequence[torch.Tensor]],
    tolerance: Tolerance,
    seed: int,
    stages: Stages,
) -> Packaged:
    """Write the folder that TensorRT users build from, and check its graph.

    Args:
        folder: Where.
        name: Of the model in the server's repository.
        reduced: The programs.
        policy: The policy.
        lowered: The graph, which the builder takes.
        options: How.
        metadata: Written into the model.
        feeds: What to check with, the example first.
        expected: The oracle's outputs for each.
        tolerance: What counts as equal.
        seed: Of random inputs.
        stages: Progress.

    Raises:
        PlanError: The graph cannot be checked with the engine's shapes.
        LoweringError: The builder does not take the graph with plugins.
        ParityError: The graph is not equal to the oracle.
    """
    given, profiles = feeds, lowered.profiles
    reference, sliced = reduced.program, widened(reduced.sliced)
    rounded = sliced is not reduced.sliced
    if rounded:
        with stages.stage("run the reference in float32"):
            # What the graph has computed beforehand, it has rounded: so does the reference.
            reference = widened(FoldConstants().run(reduced.program.copied()).program)
            feeds = [_in_float32(feed) for feed in feeds]
            expected = [oracle(reference)(feed) for feed in feeds]
    if reduced.caches is not None:
        with stages.stage("run the reference at the engine's shapes"):
            feeds, expected = calls_within(reduced, reference, profiles, feeds, expected, seed)

    def build(program: Program, path: Path) -> None:
        save_onnx(build_onnx(program, opset=lowered.opset, target=target_for(program, profiles)), path)

    with stages.stage("write the TensorRT graph"):
        used = write_graph(folder, name, reduced, policy, lowered, metadata, options)
    with stages.stage("parity of the tensorrt graph", len(feeds)) as advance:
        path = folder / "model.onnx"
        found = check_engine(
            "tensorrt", reference, sliced, path, feeds, expected, build, tolerance, advance, open_in_float32
        )
    remarks = ["tensorrt: the graph was checked in ONNX Runtime and by TensorRT's rules; no engine was built or run"]
    if rounded:
        remarks.append("tensorrt: ONNX Runtime has no bfloat16: graph and reference were compared in float32")
    if used:
        remarks.append(f"tensorrt: plugins for {', '.join(used)}; the graph with them runs nowhere but in TensorRT")
    elif options.plugins:
        remarks.append("tensorrt: nothing in the graph has a plugin")
    remarks += [] if found.note is None else [f"tensorrt: {found.note}"]
    details: dict[str, str | int | float | bool] = {"opset": lowered.opset, "profiles": len(profiles)}
    return Packaged(path, found.checks, details, found.expected, remarks, None if feeds is given else feeds)


def _in_float32(feed: Feeds) -> Feeds:
    return {name: value.float() if value.dtype == torch.bfloat16 else value for name, value in feed.items()}


def calls_within(
    reduced: Reduced,
    reference: Program,
    profiles: Sequence[Profile],
    feeds: Sequence[Feeds],
    expected: Sequence[Sequence[torch.Tensor]],
    seed: int,
) -> tuple[Sequence[Feeds], Sequence[Sequence[torch.Tensor]]]:
    """Return a decoder's calls that its engine is made for: those that there are, else further ones.

    Args:
        reduced: The programs.
        reference: The reduced program, or the same in another type.
        profiles: What the engine is made for.
        feeds: The calls that there are.
        expected: The reference's outputs for each.
        seed: Of further calls.

    Raises:
        PlanError: No call that begins with an empty cache gets there.
    """
    kept = _covered(profiles, feeds, expected)
    if kept[0]:
        return kept
    plan = reduced.caches
    assert plan is not None
    least, usual, most = (profiles[0].at(kind) for kind in KINDS)
    tokens = tokens_name(usual)
    assert tokens is not None
    # The oracle reads any text; what is compared are the calls of the engine's shapes.
    text = usual[MASK][1] - 3
    first = max(usual[tokens][1] if most[tokens][1] > 1 else text, _SHORTEST)
    for lengths in (lengths_past(plan.waits, plan.longest), (first, 1, 1, 1)):
        further = decoder_calls(
            reference,
            feeds[0],
            oracle(reference),
            seed=seed,
            lengths=lengths,
            added=reduced.declared_inputs,
            prompt=plan.prompt,
            rows=max(least[tokens][0], min(_ROWS, most[tokens][0])),
        )
        kept = _covered(profiles, *further)
        if kept[0]:
            return kept
    raise PlanError(
        "the TensorRT graph cannot be checked: no call of a text from its beginning has the engine's shapes",
        needed="shapes that a first call has (no cache), or single tokens behind a text of the mask's usual length",
        found=", ".join(f"{n} {'x'.join(map(str, shape))}" for n, shape in usual.items() if "past" not in n),
        help="leave the shapes of caches out: they follow from `input_ids` and `attention_mask`",
    )


def _covered(
    profiles: Sequence[Profile], feeds: Sequence[Feeds], expected: Sequence[Sequence[torch.Tensor]]
) -> tuple[Sequence[Feeds], Sequence[Sequence[torch.Tensor]]]:
    """Return the calls whose shapes an engine takes; all of them where it takes all."""
    shapes = ({name: tuple(value.shape) for name, value in feed.items()} for feed in feeds)
    inside = [any(profile.covers(each) for profile in profiles) for each in shapes]
    if all(inside):
        return feeds, expected
    return tuple([each for each, within in zip(listed, inside, strict=True) if within] for listed in (feeds, expected))  # type: ignore[return-value]  # two lists


def write_graph(
    folder: Path,
    name: str,
    reduced: Reduced,
    policy: LoadedPolicy,
    lowered: Lowered,
    metadata: Mapping[str, str] | None = None,
    options: TensorrtOptions | None = None,
) -> tuple[str, ...]:
    """Write the folder, unchecked. Arguments and errors as for :func:`write_tensorrt`.

    Returns:
        The plugins that it has.
    """
    model = lowered.model
    model.metadata_props.update(metadata or {})
    folder.mkdir(parents=True)
    save_onnx(model, folder / "model.onnx")
    inputs, outputs = _tensors(model.graph.inputs), _tensors(model.graph.outputs)
    dtype = next((each.dtype for each in (*outputs, *inputs) if "float" in each.dtype), "float32")
    used = _write_plugins(folder, reduced, policy, lowered, options or TensorrtOptions())
    write_folder(folder, Described(policy.policy.name, inputs, outputs, lowered.profiles, dtype, used, name))
    return used


def _write_plugins(
    folder: Path, reduced: Reduced, policy: LoadedPolicy, lowered: Lowered, options: TensorrtOptions
) -> tuple[str, ...]:
    """Write the graph with plugins, and the plugins, where there are any."""
    if not options.plugins:
        return ()
    plugins = PluginNodes(options.plugins, options.compute_capability)
    other = lower(reduced.sliced, lowered.profiles, policy, opset=lowered.opset, plugins=plugins).legal(policy)
    if not plugins.uses:
        return ()
    save_onnx(other.model, folder / "model_plugins.onnx")
    write_plugins(plugins.uses, folder / "plugins", sms=options.compute_capability)
    return tuple(sorted({use.op for use in plugins.uses}))


def _tensors(values: Sequence[ir.Value]) -> list[Tensor]:
    found = []
    for value in values:
        assert value.dtype is not None
        sizes = () if value.shape is None else value.shape.dims
        shape = tuple(size if isinstance(size, int) else str(size) for size in sizes)
        found.append(Tensor(value.name or "", value.dtype.numpy().name, shape))
    return found
