"""``tokcc inspect``: the tree of blocks and cuts, and what each preset could do there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokcc.analysis.sites import Sites, find_sites
from tokcc.config import load_policy
from tokcc.errors import TokccError
from tokcc.ir.program import Program
from tokcc.passes.methods import library
from tokcc.passes.plan import make_plan
from tokcc.pipeline.request import ModelRequest
from tokcc.pipeline.stages import Stages
from tokcc.progress import Progress, silent

__all__ = ["Inspection", "inspect"]


@dataclass(frozen=True)
class Inspection:
    """What a model offers.

    Attributes:
        model: How it was named.
        program: The clean program.
        sites: Its sites.
    """

    model: str
    program: Program
    sites: Sites

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        sites = self.sites
        return {
            "model": self.model,
            "tokens": str(sites.tokens),
            "special_tokens": {"first": sites.prefix, "last": sites.suffix},
            "stream": sites.entry.node,
            "nodes": len(self.program.graph.nodes),
            "inputs": [self.program.public_name(n) for n in self.program.user_inputs],
            "outputs": list(self.program.output_names),
            "layers": [
                {
                    "layer": block.index,
                    "module": block.label,
                    "attention": "fused" if block.attention.fused else "written out",
                    "after_attention": block.after_attention or "-",
                    "block_output": block.block_output or "-",
                    "note": "" if block.windowed is None else block.windowed.what,
                }
                for block in sites.layers
            ],
            "encoder_output": sites.encoder_output,
            "presets": self.presets(),
        }

    def presets(self) -> list[dict[str, Any]]:
        """Return for each preset whether it can be planned on this model, and why not."""
        rows: list[dict[str, Any]] = []
        for name, preset in library().items():
            try:
                plan = make_plan(load_policy(name, presets=library()), self.sites)
            except TokccError as error:
                rows.append({"preset": name, "fits": False, "layers": "", "why": error.what})
                continue
            layers = ",".join(str(r.layer) for r in plan.reductions)
            why = preset.title if layers else f"{preset.title}: with its defaults it removes nothing from this model"
            rows.append({"preset": name, "fits": bool(layers), "layers": layers, "why": why})
        return rows


def inspect(
    model: Any,
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    inputs: Sequence[str] = (),
    dynamic: Sequence[str] = (),
    task: str | None = None,
    dtype: str | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Inspection:
    """Find the sites of a model. Arguments as for ``compile``."""
    request = ModelRequest(
        model,
        example_inputs=example_inputs,
        dynamic_shapes=dynamic_shapes,
        inputs=inputs,
        dynamic=dynamic,
        task=task,
        dtype=dtype,
        allow_pickle=allow_pickle,
    )
    stages = Stages(progress or silent())
    loaded, program = request.open(stages)
    with stages.stage("annotate"):
        sites = find_sites(program)
    return Inspection(loaded.source, program, sites)
