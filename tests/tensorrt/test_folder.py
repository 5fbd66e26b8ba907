"""The folder that TensorRT users build from: its commands, its files for the server, its text."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest

from tokcc.backends.tensorrt.folder import Described, write_folder
from tokcc.backends.tensorrt.profiles import Profile
from tokcc.backends.tensorrt.server import Tensor, repository_config

IMAGES = Profile("default", {"x": ((1, 3, 32, 32), (4, 3, 32, 32), (8, 3, 32, 32))})
LOGITS = Tensor("logits", "float32", ("batch", 10))
X = Tensor("x", "float32", ("batch", 3, 32, 32))
TEXTS = {"past.0:key": ((1, 2, 0, 16), (1, 2, 8, 16), (4, 2, 64, 16)), "ids": ((1, 1), (1, 1), (4, 16))}


@pytest.fixture(scope="module")
def config_class() -> Any:
    """The server's own definition of its files: its package would import grpc, which this one file does not need."""
    pytest.importorskip("google.protobuf", reason="needs protobuf")
    path = Path(str(distribution("tritonclient").locate_file("tritonclient/grpc/model_config_pb2.py")))
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ModelConfig


def parsed(config_class: Any, *given: Any) -> Any:
    from google.protobuf import text_format

    return text_format.Parse(repository_config(*given), config_class())


class TestServer:
    def test_the_server_batches_where_all_share_the_batch(self, config_class: Any) -> None:
        config = parsed(config_class, [X], [LOGITS], [IMAGES])
        assert config.max_batch_size == 8
        assert list(config.input[0].dims) == [3, 32, 32]
        assert config.input[0].data_type == 11  # TYPE_FP32
        assert list(config.output[0].dims) == [10]
        assert config.HasField("dynamic_batching")
        assert list(config.instance_group[0].profile) == ["0"]

    def test_it_does_not_where_one_has_no_batch(self, config_class: Any) -> None:
        config = parsed(config_class, [X, Tensor("t", "int64", ("T",))], [LOGITS], [IMAGES])
        assert config.max_batch_size == 0
        assert list(config.input[0].dims) == [-1, 3, 32, 32]
        assert not config.HasField("dynamic_batching")

    def test_a_number_is_written_as_one_element(self, config_class: Any) -> None:
        config = parsed(config_class, [X], [Tensor("loss", "float16", ())], [IMAGES])
        assert list(config.output[0].dims) == [1]
        assert list(config.output[0].reshape.shape) == []

    def test_several_profiles(self, config_class: Any) -> None:
        config = parsed(config_class, [X], [LOGITS], [IMAGES, IMAGES])
        assert list(config.instance_group[0].profile) == ["0", "1"]


def recorded(folder: Path) -> list[str]:
    """Run ``build.sh`` with a ``trtexec`` that writes its arguments down."""
    tools = folder.parent / "bin"
    tools.mkdir()
    fake = tools / "trtexec"
    fake.write_text('#!/bin/sh\nfor each in "$@"; do printf "%s\\n" "$each"; done > arguments.txt\n')
    fake.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    subprocess.run(["sh", str(folder / "build.sh"), "--builderOptimizationLevel=5"], check=True, env=environment)
    return (folder / "arguments.txt").read_text().splitlines()


class TestScript:
    def test_the_shapes_of_one_profile(self, tmp_path: Path) -> None:
        folder = tmp_path / "a folder"
        folder.mkdir()
        write_folder(folder, Described("tome", [X], [LOGITS], [IMAGES], "float32"))
        given = recorded(folder)
        assert "--minShapes=x:1x3x32x32" in given
        assert "--optShapes=x:4x3x32x32" in given
        assert "--maxShapes=x:8x3x32x32" in given
        assert not [each for each in given if each.startswith("--profile")]
        assert given[0] == "--onnx=model.onnx"
        assert given[-1] == "--builderOptimizationLevel=5"
        assert "--saveEngine=triton/model/1/model.plan" in given
        assert (folder / "triton" / "model" / "1").is_dir()

    def test_several_profiles_and_names_with_colons(self, tmp_path: Path) -> None:
        folder = tmp_path / "t"
        folder.mkdir()
        inputs = [Tensor("past.0:key", "float32", ("batch", 2, "past", 16)), Tensor("ids", "int64", ("batch", "n"))]
        profiles = [Profile("default", TEXTS), Profile("single tokens", TEXTS)]
        write_folder(folder, Described("h2o", inputs, [LOGITS], profiles, "float32"))
        given = recorded(folder)
        assert given.index("--profile=0") < given.index("--profile=1")
        assert given.count("--maxShapes=past.0:key:4x2x64x16,ids:4x16") == 2

    def test_nothing_is_said_of_fixed_shapes(self, tmp_path: Path) -> None:
        folder = tmp_path / "t"
        folder.mkdir()
        fixed = Tensor("x", "float32", (1, 3, 32, 32))
        write_folder(folder, Described("tome", [fixed], [LOGITS], [IMAGES], "float32"))
        assert not [each for each in recorded(folder) if "Shapes" in each]


class TestText:
    def test_the_folder_says_how_to_build_and_what_was_not_run(self, tmp_path: Path) -> None:
        write_folder(tmp_path, Described("tome", [X], [LOGITS], [IMAGES], "float32", ("merge_tokens",)))
        text = (tmp_path / "README.md").read_text()
        assert "python build_engine.py --rtx" in text
        assert "not run" in text
        assert "1x3x32x32 | 4x3x32x32 | 8x3x32x32" in text
        assert "`merge_tokens`" in text
        assert (tmp_path / "build_engine.py").read_text().startswith('"""Build the engine')
