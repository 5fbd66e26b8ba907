"""``--backend tensorrt`` from end to end: the folder, its parity, and what is refused with which exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from typer.testing import CliRunner

import tokcc
from tests.cli.tiny_vit import build as tiny_vit
from tests.cli.tiny_vit import pixels
from tests.decoders import tiny
from tests.tensorrt.models import decoder, policy_of, text_shapes
from tests.tensorrt.rtx import build, needs_rtx
from tests.vlm.bundles import compiled as compiled_parts
from tests.zoo.arguments import arguments
from tokcc.backends.tensorrt.graph import lower
from tokcc.backends.tensorrt.profiles import make_profiles
from tokcc.cli import app
from tokcc.errors import LoweringError, PlanError, UsageError
from tokcc.pipeline.bundles import verify
from tokcc.pipeline.tensorrt import calls_within

TINY = f"{Path(__file__).parents[1] / 'cli' / 'tiny_vit.py'}:model"


def shapes(*batches: int) -> dict[str, Any]:
    name, value = next(iter(pixels().items())) if isinstance(pixels(), dict) else ("pixels", pixels())
    return {name: tuple((batch, *value.shape[1:]) for batch in batches)}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tokcc.Bundle:
    """A tiny encoder with TensorRT's folder, beside two other backends."""
    made: tokcc.Bundle = tokcc.compile(
        tiny_vit(),
        {"version": 1, "steps": [{"preset": "tome", "r": 2}]},
        example_inputs=pixels(),
        shapes=shapes(1, 2, 8),
        backends=("onnx", "pt2", "tensorrt"),
        output=tmp_path_factory.mktemp("trt") / "out",
        calibrate=False,
        tensorrt={"plugins": True},
    )
    return made


class TestFolder:
    def test_one_parity_table(self, bundle: tokcc.Bundle) -> None:
        checks = bundle.report.parity.checks
        assert {check.engine for check in checks} == {"onnx", "pt2", "tensorrt"}
        assert all(check.passed for check in checks)
        data = json.loads((bundle.path / "report.json").read_text())
        assert {check["engine"] for check in data["parity"]["checks"]} == {"onnx", "pt2", "tensorrt"}

    def test_the_graph_is_plain(self, bundle: tokcc.Bundle) -> None:
        assert bundle.engine("tensorrt") == bundle.path / "tensorrt" / "model.onnx"
        model = onnx.load(bundle.engine("tensorrt"))
        onnx.checker.check_model(model, full_check=True)
        assert {node.domain for node in model.graph.node} == {""}

    def test_the_other_graph_has_plugins(self, bundle: tokcc.Bundle) -> None:
        model = onnx.load(bundle.path / "tensorrt" / "model_plugins.onnx")
        assert {node.op_type for node in model.graph.node if node.domain == "tokcc"} == {"merge_tokens"}
        assert "tokcc" in {each.domain for each in model.opset_import}
        files = {path.name for path in (bundle.path / "tensorrt" / "plugins").iterdir()}
        assert {"merge_tokens.py", "merge_tokens_jit.py", "tokcc_driver.py"} <= files
        assert [name for name in files if name.endswith(".ptx")]

    def test_it_is_part_of_the_bundle(self, bundle: tokcc.Bundle) -> None:
        assert "tensorrt/model.onnx" in bundle.manifest.files
        assert {check.engine for check in verify(bundle).checks} == {"onnx", "tensorrt"}
        assert verify(bundle).passed

    @needs_rtx
    @pytest.mark.trt
    def test_its_own_command_builds_it(self, bundle: tokcc.Bundle) -> None:
        found = build(bundle.path / "tensorrt")
        assert found["ok"], found


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> tokcc.Bundle:
    """The same in bfloat16."""
    made: tokcc.Bundle = tokcc.compile(
        tiny_vit(),
        {"version": 1, "steps": [{"preset": "tome", "r": 2}]},
        example_inputs=pixels(),
        shapes=shapes(1, 2, 8),
        backends=("tensorrt",),
        output=tmp_path_factory.mktemp("trt") / "out",
        calibrate=False,
        dtype="bf16",
    )
    return made


class TestBfloat16:
    """ONNX Runtime has none: graph and reference are compared in float32."""

    def test_it_is_as_near_as_float32_is(self, rounded: tokcc.Bundle) -> None:
        for check in (*rounded.report.parity.checks, *verify(rounded).checks):
            assert check.engine == "tensorrt"
            assert check.passed
            assert check.max_abs_diff < 1e-4 * check.scale
        assert any("compared in float32" in warning for warning in rounded.report.notes)

    def test_the_graph_itself_is_in_bfloat16(self, rounded: tokcc.Bundle) -> None:
        model = onnx.load(rounded.path / "tensorrt" / "model.onnx")
        types = {value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)}
        assert types == {onnx.TensorProto.BFLOAT16}
        onnx.checker.check_model(model, full_check=True)
        assert "in float32, since it has no bfloat16" in (rounded.path / "tensorrt" / "README.md").read_text()
        assert "TYPE_BF16" in (rounded.path / "tensorrt" / "triton" / "model" / "config.pbtxt").read_text()

    @needs_rtx
    @pytest.mark.trt
    def test_the_builder_takes_it(self, rounded: tokcc.Bundle) -> None:
        found = build(rounded.path / "tensorrt")
        assert found["ok"], found


@pytest.mark.slow
def test_one_parity_table_over_four_backends(tmp_path: Path) -> None:
    made = tokcc.compile(
        tiny_vit(),
        {"version": 1, "steps": [{"preset": "tome", "r": 2}]},
        example_inputs=pixels(),
        shapes=shapes(1, 2, 8),
        backends=("onnx", "aoti", "pt2", "tensorrt"),
        output=tmp_path / "out",
        calibrate=False,
    )
    assert {check.engine for check in made.report.parity.checks} == {"onnx", "aoti", "pt2", "tensorrt"}


def refused(*options: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["compile", TINY, "--backend", "tensorrt", "--no-calibrate", *options])
    return done.exit_code, done.stderr


class TestRefusals:
    @pytest.mark.parametrize("dry_run", [False, True])
    def test_an_unsupported_type(self, tmp_path: Path, dry_run: bool) -> None:
        with pytest.raises(LoweringError, match="DOUBLE") as caught:
            tokcc.compile(
                tiny_vit().double(),
                "evit",
                example_inputs=pixels().double(),
                backends=("tensorrt",),
                output=tmp_path / "out",
                calibrate=False,
                dry_run=dry_run,
            )
        assert caught.value.exit_code == 5
        assert not (tmp_path / "out").exists()

    def test_shapes_that_contradict_the_model(self, tmp_path: Path) -> None:
        three = [f"--{kind}-shapes=nothing:1x3" for kind in ("min", "opt", "max")]
        code, said = refused("-p", "evit", "-o", str(tmp_path / "out"), *three)
        assert code in (2, 4)
        assert "nothing" in said

    @pytest.mark.parametrize(
        ("option", "code", "said"),
        [
            ("plugins=7", 2, "no plugin `7`"),
            ("plugin=true", 2, "no option `plugin`"),
            ("compute_capability=[7.5]", 5, "sm_75"),
            ("compute_capability=fast", 2, "cannot be read"),
        ],
    )
    def test_options(self, tmp_path: Path, option: str, code: int, said: str) -> None:
        options = ["--tensorrt-option", option, "--tensorrt-option", "plugins=true"]
        policy = tmp_path / "p.yaml"
        policy.write_text("version: 1\nsteps:\n- {preset: tome, r: 2}\n")
        given = options[:2] if option.startswith("plugin") else options
        found, text = refused("-p", str(policy), "-o", str(tmp_path / "out"), *given)
        assert found == code, text
        assert said in text
        assert not (tmp_path / "out").exists()

    def test_options_of_a_backend_that_is_not_asked_for(self, tmp_path: Path) -> None:
        done = CliRunner().invoke(
            app, ["compile", TINY, "-p", "evit", "-o", str(tmp_path / "out"), "--tensorrt-option", "plugins=true"]
        )
        assert done.exit_code == 2
        assert "tensorrt" in done.stderr


class TestInspect:
    def test_a_legal_graph(self) -> None:
        done = CliRunner().invoke(app, ["inspect", TINY, "--backend", "tensorrt", "-p", "evit", "--json"])
        assert done.exit_code == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["legal"]
        assert found["operations"]["TopK"] > 0
        assert found["violations"] == []

    def test_an_illegal_one(self, tmp_path: Path) -> None:
        policy = tmp_path / "p.yaml"
        policy.write_text("version: 1\nsteps:\n- preset: agent-memory-q4\n")
        reduced, _ = decoder(str(policy))
        assert reduced.caches is not None
        folder = tmp_path / "llama"
        tiny.model_of("llama").save_pretrained(folder)
        three = ["--min-shapes=input_ids:1x1,attention_mask:1x1", "--opt-shapes=input_ids:1x8,attention_mask:1x16"]
        three.append("--max-shapes=input_ids:2x16,attention_mask:2x64")
        command = ["inspect", str(folder), "--task", "text-generation", "--backend", "tensorrt", "-p", str(policy)]
        done = CliRunner().invoke(app, [*command, *three, "--json"])
        assert done.exit_code == 5, done.stderr
        found = json.loads(done.stdout)
        assert not found["legal"]
        assert "UINT8" in found["violations"][0]["what"]
        assert "step 1 `agent-memory-q4`" in found["violations"][0]["policy"]

    def test_a_policy_is_for_a_backend(self) -> None:
        assert CliRunner().invoke(app, ["inspect", TINY, "-p", "evit"]).exit_code == 2


class TestDecoders:
    def test_two_ways_are_refused_with_what_to_do(self) -> None:
        policy = policy_of({"version": 1, "steps": [{**arguments("quest"), "length": 32}]})
        reduced, _ = decoder(policy.policy)
        profiles = make_profiles(reduced.sliced, {}, text_shapes((1, 8, 16), (1, 64, 128)))
        with pytest.raises(LoweringError, match="two ways") as caught:
            lower(reduced.sliced, profiles, policy).legal(policy)
        assert "step 1 `quest`" in (caught.value.policy or "")
        assert "single tokens" in (caught.value.help or "")
        # Sizes are those of the inputs: the text with what the call adds.
        assert "`input_ids_1+past_key_values_0_key_2` from" in (caught.value.needed or "")
        assert "reduced" not in (caught.value.found or "")

    def test_calls_that_an_engine_is_not_made_for_are_not_compared(self) -> None:
        reduced, _ = decoder("none")
        profiles = make_profiles(reduced.sliced, {}, text_shapes((8, 12, 16), (8, 12, 16)))
        example = {"input_ids": torch.full((2, 4), 40), "attention_mask": torch.ones(2, 4, dtype=torch.int64),
                   "position_ids": torch.zeros(2, 4, dtype=torch.int64)}  # fmt: skip
        feeds, expected = calls_within(reduced, reduced.program, profiles, [example], [[]], 0)
        assert [feed["input_ids"].shape[1] for feed in feeds] == [12]
        assert len(expected) == 1

    @pytest.mark.parametrize("family", ["llama"])
    def test_a_folder_of_one_text_at_a_time(self, tmp_path: Path, family: str) -> None:
        folder = tmp_path / family
        tiny.model_of(family).save_pretrained(folder)
        made = tokcc.compile(
            str(folder),
            {"version": 1, "steps": [{"preset": "h2o", "budget": {"kv": {"sinks": 2, "recent": 4, "heavy": 4}}}]},
            task="text-generation",
            shapes={
                "input_ids": ((1, 1), (1, 1), (1, 16)),
                "attention_mask": ((1, 1), (1, 32), (1, 64)),
            },
            backends=("onnx", "tensorrt"),
            output=tmp_path / "out",
            calibrate=False,
        )
        assert {check.engine for check in made.report.parity.checks} == {"onnx", "tensorrt"}
        assert verify(made).passed
        shapes = json.loads((made.path / "tensorrt" / "profiles.json").read_text())["profiles"]
        assert [profile["name"] for profile in shapes] == ["default", "single tokens"]
        assert shapes[0]["shapes"]["past_key_values.0.key"]["max"][2] == 10

    @pytest.mark.slow
    def test_a_model_in_parts(self, tmp_path: Path) -> None:
        shapes = {
            "pixel_values": tuple((units, 3, 32, 32) for units in (1, 1, 2)),
            "input_ids": ((1, 1), (1, 8), (2, 64)),
            "inputs_embeds": ((1, 1, 32), (1, 8, 32), (2, 64, 32)),
            "attention_mask": ((1, 1), (1, 16), (2, 128)),
        }
        policy = {"version": 1, "steps": [{"preset": "fastervlm", "tokens": 5}, {"preset": "h2o", "tokens": 12}]}
        made = compiled_parts("llava", tmp_path / "out", policy, backends=("onnx", "tensorrt"), shapes=shapes)
        for name in made.manifest.parts:
            part = made.part(name)
            assert {check.engine for check in part.report.parity.checks} == {"onnx", "tensorrt"}
            folder = part.engine("tensorrt").parent
            assert (folder / "triton" / folder.name / "config.pbtxt").is_file()
        with pytest.raises(UsageError, match="no input of any part"):
            compiled_parts("llava", tmp_path / "o", policy, backends=("tensorrt",), shapes={**shapes, "x": ((1,),) * 3})

    def test_shapes_that_no_first_call_has(self) -> None:
        reduced, _ = decoder("none")
        given = text_shapes((8, 8, 8), (8, 8, 8)) | {"past_key_values.0.key": ((1, 2, 4, 16),) * 3}
        given["past_key_values.0.key"] = ((1, 2, 4, 16), (2, 2, 4, 16), (4, 2, 4, 16))
        profiles = make_profiles(reduced.sliced, {}, given)
        example = {"input_ids": torch.full((2, 4), 40), "attention_mask": torch.ones(2, 4, dtype=torch.int64),
                   "position_ids": torch.zeros(2, 4, dtype=torch.int64)}  # fmt: skip
        with pytest.raises(PlanError, match="cannot be checked"):
            calls_within(reduced, reduced.program, profiles, [example], [[]], 0)
