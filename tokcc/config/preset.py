"""Presets: a published method as data, with a few parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from tokcc.config.checks import Strict, listed, problem, show, unknown_key
from tokcc.config.policy import Step

__all__ = ["MERGED_KEYS", "OVERRIDES", "ExpandedStep", "ParamSpec", "Preset"]

# Long-form keys that may stand beside `preset:`. The merged ones keep what the override does not mention.
OVERRIDES = (
    "at",
    "score",
    "select",
    "reduce",
    "heads",
    "store",
    "blocks",
    "bias",
    "budget",
    "protect",
    "positions",
    "restore",
    "seed",
)
MERGED_KEYS = ("at", "blocks", "protect")

Path = tuple[str | int, ...]


class ParamSpec(Strict):
    """One parameter of a preset's short form."""

    default: Any
    type: Literal["int", "float", "bool", "str", "list", "any"]
    min: float | None = None
    max: float | None = None
    choices: tuple[Any, ...] = ()
    doc: str

    def check(self, name: str, value: Any) -> Any:
        """Return the value as the preset uses it, or raise a validation error for the key ``name``."""
        if value is None and self.default is None:
            return None
        if not self._has_type(value):
            raise problem(f"`{name}` is not {self._article()}", needed=self.needed(), key=name)
        too_small = self.min is not None and isinstance(value, int | float) and value < self.min
        too_large = self.max is not None and isinstance(value, int | float) and value > self.max
        if too_small or too_large or (self.choices and value not in self.choices):
            raise problem(f"`{name}` is out of range", needed=self.needed(), key=name)
        return float(value) if self.type == "float" else value

    def needed(self) -> str:
        """Return what is accepted, in words."""
        if self.choices:
            return "one of " + ", ".join(show(choice) for choice in self.choices)
        bounds = []
        if self.min is not None:
            bounds.append(f"of at least {self.min:g}")
        if self.max is not None:
            bounds.append(f"at most {self.max:g}")
        return " ".join([self._article(), " and ".join(bounds)]).strip()

    def _article(self) -> str:
        return {
            "int": "a whole number",
            "float": "a number",
            "bool": "true or false",
            "str": "text",
            "list": "a list",
            "any": "a value",
        }[self.type]

    def _has_type(self, value: Any) -> bool:
        if isinstance(value, bool):
            return self.type in ("bool", "any")
        if self.type == "float":
            return isinstance(value, int | float) and math.isfinite(value)
        types: dict[str, Any] = {"int": int, "str": str, "list": (list, tuple), "any": object}
        return self.type in types and isinstance(value, types[self.type])


class ExpandedStep(Strict):
    """A step of a preset with everything filled in, still plain data.

    Attributes:
        data: What ``Step`` validates.
        sources: Where a value of ``data`` was written: path in ``data`` -> path in the short-form step.
    """

    data: dict[str, Any]
    sources: dict[Path, Path] = Field(default_factory=dict)


class Preset(Strict):
    """A method of the library, one YAML file each.

    Attributes:
        name: The name in policies; also the file's name.
        title: The method's name for people.
        paper: Where it is published.
        fidelity: What the preset was written after: the authors' code, the paper, or only its abstract.
        needs: What a model must have for it.
        notes: One or two sentences for ``tokcc presets --show``.
        params: The parameters of the short form.
        outputs: Output contracts that the method brings.
        steps: The steps; a scalar that is exactly ``$name`` stands for the parameter ``name``.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.\-]*$")]
    title: str
    paper: str
    fidelity: Literal["code", "paper", "abstract"]
    needs: tuple[Literal["cls", "text", "inputs", "trained", "attention", "decoder"], ...] = ()
    notes: str
    params: dict[str, ParamSpec] = Field(default_factory=dict)
    outputs: dict[str, Any] = Field(default_factory=dict)
    steps: Annotated[tuple[dict[str, Any], ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> Preset:
        reserved = {"preset", "node", "name", *OVERRIDES}
        for name, spec in self.params.items():
            if name in reserved:
                raise problem(f"the parameter `{name}` has the name of a step's key", key="params")
            spec.check(name, spec.default)
        used = {reference for step in self.steps for _, reference in _references(step)}
        for name in sorted(used ^ set(self.params)):
            raise problem(
                f"`${name}` is not among the parameters" if name in used else f"the parameter `{name}` is not used",
                needed=listed(self.params),
                key="steps" if name in used else "params",
            )
        for expanded in self.expand({}):
            Step.model_validate(expanded.data)
        return self

    @property
    def nodes(self) -> tuple[str, ...]:
        """The node kinds that the method inserts, each once."""
        return tuple(dict.fromkeys(str(step["node"]) for step in self.steps))

    def expand(self, given: Mapping[str, Any]) -> list[ExpandedStep]:
        """Return the steps with parameters filled in and overrides applied.

        Args:
            given: The short-form step without its ``preset`` key: parameters and long-form overrides.

        Raises:
            PydanticCustomError: A key is unknown, or a parameter does not fit.
        """
        for key in given:
            if key not in self.params and key not in OVERRIDES:
                raise unknown_key(key, [*self.params, *OVERRIDES])
        values = {
            name: spec.check(name, given[name]) if name in given else spec.default for name, spec in self.params.items()
        }
        overrides = {key: given[key] for key in OVERRIDES if key in given}
        expanded = [self._expand_step(step, values, given, overrides) for step in self.steps]
        reached = {source[0] for step in expanded for source in step.sources.values()}
        for name in self.params:
            if name in given and name not in reached:
                raise self._no_effect(name)
        return expanded

    def _expand_step(
        self, step: Mapping[str, Any], values: Mapping[str, Any], given: Mapping[str, Any], overrides: Mapping[str, Any]
    ) -> ExpandedStep:
        data = {"name": self.name, "preset": self.name, **_fill(step, values)}
        sources: dict[Path, Path] = {
            path: (name,) for path, name in _references(step) if name in given and not _overridden(path, overrides)
        }
        for key, value in overrides.items():
            both_mappings = isinstance(value, Mapping) and isinstance(data.get(key), Mapping)
            data[key] = {**data[key], **value} if key in MERGED_KEYS and both_mappings else value
            sources[key,] = (key,)
        return ExpandedStep(data=data, sources=sources)

    def _no_effect(self, name: str) -> PydanticCustomError:
        parts = {str(path[0]) for step in self.steps for path, reference in _references(step) if reference == name}
        return problem(
            f"`{name}` has no effect here",
            key=name,
            hint=f"the step's own {listed(sorted(parts))} replaces what `{name}` sets: give one of the two",
        )

    def long_form(self) -> dict[str, Any]:
        """Return a policy that spells the preset out with its defaults; feeding it back gives the same steps."""
        steps = [Step.model_validate(expanded.data).to_dict() for expanded in self.expand({})]
        policy: dict[str, Any] = {"version": 1, "name": self.name, "steps": steps}
        return {**policy, "outputs": self.outputs} if self.outputs else policy


def _overridden(path: Path, overrides: Mapping[str, Any]) -> bool:
    """Tell whether a place in a preset's step is replaced by an override."""
    override = overrides.get(str(path[0]))
    if path[0] in MERGED_KEYS and isinstance(override, Mapping):
        return path[1] in override
    return path[0] in overrides


def _references(value: Any, path: Path = ()) -> list[tuple[Path, str]]:
    if isinstance(value, str) and value.startswith("$"):
        return [(path, value[1:])]
    if isinstance(value, Mapping):
        return [found for key, item in value.items() for found in _references(item, (*path, key))]
    if isinstance(value, list | tuple):
        return [found for index, item in enumerate(value) for found in _references(item, (*path, index))]
    return []


def _fill(value: Any, values: Mapping[str, Any]) -> Any:
    """Replace ``$name`` scalars; a mapping entry whose parameter is null is left out."""
    if isinstance(value, str) and value.startswith("$"):
        return values.get(value[1:], value)
    if isinstance(value, Mapping):
        filled = {key: _fill(item, values) for key, item in value.items()}
        return {key: item for key, item in filled.items() if item is not None or value[key] is None}
    if isinstance(value, list | tuple):
        return [_fill(item, values) for item in value]
    return value
