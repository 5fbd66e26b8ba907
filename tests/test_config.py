"""The policy file: what is accepted, and that every wrong input is refused with a line and a remedy."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tokcc.config import At, Budget, LoadedPolicy, PieceSpec, Policy, Preset, find_conflict, load_policy, load_preset
from tokcc.errors import PolicyError
from tokcc.passes.methods import library, load_presets

TOY: dict[str, Any] = {
    "name": "toy",
    "title": "Toy",
    "paper": "none",
    "fidelity": "paper",
    "notes": "For tests.",
    "params": {
        "keep": {"default": 0.7, "type": "float", "min": 0.01, "max": 1, "doc": "kept fraction"},
        "fuse": {"default": True, "type": "bool", "doc": "fuse the rest"},
        "layers": {"default": [3, 6], "type": "any", "doc": "layers"},
        "total": {"default": None, "type": "int", "doc": "unused unless given"},
    },
    "steps": [
        {
            "node": "prune",
            "at": {"layers": "$layers", "site": "block_output"},
            "score": {"kind": "norm", "cap": "$total"},
            "select": {"kind": "topk"},
            "reduce": {"kind": "drop", "fuse_rest": "$fuse"},
            "budget": {"keep": "$keep"},
            "protect": {"first": 1},
        }
    ],
}
TWO: dict[str, Any] = {
    **{key: TOY[key] for key in ("title", "paper", "fidelity", "notes")},
    "name": "two",
    "params": {"keep": {"default": 0.5, "type": "float", "doc": "kept fraction"}},
    "outputs": {"*": "reduced"},
    "steps": [
        {"node": "prune", "at": {"layers": [0]}, "budget": {"keep": "$keep"}},
        {"node": "merge", "at": {"layers": [1]}, "budget": {"remove": 4}},
    ],
}


@pytest.fixture(scope="module")
def presets() -> dict[str, Preset]:
    return {"toy": Preset.model_validate(TOY), "two": Preset.model_validate(TWO)}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_policy(text: str) -> Path:
        path = tmp_path / "policy.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_policy


def refused(source: Any, presets: dict[str, Preset]) -> PolicyError:
    with pytest.raises(PolicyError) as caught:
        load_policy(source, presets=presets)
    assert caught.value.exit_code == 2
    return caught.value


class TestAccepted:
    def test_design_example(self, write: Any, presets: dict[str, Preset]) -> None:
        path = write(
            """\
version: 1
name: tome-then-prune
steps:
  - preset: toy             # short form
    keep: 0.5
  - node: prune
    at: {layers: [8, 10], site: after_attention}
    score: {kind: attention_rows, rows: cls, heads: mean}
    select: topk
    reduce: {kind: drop, fuse_rest: true}
    budget: {keep: 0.7}
    protect: {first: 1}
    positions: keep
    restore: none
outputs: {logits: last_token, hidden: {rows: [0, -1]}}
segments: {image: {input_ids: 32000}}
kv: {layout: slots}
"""
        )
        loaded = load_policy(path, presets=presets)
        policy = loaded.policy
        assert policy.name == "tome-then-prune"
        assert [step.name for step in policy.steps] == ["toy", "prune"]
        assert policy.steps[0].budget.keep == 0.5
        assert policy.steps[0].at == At(layers=(3, 6), site="block_output")
        assert policy.steps[1].score == PieceSpec(kind="attention_rows", params={"rows": "cls", "heads": "mean"})
        assert policy.steps[1].select == PieceSpec(kind="topk")
        assert policy.segments == {"image": {"input_ids": 32000}}
        assert policy.kv.layout == "slots"
        assert load_policy(str(path), presets=presets).policy == policy

    def test_names_come_from_the_file_the_preset_or_the_policy(self, write: Any, presets: dict[str, Preset]) -> None:
        assert load_policy(write("steps: [{preset: toy}]"), presets=presets).policy.name == "policy"
        assert load_policy("toy", presets=presets).policy.name == "toy"
        assert load_policy("none", presets=presets).policy == Policy(name="none", steps=())

    def test_a_policy_passes_through(self, presets: dict[str, Preset]) -> None:
        policy = load_policy("two", presets=presets).policy
        assert load_policy(policy, presets=presets).policy is policy

    def test_dict_with_tuples(self, presets: dict[str, Preset]) -> None:
        loaded = load_policy({"steps": ({"preset": "toy", "at": {"layers": (1, 2)}},)}, presets=presets)
        assert loaded.policy.steps[0].at.layers == (1, 2)

    def test_empty_steps_mean_none(self, presets: dict[str, Preset]) -> None:
        assert load_policy({"steps": []}, presets=presets).policy.steps == ()

    def test_unquoted_range_is_not_a_time_of_day(self, write: Any, presets: dict[str, Preset]) -> None:
        loaded = load_policy(write("steps:\n  - preset: toy\n    at:\n      layers: 2:10\n"), presets=presets)
        assert loaded.policy.steps[0].at.layers == "2:10"

    def test_aliases_are_expanded(self, write: Any, presets: dict[str, Preset]) -> None:
        text = "steps:\n  - {preset: toy, at: &at {layers: [1]}}\n  - {preset: two, at: *at}\n"
        assert [s.at.layers for s in load_policy(write(text), presets=presets).policy.steps] == [(1,)] * 3


class TestPresets:
    def test_override_of_at_keeps_the_site(self, presets: dict[str, Preset]) -> None:
        step = load_policy({"steps": [{"preset": "toy", "at": {"layers": [1]}}]}, presets=presets).policy.steps[0]
        assert (step.at.layers, step.at.site) == ((1,), "block_output")

    def test_override_of_budget_replaces_it_in_every_step(self, presets: dict[str, Preset]) -> None:
        steps = load_policy({"steps": [{"preset": "two", "budget": {"tokens": 9}}]}, presets=presets).policy.steps
        assert [step.budget for step in steps] == [Budget(tokens=9), Budget(tokens=9)]

    def test_override_of_a_piece_replaces_it(self, presets: dict[str, Preset]) -> None:
        step = load_policy({"steps": [{"preset": "toy", "reduce": {"kind": "drop"}}]}, presets=presets).policy.steps[0]
        assert step.reduce == PieceSpec(kind="drop")

    def test_null_parameters_leave_their_key_out(self, presets: dict[str, Preset]) -> None:
        assert presets["toy"].long_form()["steps"][0]["score"] == {"kind": "norm"}
        step = load_policy({"steps": [{"preset": "toy", "total": 3}]}, presets=presets).policy.steps[0]
        assert step.score == PieceSpec(kind="norm", params={"cap": 3})

    def test_a_dollar_in_an_override_is_literal(self, presets: dict[str, Preset]) -> None:
        source = {"steps": [{"preset": "toy", "protect": {"segment": "$keep"}}]}
        assert load_policy(source, presets=presets).policy.steps[0].protect.segment == "$keep"

    def test_outputs_of_a_preset_give_way_to_the_policy(self, presets: dict[str, Preset]) -> None:
        assert load_policy("two", presets=presets).policy.outputs == {"*": "reduced"}
        own = load_policy({"steps": [{"preset": "two"}], "outputs": {"*": "full"}}, presets=presets).policy
        assert own.outputs == {"*": "full"}

    def test_presets_that_disagree_on_an_output(self, presets: dict[str, Preset]) -> None:
        other = Preset.model_validate({**TWO, "name": "other", "outputs": {"*": "full"}})
        source = {"steps": [{"preset": "two"}, {"preset": "other", "at": {"layers": [5]}}]}
        error = refused(source, {**presets, "other": other})
        assert "outputs: {*: ...}" in (error.help or "")

    def test_a_parameter_without_effect_is_refused(self, presets: dict[str, Preset]) -> None:
        error = refused({"steps": [{"preset": "toy", "keep": 0.5, "budget": {"tokens": 5}}]}, presets)
        assert "`keep` has no effect" in error.what
        assert "`budget`" in (error.help or "")

    @pytest.mark.parametrize("name", ["toy", "two", *library()])
    def test_long_form_gives_the_same_steps(self, name: str, presets: dict[str, Preset], write: Any) -> None:
        every = {**presets, **library()}
        short = load_policy(name, presets=every).policy
        text = yaml.safe_dump(every[name].long_form())
        spelled = load_policy(write(text), presets={}).policy
        assert spelled.outputs == short.outputs
        assert [step.to_dict() for step in spelled.steps] == [step.to_dict() for step in short.steps]

    def test_a_policy_can_be_replayed_without_presets(self, presets: dict[str, Preset]) -> None:
        source = {"name": "x", "steps": [{"preset": "two"}, {"preset": "toy"}], "segments": {"image": {"input_ids": 7}}}
        policy = load_policy(source, presets=presets).policy
        replayed = load_policy(policy.to_dict(), presets={}).policy
        assert replayed.to_dict() == policy.to_dict()

    def test_nodes(self, presets: dict[str, Preset]) -> None:
        assert presets["two"].nodes == ("prune", "merge")

    def test_the_library_loads(self) -> None:
        assert "tome" in library()
        assert library()["tome"].long_form()["steps"][0]["budget"]["remove"] == 13

    @pytest.mark.parametrize(
        ("change", "what"),
        [
            ({"params": {**TOY["params"], "extra": {"default": 1, "type": "int", "doc": "-"}}}, "is not used"),
            ({"steps": [{**TOY["steps"][0], "restore": "$nope"}]}, "is not among the parameters"),
            ({"params": {**TOY["params"], "seed": {"default": 1, "type": "int", "doc": "-"}}}, "name of a step's key"),
            ({"params": {**TOY["params"], "keep": {"default": "x", "type": "float", "doc": "-"}}}, "not a number"),
            ({"fidelty": "code"}, "unknown key `fidelty`"),
            ({"name": "other"}, "not named like its file"),
            ({"steps": []}, "does not fit"),
        ],
    )
    def test_wrong_preset_files(self, tmp_path: Path, change: dict[str, Any], what: str) -> None:
        path = tmp_path / "toy.yaml"
        path.write_text(yaml.safe_dump({**TOY, **change}), encoding="utf-8")
        with pytest.raises(PolicyError, match=r"toy\.yaml") as caught:
            load_presets(tmp_path)
        assert what in caught.value.what

    def test_load_preset(self, tmp_path: Path) -> None:
        path = tmp_path / "toy.yaml"
        path.write_text(yaml.safe_dump(TOY), encoding="utf-8")
        assert load_preset(path) == Preset.model_validate(TOY)


class TestWhere:
    TEXT = """\
steps:
  - preset: two
  - preset: toy
    keep: 0.9
    at:
      layers: [3]
    fuse: false
"""

    @pytest.fixture
    def loaded(self, write: Any, presets: dict[str, Preset]) -> LoadedPolicy:
        return load_policy(write(self.TEXT), presets=presets)

    def test_a_preset_counts_as_one_step(self, loaded: LoadedPolicy) -> None:
        assert loaded.where(("steps", 0)) == "policy.yaml:2  step 1 `two`"
        assert loaded.where(("steps", 1)) == "policy.yaml:2  step 1 `two`"
        assert loaded.where(("steps", 2)) == "policy.yaml:3  step 2 `toy`"

    def test_overrides_and_parameters_have_their_own_lines(self, loaded: LoadedPolicy) -> None:
        assert loaded.where(("steps", 2, "at", "layers")) == "policy.yaml:6  step 2 `toy`, at.layers: [3]"
        assert loaded.where(("steps", 2, "budget", "keep")) == "policy.yaml:4  step 2 `toy`, budget.keep: 0.9"
        assert loaded.where(("steps", 2, "reduce", "fuse_rest")).startswith("policy.yaml:7 ")
        assert loaded.where(("steps", 2, "protect", "first")).startswith("policy.yaml:3 ")

    def test_without_a_file(self, presets: dict[str, Preset]) -> None:
        loaded = load_policy("toy", presets=presets)
        assert loaded.where(("steps", 0, "budget", "keep")) == "preset `toy`  step 1 `toy`, budget.keep: 0.7"


LONG = "version: 1\nsteps:\n  - node: prune\n    budget: {keep: 0.5}\n"


class TestRefused:
    @pytest.mark.parametrize(
        ("text", "line", "what", "hint"),
        [
            ("steps:\n  - preset: tooy\n", 2, "unknown preset `tooy`", "did you mean `toy`?"),
            ("steps:\n  - preset: [toy]\n", 2, "`preset` is not a name", None),
            ("steps:\n  - preset: toy\n    keeep: 0.5\n", 3, "unknown key `keeep`", "did you mean `keep`?"),
            ("steps:\n  - preset: toy\n    node: prune\n", 3, "`node` stands beside `preset`", "leave one"),
            ("steps:\n  - toy\n", 2, "a step is not a mapping", "`- preset: toy`"),
            ("steps:\n  - 3\n", 2, "not a mapping", None),
            ("steps:\n  - keep: 3\n", 2, "neither a preset nor a node", None),
            (LONG + "stepps: []\n", 5, "unknown key `stepps`", "did you mean `steps`?"),
            (LONG + "    buget: {keep: 1}\n", 5, "unknown key `buget`", "did you mean `budget`?"),
            (LONG + "    at: {layer: [1]}\n", 5, "unknown key `layer`", "did you mean `layers`?"),
            (LONG + "    at:\n      site: after_atention\n", 6, "not accepted", "did you mean `after_attention`?"),
            (LONG + "    at: {layers: evn}\n", 5, "not a layer", "did you mean `even`?"),
            (LONG + "    at: {layers: []}\n", 5, "no layer is chosen", None),
            (LONG + "    at: {layers: [1, true]}\n", 5, "not a layer", None),
            (LONG + "    at: {layers: [0.5, 1.5]}\n", 5, "share of the depth", None),
            (LONG + "    score: {rows: cls}\n", 5, "`kind` is missing", None),
            (LONG + "    score: 3\n", 5, "not a piece", None),
            (LONG + "    protect: {first: -1}\n", 5, "not a number of tokens", None),
            (LONG + "    protect: {first: many}\n", 5, "not a number of tokens", None),
            (LONG + "    protect: {ids: [-3]}\n", 5, "not token ids", None),
            (LONG + "    seed: 1.5\n", 5, "not a whole number", None),
            (LONG + "    positions: compct\n", 5, "not accepted", "did you mean `compact`?"),
            (LONG + "    budget: {keep: 1}\n", 5, "duplicate key `budget`", None),
            (LONG + "outputs: {logits: fulll}\n", 5, "not an output contract", None),
            (LONG + "outputs: {logits: {rows: []}}\n", 5, "not an output contract", None),
            (LONG + "kv: {layout: merge}\n", 5, "not accepted", "did you mean `merged`?"),
            (LONG + "segments: {image: {input_ids: x}}\n", 5, "not a whole number", None),
            (LONG + "1: 2\n", 5, "a key is not text", None),
            ("version: 2\nsteps: []\nnew_key: 1\n", 1, "unknown policy version 2", "version: 1"),
            ("version: true\nsteps: []\n", 1, "unknown policy version true", None),
            ("version: 1\nname: x\n", None, "`steps` is missing", "add `steps`"),
            ("steps: 3\n", 1, "does not fit", None),
            ("name: [1]\nsteps: []\n", 1, "does not fit", None),
            ("steps:\n  - node: prun\n    budget: {keep: 1}\n", 2, "not accepted", "did you mean `prune`?"),
            ("steps:\n  - node: prune\n", 2, "`budget` is missing", "add `budget`"),
            ("steps:\n  - {node: prune,\n", None, "not valid YAML", None),
            ("steps:\n  - node: prune\n    at: {}\n     budget: 3\n", 4, "not valid YAML", None),
            ("steps: []\n---\nsteps: []\n", 2, "not valid YAML", None),
            ("steps:\n  - preset: toy\n    at:\n      layers: 4:\n", 4, None, 'layers: "4:"'),
            ("[1, 2]\n", None, "not a mapping", None),
            ("just words\n", None, "not a mapping", None),
            ("", None, "is empty", None),
            ("# only a comment\n", None, "is empty", None),
            ("name: 2026-01-01\nsteps: []\n", 1, "a date has no place here", "quotes"),
            ("base: &b {a: 1}\nother:\n  <<: *b\n", 3, "merge keys", "write the keys out"),
        ],
    )
    def test_wrong_files(
        self, write: Any, presets: dict[str, Preset], text: str, line: int | None, what: str | None, hint: str | None
    ) -> None:
        error = refused(write(text), presets)
        if line is not None:
            assert (error.policy or "").split(" ")[0] == f"policy.yaml:{line}"
        assert (error.policy or "").startswith("policy.yaml")
        if what is not None:
            assert what in error.what
        if hint is not None:
            assert hint in (error.help or "")

    @pytest.mark.parametrize("value", ["0", "1.7", "-1", "abc", "true", ".nan", ".inf", "[1]", "'0.5'"])
    @pytest.mark.parametrize(
        "template", ["steps:\n  - preset: toy\n    keep: {}\n", "steps:\n  - node: prune\n    budget: {{keep: {}}}\n"]
    )
    def test_wrong_values_say_what_is_needed_and_found(
        self, write: Any, presets: dict[str, Preset], template: str, value: str
    ) -> None:
        error = refused(write(template.format(value)), presets)
        assert error.policy is not None
        assert error.policy.startswith("policy.yaml:3  step 1 ")
        assert error.needed is not None
        assert "a number" in error.needed
        assert error.found is not None
        assert value.strip("'.[]")[:3] in error.found

    @pytest.mark.parametrize(
        ("budget", "what"),
        [
            ({}, "names no amount"),
            ({"keep": 0.5, "tokens": 3}, "given together"),
            ({"tokens": 0}, "out of range"),
            ({"tokens": 2.5}, "not a whole number"),
            ({"tokens": True}, "not a whole number"),
            ({"remove": -1}, "out of range"),
            ({"schedule": []}, "not a schedule"),
            ({"schedule": [10, 0]}, "keeps no token"),
            ({"schedule": [10, 1.5]}, "out of range"),
            ({"schedule": [10, "x"]}, "not a schedule entry"),
            ({"schedule": 10}, "not a schedule"),
            ({"total_remove": 1}, "out of range"),
            ({"kv": {}}, "capacity is 0"),
            ({"kv": {"sink": 4}}, "unknown key `sink`"),
            ({"flops": 0}, "out of range"),
            ({"keep": 0.5, "inflection": 1}, "goes with `remove`"),
            ({"remove": 5, "inflection": 2}, "out of range"),
            ({"remove": 5, "ramp": {}}, "goes with `keep`"),
            ({"remove": 5, "compound": True}, "goes with `keep`"),
            ({"keep": 0.5, "compound": True, "ramp": {}}, "goes with `keep`"),
            ({"keep": 0.5, "ramp": {"warmup_layers": -1}}, "out of range"),
            ({"keep": 0.5, "ramp": {"warmup_fraction": 1}}, "out of range"),
            ({"keep": 0.5, "rounding": "up"}, "not accepted"),
            (0.5, "not a mapping"),
        ],
    )
    def test_budgets(self, presets: dict[str, Preset], budget: Any, what: str) -> None:
        error = refused({"steps": [{"node": "prune", "budget": budget}]}, presets)
        assert what in error.what

    def test_budgets_that_hold(self) -> None:
        assert Budget(keep=1).keep == 1.0
        assert Budget(schedule=(137, 0.5)).schedule == (137, 0.5)
        assert Budget(remove=8, inflection=-1).amount == "remove"

    @pytest.mark.parametrize(
        ("layers", "schedule", "what"),
        [([1, 2], [5], "1 entries for 2 layers"), ([4, 2], [5, 6], "ascending"), ([-1, 2], [5, 6], "ascending")],
    )
    def test_schedules_that_cannot_match(
        self, presets: dict[str, Preset], layers: list[int], schedule: list[int], what: str
    ) -> None:
        step = {"node": "prune", "at": {"layers": layers}, "budget": {"schedule": schedule}}
        assert what in refused({"steps": [step]}, presets).what

    def test_several_problems_are_counted(self, write: Any, presets: dict[str, Preset]) -> None:
        text = "steps:\n  - node: prune\n    seed: -1\n    budget: {keep: 2}\n    restore: maybe\n"
        error = refused(write(text), presets)
        assert error.what.endswith("(and 2 more problems)")
        assert (error.policy or "").startswith("policy.yaml:3 ")

    def test_sources_that_are_no_policy(self, tmp_path: Path, presets: dict[str, Preset]) -> None:
        assert "did you mean `toy`?" in (refused("toyy", presets).help or "")
        assert "no policy file" in refused("missing.yaml", presets).what
        assert "no policy file" in refused(tmp_path / "x", presets).what
        assert "is a folder" in refused(tmp_path, presets).what
        assert "not a policy" in refused(3, presets).what
        binary = tmp_path / "binary.yaml"
        binary.write_bytes(b"\xff\xfe\x00\x80")
        assert "not text" in refused(binary, presets).what
        huge = tmp_path / "huge.yaml"
        huge.write_bytes(b"#" * (2 << 20))
        assert "too large" in refused(huge, presets).what


class TestConflicts:
    @pytest.mark.parametrize(
        ("first", "second"),
        [([3], [3]), ("all", [2]), ("even", [4]), ([1, 5], "4:"), ([-1], [-1]), ("odd", "all"), ([0.5], [0.5])],
    )
    def test_different_budgets_at_one_place(
        self, write: Any, presets: dict[str, Preset], first: Any, second: Any
    ) -> None:
        steps = [
            {"node": "prune", "at": {"layers": layers}, "budget": {"keep": keep}}
            for layers, keep in ((first, 0.5), (second, 0.7))
        ]
        error = refused(write(yaml.safe_dump({"steps": steps})), presets)
        assert "different budgets" in error.what
        assert "step 2 `prune`" in (error.policy or "")
        assert "step 1 `prune`" in (error.found or "")

    @pytest.mark.parametrize(
        "change",
        [
            {"node": "merge"},
            {"at": {"layers": [4]}},
            {"at": {"layers": [3], "site": "block_output"}},
            {"at": {"layers": [-1]}},  # meets layer 3 in a model of four layers only
            {"budget": {"keep": 0.5}},
            {"protect": {"segment": "image"}},
        ],
    )
    def test_steps_that_do_not_contradict(self, presets: dict[str, Preset], change: dict[str, Any]) -> None:
        base = {"node": "prune", "at": {"layers": [3]}, "budget": {"keep": 0.5}}
        other = {**base, "budget": {"keep": 0.7}, **change}
        assert len(load_policy({"steps": [base, other]}, presets=presets).policy.steps) == 2

    def test_with_a_model_every_meeting_counts(self, presets: dict[str, Preset]) -> None:
        base = {"node": "prune", "at": {"layers": [3]}, "budget": {"keep": 0.5}}
        other = {**base, "at": {"layers": [-1]}, "budget": {"keep": 0.7}}
        steps = load_policy({"steps": [base, other]}, presets=presets).policy.steps
        assert find_conflict(steps, 4) == (0, 1)
        assert find_conflict(steps, 12) is None


class TestHostileFiles:
    def test_python_tags_run_nothing(self, tmp_path: Path, write: Any, presets: dict[str, Preset]) -> None:
        target = tmp_path / "ran"
        for tag in ("object/apply:os.system", "object/new:os.system", "name:os.system", "module:os"):
            error = refused(write(f"steps: []\nname: !!python/{tag} ['touch {target}']\n"), presets)
            assert f"`!!python/{tag}` is refused" in error.what
            assert (error.policy or "").startswith("policy.yaml:2")
        assert not target.exists()

    @pytest.mark.parametrize("tag", ["!!binary aGk=", "!!set {a}", "!!omap [a: 1]", "!custom x", "!!timestamp x"])
    def test_other_tags(self, write: Any, presets: dict[str, Preset], tag: str) -> None:
        error = refused(write(f"name: {tag}\nsteps: []\n"), presets)
        assert (error.policy or "").startswith("policy.yaml:1")

    @pytest.mark.timeout(20)
    def test_alias_bomb(self, write: Any, presets: dict[str, Preset]) -> None:
        lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
        lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
        assert "too large" in refused(write("\n".join(lines)), presets).what

    def test_alias_of_itself(self, write: Any, presets: dict[str, Preset]) -> None:
        assert "contains itself" in refused(write("steps: &a [*a]\n"), presets).what

    def test_deep_nesting(self, write: Any, presets: dict[str, Preset]) -> None:
        assert "nested too deeply" in refused(write("steps: " + "[" * 100_000 + "]" * 100_000), presets).what

    def test_number_of_thousands_of_digits(self, write: Any, presets: dict[str, Preset]) -> None:
        assert "not a number" in refused(write(f"version: {'9' * 10_000}\nsteps: []\n"), presets).what


class TestLayers:
    @pytest.mark.parametrize(
        ("layers", "expected"),
        [
            ("all", (0, 1, 2, 3, 4, 5)),
            ("even", (0, 2, 4)),
            ("odd", (1, 3, 5)),
            ("4:", (4, 5)),
            (":2", (0, 1)),
            ("2:4", (2, 3)),
            ("-2:", (4, 5)),
            ("1::3", (1, 4)),
            ("0:5:2", (0, 2, 4)),
            ([3], (3,)),
            (3, (3,)),
            ([-1, 0], (0, 5)),
            ([0.5], (3,)),
            ([1 / 3, 2 / 3], (2, 4)),
            (["4:", 1], (1, 4, 5)),
        ],
    )
    def test_resolve(self, layers: Any, expected: tuple[int, ...]) -> None:
        assert At(layers=layers).resolve(6) == expected

    def test_evit_layers_as_fractions(self) -> None:
        assert At(layers=(0.25, 0.5, 0.75)).resolve(12) == (3, 6, 9)

    @pytest.mark.parametrize(
        ("layers", "message"),
        [
            ([6], "layer 6 does not exist"),
            ([-7], "layer -7 does not exist"),
            ("2:9", "layer 9 does not exist"),
            ("6:", "no layer is chosen"),
            ("4:2", "no layer is chosen"),
            ([5, -1], "layer 5 is chosen twice"),
            (["2:4", 3], "layer 3 is chosen twice"),
        ],
    )
    def test_layers_that_the_model_has_not(self, layers: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            At(layers=layers).resolve(6)

    @given(st.integers(1, 64), st.data())
    def test_resolved_layers_exist_and_are_sorted(self, depth: int, data: st.DataObject) -> None:
        layers = data.draw(st.lists(st.integers(-depth, depth - 1), min_size=1, unique_by=lambda i: i % depth))
        resolved = At(layers=tuple(layers)).resolve(depth)
        assert all(0 <= layer < depth for layer in resolved)
        assert all(a < b for a, b in itertools.pairwise(resolved))
