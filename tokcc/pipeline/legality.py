"""``tokcc inspect --backend tensorrt``: every node of the graph against the rules of the builder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tokcc.backends.tensorrt.graph import policy_place, refuse_violations
from tokcc.backends.tensorrt.options import TensorrtOptions
from tokcc.backends.tensorrt.profiles import Profile, Shapes, varying_axes
from tokcc.backends.tensorrt.rules import Violation
from tokcc.capture.export import capture
from tokcc.capture.loaded import Loaded
from tokcc.config import LoadedPolicy, Policy, load_policy
from tokcc.ir.program import Program
from tokcc.passes.methods import library
from tokcc.pipeline.engines import examples
from tokcc.pipeline.parts import policy_of
from tokcc.pipeline.reducing import reduce_program
from tokcc.pipeline.request import ModelRequest
from tokcc.pipeline.stages import Stages
from tokcc.pipeline.tensorrt import lower_tensorrt
from tokcc.progress import Progress, silent

__all__ = ["Legality", "check_legality"]


@dataclass(frozen=True)
class Legality:
    """What TensorRT takes of a graph.

    Attributes:
        model: How it was named; in a model of several parts the part's name.
        policy: The policy.
        profiles: The shapes that the graph was held against.
        operations: How many nodes of each operation there are.
        found: What is not taken.
    """

    model: str
    policy: LoadedPolicy
    profiles: tuple[Profile, ...]
    operations: Mapping[str, int]
    found: tuple[Violation, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        violations = [{**asdict(each), "policy": policy_place(each.step, self.policy)} for each in self.found]
        return {
            "model": self.model,
            "backend": "tensorrt",
            "policy": self.policy.policy.name,
            "profiles": [profile.to_dict() for profile in self.profiles],
            "operations": dict(sorted(self.operations.items())),
            "violations": violations,
            "legal": not violations,
        }

    def refuse(self) -> None:
        """Refuse a graph that is not taken.

        Raises:
            LoweringError: Of the first violation.
        """
        refuse_violations(self.found, self.policy)


def check_legality(
    model: Any,
    policy: str | Mapping[str, Any] | Policy = "none",
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    inputs: Sequence[str] = (),
    dynamic: Sequence[str] = (),
    shapes: Shapes | None = None,
    opset: int = 18,
    dtype: str | None = None,
    task: str | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> list[Legality]:
    """Lower a model for TensorRT and hold every node against its rules. Arguments as for ``compile``.

    Raises:
        TokccError: The model cannot be lowered so far.
    """
    request = ModelRequest(
        model,
        example_inputs=example_inputs,
        dynamic_shapes=dynamic_shapes,
        inputs=inputs,
        dynamic=dynamic,
        or_dynamic=varying_axes(shapes or {}),
        task=task,
        dtype=dtype,
        allow_pickle=allow_pickle,
    )
    stages = Stages(progress or silent())
    chosen = load_policy(policy, presets=library())
    options = TensorrtOptions.of({}, shapes or {})
    if request.multimodal:
        return [
            _checked(name, part, capture(part), policy_of(chosen, name), options, opset, stages)
            for name, part in request.open_parts(stages).parts()
        ]
    loaded, program = request.open(stages)
    return [_checked(loaded.source, loaded, program, chosen, options, opset, stages)]


def _checked(
    name: str,
    loaded: Loaded,
    program: Program,
    policy: LoadedPolicy,
    options: TensorrtOptions,
    opset: int,
    stages: Stages,
) -> Legality:
    reduced = reduce_program(program, policy, stages)
    with stages.stage("lower for TensorRT"):
        lowered = lower_tensorrt(reduced, policy, examples(program, loaded), options, opset)
    operations = Counter(node.op_type for node in lowered.model.graph.all_nodes())
    return Legality(name, policy, lowered.profiles, operations, lowered.violations)
