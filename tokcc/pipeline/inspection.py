"""``tokcc inspect``: the tree of blocks and cuts, and what each preset could do there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokcc.analysis.cache_masks import mask_input, sliding_windows
from tokcc.analysis.cache_sites import CacheSite, cache_sites
from tokcc.analysis.rotation import find_rotation
from tokcc.analysis.sites import Layer, Sites, find_sites
from tokcc.analysis.state_sites import StateSite, seen_tokens, state_sites
from tokcc.capture.export import capture
from tokcc.capture.vlm.load import EMBED, LoadedParts
from tokcc.config import LoadedPolicy, load_policy
from tokcc.errors import PlanError, TokccError
from tokcc.ir.program import Program
from tokcc.passes.cache.planning import make_cache_plan
from tokcc.passes.methods import library
from tokcc.passes.plan import make_plan
from tokcc.passes.scan.planning import make_scan_plan
from tokcc.pipeline.request import ModelRequest
from tokcc.pipeline.stages import Stages
from tokcc.progress import Progress, silent

__all__ = ["Inspection", "PartsInspection", "inspect"]


@dataclass(frozen=True)
class Inspection:
    """What a model offers.

    Attributes:
        model: How it was named.
        program: The clean program.
        sites: Its sites; None for a decoder.
        caches: The caches of a decoder.
        scans: The scans of a state-space decoder.
    """

    model: str
    program: Program
    sites: Sites | None
    caches: tuple[CacheSite, ...] = ()
    scans: tuple[StateSite, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        if self.scans:
            return self._state_space()
        return self._decoder() if self.sites is None else self._encoder(self.sites)

    def _state_space(self) -> dict[str, Any]:
        nodes = {node.name: node for node in self.program.graph.nodes}
        return {
            "model": self.model,
            "kind": "state-space decoder",
            "nodes": len(self.program.graph.nodes),
            "inputs": [self.program.public_name(n) for n in self.program.user_inputs],
            "outputs": list(self.program.output_names),
            "padding_mask": seen_tokens(self.program, self.scans) or "-",
            "layers": [
                {"layer": site.layer, "channels": site.channels, "state": int(nodes[site.past].meta["val"].shape[-1])}
                for site in self.scans
            ],
            "presets": self.presets(),
        }

    def _decoder(self) -> dict[str, Any]:
        windows = sliding_windows(self.program, self.caches)
        nodes = {node.name: node for node in self.program.graph.nodes}
        layers = []
        for site, window in zip(self.caches, windows, strict=True):
            query, key = (nodes[name].meta["val"].shape for name in (site.query, site.new_key))
            row: dict[str, Any] = {
                "layer": site.layer,
                "heads": int(query[1]),
                "kv_heads": int(key[1]),
                "width": int(key[3]),
            }
            turned = find_rotation(self.program, nodes[site.new_key]) is not None
            row |= {"sees": f"{window} tokens" if window else "all", "rotary": "yes" if turned else "no"}
            layers.append(row)
        return {
            "model": self.model,
            "kind": "decoder",
            "nodes": len(self.program.graph.nodes),
            "inputs": [self.program.public_name(n) for n in self.program.user_inputs],
            "outputs": list(self.program.output_names),
            "padding_mask": mask_input(self.program, self.caches) or "-",
            "layers": layers,
            "presets": self.presets(),
        }

    def _encoder(self, sites: Sites) -> dict[str, Any]:
        return {
            "model": self.model,
            "tokens": str(sites.tokens),
            "special_tokens": {"first": sites.prefix, "last": sites.suffix, **_middle(sites)},
            "stream": sites.entry.node,
            "nodes": len(self.program.graph.nodes),
            "inputs": [self.program.public_name(n) for n in self.program.user_inputs],
            "outputs": list(self.program.output_names),
            "layers": [
                {
                    "layer": block.index,
                    "module": block.label,
                    "attention": _mixing(block),
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
                chosen = self._layers(load_policy(name, presets=library()))
            except TokccError as error:
                rows.append({"preset": name, "fits": False, "layers": "", "why": error.what})
                continue
            layers = ",".join(map(str, chosen))
            why = preset.title if layers else f"{preset.title}: with its defaults it removes nothing from this model"
            rows.append({"preset": name, "fits": bool(layers), "layers": layers, "why": why})
        return rows

    def _layers(self, policy: LoadedPolicy) -> list[int]:
        """Return the layers at which a policy does something."""
        if self.scans:
            return [planned.layer for planned in make_scan_plan(policy, self.program, self.scans).filters]
        if self.sites is None:
            return sorted({part.layer for part in make_cache_plan(policy, self.program, self.caches).parts})
        return make_plan(policy, self.sites, advise=False).layers


def _middle(sites: Sites) -> dict[str, int]:
    return {} if sites.middle is None else {"middle": sites.middle}


def _mixing(block: Layer) -> str:
    """Say how a block's tokens meet."""
    if block.attention is None:
        return "state-space scan"
    return "fused" if block.attention.fused else "written out"


@dataclass(frozen=True)
class PartsInspection:
    """What the parts of a model offer.

    Attributes:
        model: How it was named.
        family: What tokcc knows it as.
        parts: By name.
        unreduced: Why nothing can be reduced in a part, by name.
    """

    model: str
    family: str
    parts: Mapping[str, Inspection]
    unreduced: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        parts = {name: part.to_dict() for name, part in self.parts.items()}
        return {"model": self.model, "kind": "parts", "family": self.family, "parts": {**parts, **self.unreduced}}


def _inspect_parts(loaded: LoadedParts, stages: Stages) -> PartsInspection:
    found: dict[str, Inspection] = {}
    unreduced: dict[str, str] = {EMBED: "a table of embeddings"}
    for name, part in loaded.parts():
        if name == EMBED:
            continue
        with stages.stage(f"capture {name}"):
            program = capture(part)
        try:
            found[name] = _inspected(loaded.source, program)
        except PlanError as error:
            unreduced[name] = error.what
    return PartsInspection(loaded.source, loaded.family.name, found, unreduced)


def _inspected(source: str, program: Program) -> Inspection:
    caches = cache_sites(program)
    scans = () if caches else state_sites(program)
    return Inspection(source, program, None if caches or scans else find_sites(program), caches, scans)


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
) -> Inspection | PartsInspection:
    """Find the sites of a model, or of its parts. Arguments as for ``compile``."""
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
    if request.multimodal:
        return _inspect_parts(request.open_parts(stages), stages)
    loaded, program = request.open(stages)
    with stages.stage("annotate"):
        return _inspected(loaded.source, program)
