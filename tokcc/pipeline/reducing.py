"""The middle of the pipeline: from a clean program and a policy to a reduced program."""

from __future__ import annotations

from dataclasses import dataclass

from tokcc.analysis.cache_sites import CacheSite, cache_sites
from tokcc.analysis.projected import projected_sites
from tokcc.analysis.sites import Sites, find_sites
from tokcc.analysis.state_sites import StateSite, state_sites
from tokcc.capture.fold_constants import FoldConstants
from tokcc.config import LoadedPolicy
from tokcc.errors import PlanError
from tokcc.ir.own_sizes import with_own_sizes
from tokcc.ir.program import Program
from tokcc.ir.verify import verify
from tokcc.passes.cache.head import LastTokenHead
from tokcc.passes.cache.plan import CachePlan
from tokcc.passes.cache.planning import make_cache_plan
from tokcc.passes.cache.rebuild import RebuildCaches
from tokcc.passes.cache.right_padding import RightPadding
from tokcc.passes.inputs import EngineInput, added_inputs
from tokcc.passes.plan import Plan, make_plan
from tokcc.passes.propagate import Propagate
from tokcc.passes.scan.filter import FilterScans
from tokcc.passes.scan.plan import ScanPlan
from tokcc.passes.scan.planning import make_scan_plan
from tokcc.passes.slice_demand import SliceDemand
from tokcc.pipeline.stages import Stages

__all__ = ["Reduced", "reduce_program"]


@dataclass(frozen=True)
class Reduced:
    """A reduced program and how it came about.

    Attributes:
        original: The clean program without reductions.
        program: The reduced program before demand slicing: the eager oracle.
        sliced: What is lowered.
        plan: The plan; None for a model without attention that is compiled as it is.
        sites: The same.
        caches: What happens to the caches of a decoder; then there are no sites, and `original` is the decoder with its
            whole cache, in the same form.
        scans: What happens to the scans of a state-space decoder; then there are no sites either.
    """

    original: Program
    program: Program
    sliced: Program
    plan: Plan | None
    sites: Sites | None
    caches: CachePlan | None = None
    scans: ScanPlan | None = None

    @property
    def declared_inputs(self) -> tuple[EngineInput, ...]:
        """What the pieces read besides the model's own inputs."""
        plan = self.plan or self.caches
        return () if plan is None else plan.inputs

    @property
    def added_inputs(self) -> dict[str, EngineInput]:
        """What the engine reads besides the model's own inputs, by name."""
        return added_inputs(self.sliced, self.declared_inputs)


def reduce_program(program: Program, policy: LoadedPolicy, stages: Stages, *, slicing: bool = True) -> Reduced:
    """Annotate, plan, insert and propagate, slice.

    Args:
        program: A clean program.
        policy: The policy.
        stages: Progress.
        slicing: Apply demand slicing.
    """
    with stages.stage("annotate"):
        program = with_own_sizes(program)
        caches = cache_sites(program)
        scans = () if caches else state_sites(program)
        _refuse_other_parts(policy, "decoder" if caches or scans else "encoder")
        sites = None if caches or scans else _sites(program, policy)
    if caches:
        return _reduce_decoder(program, policy, caches, stages)
    if scans:
        return _reduce_scans(program, policy, scans, stages)
    if sites is None:
        return Reduced(program, program, program, None, None)
    with stages.stage("plan"):
        plan = make_plan(policy, sites)
    with stages.stage("insert and propagate"):
        reduced = Propagate(plan).run(program).program
        verify(reduced, "Propagate")
    sliced = reduced
    if slicing:
        with stages.stage("slice"):
            result = SliceDemand(sites).run(reduced)
            sliced = result.program
            verify(sliced, "SliceDemand")
            # Folding edits in place, and slicing that finds nothing hands back the oracle's own graph.
            sliced = FoldConstants().run(sliced.copied()).program
            verify(sliced, "FoldConstants")
    return Reduced(program, reduced, sliced, plan, sites)


def _refuse_other_parts(policy: LoadedPolicy, kind: str) -> None:
    for number, step in enumerate(policy.policy.steps):
        if step.at.part not in (None, kind):
            raise PlanError(
                f"the step is for the {step.at.part} of a model, and this is the {kind}",
                policy=policy.where(("steps", number, "at", "part")),
                help=f"use a method for {kind}s (`tokcc presets` lists them): only models that read images or sounds "
                "beside text have both",
            )


def _sites(program: Program, policy: LoadedPolicy) -> Sites | None:
    """Find the sites; a model without attention has none, and can be compiled as it is.

    Raises:
        PlanError: Steps behind the projector and steps before it.
    """
    behind = [step.at.site == "projector_output" for step in policy.policy.steps]
    if any(behind) and not all(behind):
        number = behind.index(False)
        raise PlanError(
            "a step behind the projector cannot go with one in the tower",
            policy=policy.where(("steps", number)),
            found=f"the other is {policy.where(('steps', behind.index(True)))}",
            help="use one of the two: what the projector gives has tokens of its own",
        )
    if any(behind):
        return projected_sites(program)
    try:
        return find_sites(program)
    except PlanError:
        if policy.policy.steps or policy.policy.outputs:
            raise
        return None


def _reduce_decoder(program: Program, policy: LoadedPolicy, caches: tuple[CacheSite, ...], stages: Stages) -> Reduced:
    with stages.stage("plan"):
        plan = make_cache_plan(policy, program, caches)
    with stages.stage("insert and propagate"):
        full = RebuildCaches(plan.without_changes()).run(program).program
        verify(full, "RebuildCaches")
        reduced = full
        if plan.changes:
            reduced = RebuildCaches(plan).run(program).program
            verify(reduced, "RebuildCaches")
        for position in plan.last_token_outputs:
            reduced = LastTokenHead(position).run(reduced).program
            verify(reduced, "LastTokenHead")
        if plan.fixed and plan.attention_mask is not None:
            reduced = RightPadding(plan.attention_mask).run(reduced).program
            verify(reduced, "RightPadding")
    return Reduced(full, reduced, reduced, None, None, plan)


def _reduce_scans(program: Program, policy: LoadedPolicy, scans: tuple[StateSite, ...], stages: Stages) -> Reduced:
    with stages.stage("plan"):
        plan = make_scan_plan(policy, program, scans)
    with stages.stage("insert and propagate"):
        reduced = FilterScans(plan).run(program).program
        verify(reduced, "FilterScans")
        for position in plan.last_token_outputs:
            reduced = LastTokenHead(position).run(reduced).program
            verify(reduced, "LastTokenHead")
    return Reduced(program, reduced, reduced, None, None, scans=plan)
