"""``tokcc gallery``: what each method keeps of a photo, from one capture of the model and without any engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from tokcc.analysis.sites import Sites, find_sites
from tokcc.capture.loaded import Loaded
from tokcc.config import LoadedPolicy, load_policy
from tokcc.errors import PlanError, PolicyError, TokccError, UsageError
from tokcc.ir.program import Program
from tokcc.passes.methods import library
from tokcc.passes.plan import make_plan
from tokcc.pipeline.measuring import kept_tokens, tensor_facts
from tokcc.pipeline.request import ModelRequest
from tokcc.pipeline.stages import Stages
from tokcc.progress import Progress, silent
from tokcc.report.batches import InputSpec
from tokcc.report.distances import Array
from tokcc.report.gallery import Gallery, Picture, Refusal
from tokcc.report.kept import KeptTokens
from tokcc.report.processor import ImagePlan, plan_images, read_picture

__all__ = ["gallery"]


def gallery(
    model: Any,
    image: str | Path,
    *,
    presets: Sequence[str] = (),
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    inputs: Sequence[str] = (),
    dynamic: Sequence[str] = (),
    task: str | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Gallery:
    """Apply policies to a photo and follow its tokens, in the eager oracle.

    Args:
        model: An image encoder.
        image: A photo.
        presets: Names of presets, or policy files; by default the whole library.
        example_inputs: As for ``compile``, like all that follow.
        dynamic_shapes: As for ``torch.export.export``.
        inputs: ``NAME=DTYPE[dims]``.
        dynamic: ``NAME:AXIS=MIN..MAX``.
        task: Task of a Hugging Face model.
        allow_pickle: Load pickled modules.
        progress: Where to show progress.

    Raises:
        UsageError: The photo cannot be read, or the model does not take one photo.
        PolicyError: A preset is unknown, a policy file is wrong.
        PlanError: None of the policies fits the model.
        TokccError: The model cannot be loaded or captured.
    """
    path = _picture(image)
    wanted = {name: _policy(name) for name in presets or library()}
    request = ModelRequest(
        model,
        example_inputs=example_inputs,
        dynamic_shapes=dynamic_shapes,
        inputs=inputs,
        dynamic=dynamic,
        task=task,
        allow_pickle=allow_pickle,
    )
    if request.multimodal:
        raise UsageError(
            "the gallery is for one image encoder, and this model is compiled in parts",
            help="give the encoder by itself: a `FILE.py:factory` that returns it",
        )
    stages = Stages(progress or silent())
    loaded, program = request.open(stages)
    plan, notes = plan_images([_spec(program, node) for node in program.user_inputs], loaded.preprocessor)
    pixels = plan.pixels(path)
    feeds = _feeds(program, plan, pixels)
    with stages.stage("annotate"):
        sites = find_sites(program)
    pictures: list[Picture] = []
    refusals: list[Refusal] = []
    with stages.stage("apply policies", len(wanted)) as advance:
        for given, policy in wanted.items():
            preset = library().get(given)
            name = given if preset is not None or isinstance(policy, PolicyError) else policy.policy.name
            try:
                if isinstance(policy, PolicyError):
                    raise policy
                kept = _follow(program, sites, policy, feeds, pixels)
            except TokccError as error:
                refusals.append(Refusal.of(name, error))
            else:
                pictures.append(Picture(name, given if preset is None else preset.title, kept))
            advance(1)
    if not pictures:
        raise PlanError(
            "no method fits this model" if not presets else f"{', '.join(presets)} cannot be shown on this model",
            found="; ".join(dict.fromkeys(item.why for item in refusals)),
            help="`tokcc inspect MODEL` says what fits",
        )
    return Gallery(_named(loaded), path.name, pixels, tuple(pictures), tuple(refusals), tuple(notes))


def _picture(image: str | Path) -> Path:
    """Check the photo first: loading a model takes longer."""
    path = Path(image)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing there"
        raise UsageError(f"there is no image `{path}`", needed="one picture", found=found, help="check the path")
    read_picture(path)
    return path


def _policy(name: str) -> LoadedPolicy | PolicyError:
    """Return a policy, or why a preset of the library cannot be used by its bare name.

    Raises:
        PolicyError: There is no such preset, or a file of a user is wrong.
    """
    try:
        return load_policy(name, presets=library())
    except PolicyError as error:
        if name not in library():
            raise
        return error


def _spec(program: Program, node: fx.Node) -> InputSpec:
    """Describe an input for the image processor, which makes float32 where the model takes any float."""
    fake = node.meta["val"]
    facts = tensor_facts(program, program.public_name(node), fake)
    return InputSpec(facts.name, "float32" if fake.is_floating_point() else facts.dtype, facts.shape)


def _feeds(program: Program, plan: ImagePlan, pixels: Array) -> dict[str, torch.Tensor]:
    """Return the photo as the model's input; where the batch is fixed, as often as that."""
    (node,) = program.user_inputs
    batch = plan.spec.shape[0]
    value = torch.from_numpy(plan.normalised(pixels)).to(node.meta["val"].dtype)
    return {plan.spec.name: torch.stack([value] * (batch if isinstance(batch, int) else 1))}


def _follow(
    program: Program, sites: Sites, policy: LoadedPolicy, feeds: dict[str, torch.Tensor], pixels: Array
) -> tuple[KeptTokens, ...]:
    """Return what a policy does to the photo's patches.

    Raises:
        TokccError: It does not fit the model, needs more than a photo, or does nothing.
    """
    plan = make_plan(policy, sites, advise=False)
    if plan.inputs:
        raise PlanError(
            "it reads inputs that a photo does not have: " + ", ".join(f"`{spec.name}`" for spec in plan.inputs),
            needed="; ".join(f"{spec.name}: {spec.doc}" for spec in plan.inputs),
            help="compile it, and feed the engine these",
        )
    if plan.sparse:
        raise PlanError(
            "it removes no tokens: they read less of each other",
            needed="a method that prunes or merges",
            help="compile it: the report says what it costs and gains",
        )
    kept = tuple(kept_tokens(program, plan, feeds, pixels.shape[:2]))
    if any(stage.grid is None for stage in kept):
        raise PlanError(
            "the tokens are no grid of square patches",
            found=f"{sites.tokens} tokens of a picture of {pixels.shape[0]} x {pixels.shape[1]} pixels",
        )
    if not kept or (kept[-1].assign is None and kept[-1].alive(0).all()):
        raise PlanError("with its defaults it removes nothing from this model", help="give it a smaller budget")
    return kept


def _named(loaded: Loaded) -> str:
    """Return a model's name without folders."""
    return Path(loaded.source).name
