"""The middle of the pipeline: from a clean program and a policy to a reduced program."""

from __future__ import annotations

from dataclasses import dataclass

from tokcc.analysis.sites import Sites, find_sites
from tokcc.capture.fold_constants import FoldConstants
from tokcc.config import LoadedPolicy
from tokcc.errors import PlanError
from tokcc.ir.program import Program
from tokcc.ir.verify import verify
from tokcc.passes.plan import Plan, make_plan
from tokcc.passes.propagate import Propagate
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
    """

    original: Program
    program: Program
    sliced: Program
    plan: Plan | None
    sites: Sites | None


def reduce_program(program: Program, policy: LoadedPolicy, stages: Stages, *, slicing: bool = True) -> Reduced:
    """Annotate, plan, insert and propagate, slice.

    Args:
        program: A clean program.
        policy: The policy.
        stages: Progress.
        slicing: Apply demand slicing.
    """
    with stages.stage("annotate"):
        try:
            sites: Sites | None = find_sites(program)
        except PlanError:
            if policy.policy.steps or policy.policy.outputs:
                raise
            sites = None
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
