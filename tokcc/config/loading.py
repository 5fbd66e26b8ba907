"""From what a user gives as a policy to a validated one that knows where each part was written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from tokcc.config.checks import listed, nearest, show
from tokcc.config.failures import Origin
from tokcc.config.policy import OutputContract, Policy, find_conflict
from tokcc.config.preset import Preset
from tokcc.config.yaml_lines import Lines, read_yaml
from tokcc.errors import PolicyError

__all__ = ["LoadedPolicy", "load_policy"]

_SUFFIXES = (".yaml", ".yml", ".json")


@dataclass(frozen=True)
class LoadedPolicy:
    """A policy and where it was written.

    Attributes:
        policy: The validated policy, presets spelled out.
        origin: The file's name, or words for a preset or a dict.
        lines: Line (from 1) of paths in ``policy``; a path that was not written has the line of the nearest parent.
        numbers: The number of each step as the author counts them.
        folder: Where its file lies: files that it names are relative to it. None without a file.
    """

    policy: Policy
    origin: str
    lines: Lines
    numbers: tuple[int, ...] = ()
    folder: Path | None = None

    def where(self, path: Sequence[str | int]) -> str:
        """Return the place of a path for messages, such as ``policy.yaml:4  step 1 `tome`, at.layers: [3]``."""
        return Origin(self.origin, self.lines, self.numbers).where(path, self.policy.model_dump(exclude_none=True))

    def only(self, steps: Sequence[int], outputs: Mapping[str, OutputContract]) -> LoadedPolicy:
        """Return a policy of some of the steps, which keep their numbers and lines.

        Args:
            steps: Indices of the steps.
            outputs: What takes the place of the output contracts.
        """
        places: dict[tuple[str | int, ...], tuple[str | int, ...]] = {
            ("steps", old): ("steps", new) for new, old in enumerate(steps)
        }
        lines = {
            (*places[path[:2]], *path[2:]) if path[:2] in places else path: line
            for path, line in self.lines.items()
            if path[:2] in places or path[:1] != ("steps",) or len(path) == 1
        }
        policy = self.policy.model_copy(
            update={"steps": tuple(self.policy.steps[i] for i in steps), "outputs": dict(outputs)}
        )
        return replace(self, policy=policy, lines=lines, numbers=tuple(self.numbers[i] for i in steps))


def load_policy(source: str | Path | Mapping[str, Any] | Policy, *, presets: Mapping[str, Preset]) -> LoadedPolicy:
    """Read, expand and validate a policy.

    Args:
        source: A YAML file, a preset's name, ``none``, a dict in the file's form, or a policy.
        presets: The presets by name.

    Raises:
        PolicyError: The policy cannot be read or does not validate; the error says where and what is needed.
    """
    if isinstance(source, Policy):
        return LoadedPolicy(source, "policy", {}, tuple(range(1, len(source.steps) + 1)))
    if isinstance(source, Mapping):
        return _load_data(dict(source), Origin("policy"), presets, "policy")
    if isinstance(source, str) and source == "none":
        return LoadedPolicy(Policy(name="none", steps=()), "none", {})
    if isinstance(source, str) and source in presets:
        return _load_data({"steps": [{"preset": source}]}, Origin(f"preset `{source}`"), presets, source)
    if not isinstance(source, str | Path):
        raise PolicyError(
            "not a policy", needed="a file, a preset's name, `none`, or a dict", found=type(source).__name__
        )
    path = _file_of(source, presets)
    located = read_yaml(path)
    loaded = _load_data(located.data, Origin(path.name, located.lines), presets, path.stem)
    return replace(loaded, folder=path.parent)


def _file_of(source: str | Path, presets: Mapping[str, Preset]) -> Path:
    path = Path(source)
    if path.is_dir():
        raise PolicyError(f"the policy `{source}` is a folder", needed="a YAML file or a preset's name")
    if path.exists():
        return path
    if isinstance(source, Path) or path.suffix.lower() in _SUFFIXES or len(path.parts) > 1:
        raise PolicyError(f"there is no policy file `{source}`", help="check the path (`tokcc presets` lists presets)")
    raise _unknown_preset(source, presets, policy=None)


def _unknown_preset(name: object, presets: Mapping[str, Preset], policy: str | None) -> PolicyError:
    close = nearest(name, [*presets, "none"])
    return PolicyError(
        f"unknown preset `{name}`" if isinstance(name, str) else "`preset` is not a name",
        policy=policy,
        found=None if isinstance(name, str) else show(name),
        help=f"did you mean `{close}`? " * bool(close) + "`tokcc presets` lists the library",
    )


def _load_data(data: Any, origin: Origin, presets: Mapping[str, Preset], name: str) -> LoadedPolicy:
    if not isinstance(data, Mapping):
        raise PolicyError(
            "a policy is not a mapping", policy=origin.name, needed="a mapping with `steps`", found=show(data)
        )
    _check_version(data, origin)
    expansion = _Expansion(data, origin, presets)
    expanded = {"name": name, **expansion.data()}
    located = Origin(origin.name, expansion.lines, tuple(expansion.numbers))
    try:
        policy = Policy.model_validate(expanded)
    except ValidationError as error:
        raise located.refusal(error, expanded) from error
    loaded = LoadedPolicy(policy, origin.name, expansion.lines, tuple(expansion.numbers))
    _refuse_conflict(loaded)
    return loaded


def _check_version(data: Mapping[str, Any], origin: Origin) -> None:
    """Check the version first: in another version every other key may mean something else."""
    version = data.get("version", 1)
    if version != 1 or isinstance(version, bool):
        raise PolicyError(
            f"unknown policy version {show(version)}",
            policy=origin.where(("version",), data),
            needed="1",
            help="use the tokcc that this policy was written for, or write `version: 1`",
        )


def _refuse_conflict(loaded: LoadedPolicy) -> None:
    conflict = find_conflict(loaded.policy.steps)
    if conflict is None:
        return
    earlier, later = conflict
    step = loaded.policy.steps[later]
    raise PolicyError(
        f"two {step.node} steps at one layer and site ask for different budgets",
        policy=loaded.where(("steps", later)),
        found=f"the other is {loaded.where(('steps', earlier))}",
        help="give the steps different layers or sites, or leave one out",
    )


class _Expansion:
    """Spells out the presets of a policy and keeps track of where every part was written."""

    def __init__(self, source: Mapping[str, Any], origin: Origin, presets: Mapping[str, Preset]) -> None:
        self._source = source
        self._origin = origin
        self._presets = presets
        self.lines = {path: line for path, line in origin.lines.items() if path[:1] != ("steps",) or len(path) == 1}
        self.numbers: list[int] = []
        self._steps: list[Any] = []
        self._outputs: dict[str, tuple[Any, int]] = {}

    def data(self) -> dict[str, Any]:
        """Return the policy as plain data in the long form."""
        steps = self._source.get("steps")
        if not isinstance(steps, list | tuple):
            # Policy's own validation words this error, with the line.
            return dict(self._source)
        for index, step in enumerate(steps):
            if isinstance(step, Mapping) and "preset" in step:
                self._add_preset(index, step)
            else:
                self._add_plain(index, step)
        outputs = {name: contract for name, (contract, _) in self._outputs.items()}
        own = self._source.get("outputs")
        expanded = {**self._source, "steps": self._steps}
        if outputs and (own is None or isinstance(own, Mapping)):
            expanded["outputs"] = {**outputs, **(own or {})}
        return expanded

    def _add_plain(self, index: int, step: Any) -> None:
        path = ("steps", index)
        if isinstance(step, str):
            raise PolicyError(
                "a step is not a mapping",
                policy=self._origin.where(path, self._source),
                help=f"write `- preset: {step}`",
            )
        if isinstance(step, Mapping) and "node" not in step:
            raise PolicyError(
                "a step names neither a preset nor a node",
                policy=self._origin.where(path, self._source),
                needed="`preset: NAME` or `node: prune | merge | unmerge | sparse_attention | evict_kv`",
                found=listed(str(key) for key in step) or "an empty step",
            )
        self._append(step, index, {(): ()})

    def _add_preset(self, index: int, step: Mapping[str, Any]) -> None:
        path = ("steps", index)
        name = step["preset"]
        preset = self._presets.get(name) if isinstance(name, str) else None
        if preset is None:
            where = self._origin.where((*path, "preset"), self._source)
            raise _unknown_preset(name, self._presets, where)
        if "node" in step:
            raise PolicyError(
                "`node` stands beside `preset`",
                policy=self._origin.where((*path, "node"), self._source),
                help="leave one of the two out: a preset brings its own nodes",
            )
        try:
            expanded = preset.expand({key: value for key, value in step.items() if key != "preset"})
        except PydanticCustomError as error:
            raise self._origin.refusal(error, self._source, path) from error
        for one in expanded:
            self._append(one.data, index, {(): (), **one.sources})
        self._bring_outputs(preset, index)

    def _bring_outputs(self, preset: Preset, index: int) -> None:
        own = self._source.get("outputs") or {}
        for name, contract in preset.outputs.items():
            other = self._outputs.setdefault(name, (contract, index))
            if other[0] != contract and name not in own:
                raise PolicyError(
                    f"two presets want the output `{name}` differently",
                    policy=self._origin.where(("steps", index), self._source),
                    found=f"{show(contract)} here, {show(other[0])} in step {other[1] + 1}",
                    help=f"say which under `outputs: {{{name}: ...}}`",
                )

    def _append(self, step: Any, index: int, sources: Mapping[tuple[str | int, ...], tuple[str | int, ...]]) -> None:
        """Add a step and copy the lines of its parts: ``sources`` maps paths in it to paths in the written step."""
        new = len(self._steps)
        self._steps.append(step)
        self.numbers.append(index + 1)
        whole = sources.keys() == {()}
        for target, written in sources.items():
            start = ("steps", index, *written)
            for path, line in self._origin.lines.items():
                inside = path[: len(start)] == start
                if inside and (path == start or target or whole):
                    self.lines["steps", new, *target, *path[len(start) :]] = line
