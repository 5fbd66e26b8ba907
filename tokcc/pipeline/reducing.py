"""The middle of the pipeline: from a clean program and a policy to a reduced program."""

from __future__ import annotations

from dataclasses import dataclass

from tokcc.analysis.cache_sites import CacheSite, cache_sites
from tokcc.analysis.sites import Sites, find_sites
from tokcc.capture.fold_constants import FoldConstants
from tokcc.config import LoadedPolicy
from tokcc.errors import PlanError
from tokcc.ir.program import Program
from tokcc.ir.verify import verify
from tokcc.passes.cache.head import LastTokenHead
from tokcc.passes.cache.plan import CachePlan
from tokcc.passes.cache.planning import make_cache_plan
from tokcc.passes.cache.rebuild import RebuildCaches
from tokcc.passes.cache.right_padding import RightPadding
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
        caches: What happens to the caches of a decoder; then there are no sites, and `original` is the decoder with its
            whole cache, in the same form.
    """

    original: Program
    program: Program
    sliced: Program
    plan: Plan | None
    sites: Sites | None
    caches: CachePlan | None = None


def reduce_program(program: Program, policy: LoadedPolicy, stages: Stages, *, slicing: bool = True) -> Reduced:
    """Annotate, plan, insert and propagate, slice.

    Args:
        program: A clean program.
        policy: The policy.
        stages: Progress.
        slicing: Apply demand slicing.
    """
    with stages.stage("annotate"):
        caches = cache_sites(program)
        sites = None if caches else _sites(program, policy)
    if caches:
        return _reduce_decoder(program, policy, caches, stages)
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


def _sites(program: Program, policy: LoadedPolicy) -> Sites | None:
    """Find the sites; a model without attention has none, and can be compiled as it is."""
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
