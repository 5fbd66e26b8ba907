"""The tensorrt backend in a compile: the graph within the builder's rules, held against the oracle, and its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
import torch

from tokcc.backends.calls import decoder_calls, lengths_past
from tokcc.backends.feeds import Feeds
from tokcc.backends.onnx import build_onnx, save_onnx
from tokcc.backends.parity import Tolerance, oracle
from tokcc.backends.tensorrt.folder import Described, write_folder
from tokcc.backends.tensorrt.graph import build_tensorrt, target_for
from tokcc.backends.tensorrt.options import TensorrtOptions
from tokcc.backends.tensorrt.plugins import PluginNodes
from tokcc.backends.tensorrt.profiles import KINDS, Profile, make_profiles
from tokcc.backends.tensorrt.server import Tensor
from tokcc.config import LoadedPolicy
from tokcc.errors import PlanError
from tokcc.ir.program import Program
from tokcc.pipeline.packaging import Packaged
from tokcc.pipeline.reducing import Reduced
from tokcc.pipeline.settling import check_engine
from tokcc.pipeline.stages import Stages
from tokcc.plugins_trt import write_plugins

__all__ = ["FOLDER", "engine_profiles", "write_graph", "write_tensorrt"]

TOKENS, EMBEDDED = "input_ids", "inputs_embeds"
_ROWS = 3
_SHORTEST = 4
"""Tracing assumes so much of a text."""
FOLDER = "tensorrt"
"""Where the folder is in the bundle."""


def engine_profiles(reduced: Reduced, example: Feeds, options: TensorrtOptions) -> tuple[Profile, ...]:
    """Return the shapes that the engine is made for.

    Raises:
        PlanError: A dynamic axis has none.
    """
    shapes = {name: tuple(value.shape) for name, value in example.items()}
    return make_profiles(reduced.sliced, shapes, options.shapes)


def write_tensorrt(
    folder: Path,
    reduced: Reduced,
    policy: LoadedPolicy,
    options: TensorrtOptions,
    metadata: Mapping[str, str],
    feeds: Sequence[Feeds],
    expected: Sequence[Sequence[torch.Tensor]],
    tolerance: Tolerance,
    opset: int,
    seed: int,
    stages: Stages,
) -> Packaged:
    """Write the folder that TensorRT users build from, and check its graph.

    Args:
        folder: Where.
        reduced: The programs.
        policy: The policy.
        options: How.
        metadata: Written into the model.
        feeds: What to check with, the example first.
        expected: The oracle's outputs for each.
        tolerance: What counts as equal.
        opset: Version of the standard domain.
        seed: Of random inputs.
        stages: Progress.

    Raises:
        PlanError: Shapes that are missing or do not fit.
        LoweringError: An operation, type or size that TensorRT does not take.
        ParityError: The graph is not equal to the oracle.
    """
    path = folder / "model.onnx"

    profiles = engine_profiles(reduced, feeds[0], options)
    given = feeds
    if reduced.caches is not None:
        with stages.stage("run the reference at the engine's shapes"):
            feeds, expected = calls_within(reduced, profiles, feeds, expected, seed)

    def build(program: Program, path: Path) -> None:
        save_onnx(build_onnx(program, opset=opset, target=target_for(program, profiles)), path)

    with stages.stage("lower for TensorRT"):
        used = write_graph(folder, reduced, policy, profiles, opset=opset, metadata=metadata, options=options)
    with stages.stage("parity of the tensorrt graph", len(feeds)) as advance:
        found = check_engine(
            "tensorrt", reduced.program, reduced.sliced, path, feeds, expected, build, tolerance, advance
        )
    remarks = ["tensorrt: the graph was checked in ONNX Runtime and by TensorRT's rules; no engine was built or run"]
    if used:
        remarks.append(f"tensorrt: plugins for {', '.join(used)}; the graph with them runs nowhere but in TensorRT")
    elif options.plugins:
        remarks.append("tensorrt: nothing in the graph has a plugin")
    remarks += [] if found.note is None else [f"tensorrt: {found.note}"]
    details: dict[str, str | int | float | bool] = {"opset": opset, "profiles": len(profiles)}
    return Packaged(path, found.checks, details, found.expected, remarks, None if feeds is given else feeds)


def calls_within(
    reduced: Reduced,
    profiles: Sequence[Profile],
    feeds: Sequence[Feeds],
    expected: Sequence[Sequence[torch.Tensor]],
    seed: int,
) -> tuple[Sequence[Feeds], Sequence[Sequence[torch.Tensor]]]:
    """Return a decoder's calls that its engine is made for: those that there are, else further ones.

    Raises:
        PlanError: No call that begins with an empty cache gets there.
    """
    kept = _covered(profiles, feeds, expected)
    if kept[0]:
        return kept
    plan = reduced.caches
    assert plan is not None
    least, usual, most = (profiles[0].at(kind) for kind in KINDS)
    tokens = TOKENS if TOKENS in usual else EMBEDDED
    # The oracle reads any text; what is compared are the calls of the engine's shapes.
    text = usual["attention_mask"][1] - 3
    first = max(usual[tokens][1] if most[tokens][1] > 1 else text, _SHORTEST)
    for lengths in (lengths_past(plan.waits, plan.longest), (first, 1, 1, 1)):
        further = decoder_calls(
            reduced.program,
            feeds[0],
            oracle(reduced.program),
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
    reduced: Reduced,
    policy: LoadedPolicy,
    profiles: Sequence[Profile],
    *,
    opset: int = 18,
    metadata: Mapping[str, str] | None = None,
    options: TensorrtOptions | None = None,
) -> tuple[str, ...]:
    """Write the folder, unchecked. Arguments and errors as for :func:`write_tensorrt`.

    Returns:
        The plugins that it has.
    """
    model = build_tensorrt(reduced.sliced, profiles, policy, opset=opset, metadata=metadata)
    folder.mkdir(parents=True)
    save_onnx(model, folder / "model.onnx")
    inputs, outputs = _tensors(model.graph.inputs), _tensors(model.graph.outputs)
    dtype = next((each.dtype for each in (*outputs, *inputs) if "float" in each.dtype), "float32")
    used = _write_plugins(folder, reduced, policy, profiles, opset, options or TensorrtOptions())
    name = "model" if folder.name == FOLDER else folder.name  # parts go into one repository
    write_folder(folder, Described(policy.policy.name, inputs, outputs, profiles, dtype, used, name))
    return used


def _write_plugins(
    folder: Path,
    reduced: Reduced,
    policy: LoadedPolicy,
    profiles: Sequence[Profile],
    opset: int,
    options: TensorrtOptions,
) -> tuple[str, ...]:
    """Write the graph with plugins, and the plugins, where there are any."""
    if not options.plugins:
        return ()
    plugins = PluginNodes(options.plugins, options.compute_capability)
    model = build_tensorrt(reduced.sliced, profiles, policy, opset=opset, plugins=plugins)
    if not plugins.uses:
        return ()
    save_onnx(model, folder / "model_plugins.onnx")
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
