"""Helpers for tests of rules, pieces and presets: trace, reduce, run."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tokcc.analysis.sites import find_sites
from tokcc.analysis.walk import eager_inputs
from tokcc.capture.export import clean
from tokcc.capture.functional import functional
from tokcc.config import load_policy
from tokcc.ir.builder import EagerBuilder
from tokcc.ir.own_sizes import with_own_sizes
from tokcc.ir.program import Program
from tokcc.ir.verify import verify
from tokcc.passes.methods import library
from tokcc.passes.plan import Plan, make_plan
from tokcc.passes.propagate import Propagate, reduce_walk

__all__ = ["plan_for", "reduce_program", "run_eager", "run_program", "trace"]


def trace(module: nn.Module, inputs: Mapping[str, Tensor], dynamic_shapes: Any = None) -> Program:
    """Export a module with keyword inputs, decompose and clean it."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        exported = torch.export.export(module.eval(), (), dict(inputs), dynamic_shapes=dynamic_shapes, strict=False)
        return clean(Program.from_exported(functional(exported)))


def plan_for(program: Program, policy: str | Path | Mapping[str, Any]) -> Plan:
    """Plan a policy (a dict, a preset's name or a file) on a program."""
    return make_plan(load_policy(policy, presets=library()), find_sites(program))


def reduce_program(program: Program, policy: str | Path | Mapping[str, Any]) -> tuple[Program, Plan]:
    """Apply a policy; the plan's ``made`` lists the token spaces in order."""
    program = with_own_sizes(program)
    plan = plan_for(program, policy)
    reduced = Propagate(plan).run(program).program
    verify(reduced, "Propagate")
    return reduced, plan


def run_program(program: Program, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Run a program's graph on real tensors."""
    with torch.no_grad():
        return list(pytree.tree_leaves(program.to_exported().module(check_guards=False)(**inputs)))


def run_eager(
    program: Program, policy: str | Path | Mapping[str, Any], inputs: Mapping[str, Tensor]
) -> tuple[list[Tensor], Plan]:
    """Run the same reductions eagerly, without building a graph: the rules' own reference.

    Returns:
        The outputs, and the plan, whose ``made`` spaces hold real tensors (``index``, ``weight``, ``valid``).
    """
    plan = plan_for(program, policy)
    with torch.no_grad():
        _, outputs = reduce_walk(program, plan, EagerBuilder(inputs), eager_inputs(program, inputs))
    return [getattr(value, "handle", value) for value in outputs.values], plan
