"""Every bad input gives one screen that says what, where and what to do, its exit code, and leaves the output alone."""

from __future__ import annotations

import errno
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from tests.cli.signals import heed_signals
from tests.cli.tiny_vit import build, pixels
from tokcc.cli import app
from tokcc.errors import ParityError
from tokcc.pipeline import engines

HERE = Path(__file__).with_name("tiny_vit.py")
TINY = f"{HERE}:model"
ONE_SCREEN = 12


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a bundle from an earlier compile."""
    out = tmp_path_factory.mktemp("earlier") / "out"
    done = CliRunner().invoke(app, ["compile", TINY, "-p", "none", "-o", str(out), "--no-calibrate"])
    assert done.exit_code == 0, done.stderr
    return tree(out)


@pytest.fixture
def out(tmp_path: Path, earlier: dict[str, bytes]) -> Path:
    folder = tmp_path / "work" / "out"
    for name, content in earlier.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str) -> Path:
        path = tmp_path / "policy.yaml"
        path.write_text(text)
        return path

    return write


class Refuses:
    """Compiles something bad over an existing bundle."""

    def __init__(self, out: Path, earlier: dict[str, bytes]) -> None:
        self.out, self.earlier = out, earlier

    def __call__(self, code: int, *texts: str, model: object = TINY, policy: object = "evit", options: Any = ()) -> str:
        arguments = [model, "-p", policy, "-o", self.out, "--force", *options]
        result = CliRunner().invoke(app, ["compile", *map(str, arguments)], env={"COLUMNS": "100"})
        screen = result.stderr[result.stderr.find("error[") :]
        assert result.exit_code == code, result.stderr
        assert screen.startswith("error["), result.stderr
        assert len(screen.splitlines()) <= ONE_SCREEN, screen
        assert "Traceback" not in result.stderr
        assert result.stdout == ""
        for text in texts:
            assert text in screen, screen
        self.untouched()
        return screen

    def untouched(self) -> None:
        assert tree(self.out) == self.earlier
        assert os.listdir(self.out.parent) == ["out"]


@pytest.fixture
def refuses(out: Path, earlier: dict[str, bytes]) -> Refuses:
    return Refuses(out, earlier)


class Trap:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


class TestModels:
    def test_missing(self, refuses: Refuses, tmp_path: Path) -> None:
        refuses(3, "nowhere.pt", model=tmp_path / "nowhere.pt")

    def test_empty(self, refuses: Refuses, tmp_path: Path) -> None:
        (tmp_path / "empty.pt").touch()
        refuses(3, "empty", "help", model=tmp_path / "empty.pt")

    def test_truncated(self, refuses: Refuses, tmp_path: Path) -> None:
        torch.export.save(torch.export.export(build(), (pixels(),)), tmp_path / "whole.pt2")
        whole = (tmp_path / "whole.pt2").read_bytes()
        (tmp_path / "half.pt2").write_bytes(whole[: len(whole) // 2])
        refuses(3, "half.pt2", "help", model=tmp_path / "half.pt2")

    def test_pickle(self, refuses: Refuses, tmp_path: Path) -> None:
        torch.save(nn.Linear(2, 2), tmp_path / "m.pt")
        refuses(3, "--allow-pickle", "help", model=tmp_path / "m.pt")

    @pytest.mark.parametrize("how", ["torch", "pickle"])
    def test_malicious_pickle(self, refuses: Refuses, tmp_path: Path, how: str) -> None:
        trap, path = tmp_path / "sprung", tmp_path / "m.pt"
        if how == "torch":
            torch.save({"model": Trap(trap)}, path)
        else:
            path.write_bytes(pickle.dumps(Trap(trap)))
        refuses(3, "m.pt", model=path)
        assert not trap.exists()

    def test_state_dict(self, refuses: Refuses, tmp_path: Path) -> None:
        torch.save(build().state_dict(), tmp_path / "weights.pt")
        refuses(3, "state_dict", "help", model=tmp_path / "weights.pt")

    def test_no_example_inputs(self, refuses: Refuses) -> None:
        refuses(2, "--input", model=f"{HERE}:bare")

    def test_no_such_factory(self, refuses: Refuses) -> None:
        refuses(3, "modle", "did you mean", ":model?", model=f"{HERE}:modle")


class TestPolicies:
    def test_missing(self, refuses: Refuses, tmp_path: Path) -> None:
        refuses(2, "nowhere.yaml", policy=tmp_path / "nowhere.yaml")

    def test_misspelt_name(self, refuses: Refuses) -> None:
        refuses(2, "tomee", "did you mean `tome`?", policy="tomee")

    def test_misspelt_preset(self, refuses: Refuses, write: Any) -> None:
        refuses(2, "policy.yaml:3", "evitt", "did you mean `evit`?", policy=write("steps:\n\n- preset: evitt\n"))

    def test_misspelt_key(self, refuses: Refuses, write: Any) -> None:
        text = "steps:\n- preset: evit\n  protekt: {first: 1}\n"
        refuses(2, "policy.yaml:3", "protekt", "protect", policy=write(text))

    @pytest.mark.parametrize("value", ["0", "1.7", "-1", "abc"])
    def test_keep(self, refuses: Refuses, write: Any, value: str) -> None:
        text = f"steps:\n- preset: evit\n  budget:\n    keep: {value}\n"
        refuses(2, "policy.yaml:4", "keep", "needed", "found", value, policy=write(text))

    def test_misspelt_piece(self, refuses: Refuses, write: Any) -> None:
        text = "steps:\n- preset: evit\n  score: {kind: attention_row}\n"
        refuses(2, "policy.yaml:3", "did you mean `attention_rows`?", policy=write(text))

    def test_contradiction(self, refuses: Refuses, write: Any) -> None:
        first = "- preset: evit\n  at: {layers: [1]}\n"
        second = "- preset: uniform\n  at: {layers: [-1]}\n  budget: {keep: 0.3}\n"
        refuses(2, "policy.yaml:4", "policy.yaml:2", "help", policy=write("steps:\n" + first + second))

    def test_a_layer_that_is_not_there(self, refuses: Refuses, write: Any) -> None:
        text = "steps:\n- preset: evit\n  at: {layers: [7]}\n"
        refuses(4, "policy.yaml:3", "7", "between 0 and 1", "tokcc inspect", policy=write(text))

    def test_an_output_that_is_not_there(self, refuses: Refuses, write: Any) -> None:
        text = "steps:\n- preset: evit\noutputs: {token: reduced}\n"
        refuses(4, "token", "did you mean `tokens`?", policy=write(text))

    def test_a_class_token_that_is_not_there(self, refuses: Refuses) -> None:
        refuses(4, "class token", "help", model=f"{HERE}:odd_operation")


class TestGraphs:
    def test_conv_over_tokens(self, refuses: Refuses) -> None:
        refuses(
            4,
            "AxisError",
            "layer 0",
            "node",
            "splits the token axis",
            "restore",
            policy="tome",
            model=f"{HERE}:conv_over_tokens",
        )

    def test_conv_over_tokens_with_the_remedy(self, tmp_path: Path, write: Any) -> None:
        policy = write("steps:\n- preset: tome\n  r: 4\n  restore: unmerge\n")
        arguments = ["compile", f"{HERE}:conv_over_tokens", "-p", policy, "-o", tmp_path / "new", "--no-calibrate"]
        assert CliRunner().invoke(app, [str(part) for part in arguments]).exit_code == 0

    def test_windows(self, refuses: Refuses, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        config = transformers.SwinConfig(
            image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4
        )
        transformers.SwinModel(config).save_pretrained(tmp_path / "swin")
        refuses(4, "AxisError", "layer", "node", "windows", "restore", policy="tome", model=tmp_path / "swin")

    def test_an_operation_without_a_rule(self, refuses: Refuses) -> None:
        refuses(4, "AxisError", "cummax", "node", policy="tome", model=f"{HERE}:odd_operation")

    def test_an_operation_without_onnx_form(self, refuses: Refuses) -> None:
        refuses(5, "LoweringError", "cummax", "node", policy="none", model=f"{HERE}:odd_operation")


class TestOptions:
    def test_shapes_that_do_not_fit(self, refuses: Refuses) -> None:
        refuses(3, "help", options=("--input", "pixels=float32[2,3,20,16]"))

    def test_another_name(self, refuses: Refuses) -> None:
        refuses(2, "pixel", "pixels", options=("--input", "pixel=float32[2,3,16,16]"))

    def test_data_of_another_shape(self, refuses: Refuses, tmp_path: Path) -> None:
        np.savez(tmp_path / "data.npz", pixels=np.zeros((2, 3, 9, 9), np.float32))
        refuses(2, "pixels", "needed", "found", options=("--calib", tmp_path / "data.npz"))

    def test_a_gate_that_cannot_be_read(self, refuses: Refuses) -> None:
        refuses(2, "cosin", "did you mean cosine?", options=("--gate", "cosin>=1"))

    @pytest.mark.parametrize(
        ("options", "code"), [(("--opset", "17"), 5), (("--device", "tpu"), 2), (("--dtype", "float12"), 2)]
    )
    def test_what_there_is_not(self, refuses: Refuses, options: tuple[str, ...], code: int) -> None:
        refuses(code, options[1], options=options)

    def test_existing_output(self, out: Path, refuses: Refuses) -> None:
        start = time.monotonic()
        result = CliRunner().invoke(app, ["compile", TINY, "-p", "evit", "-o", str(out)])
        assert result.exit_code == 2
        assert "--force" in result.stderr
        assert "capture" not in result.stderr  # it is refused before the long work
        assert time.monotonic() - start < 5
        refuses.untouched()


class TestEngines:
    def test_a_wrong_engine_is_not_left_behind(self, refuses: Refuses, monkeypatch: pytest.MonkeyPatch) -> None:
        from tokcc.lowering.onnx import table

        def wrong(t: Any, node: Any, x: Any, **kwargs: Any) -> Any:
            return t.op("Tanh", t.value(x))

        lowerings = {**table.lowerings(), torch.ops.aten.gelu.default: wrong}
        monkeypatch.setattr(table, "lowerings", lambda: lowerings)
        refuses(6, "output `", "needed", "found")

    def test_a_new_output_is_not_left_behind(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def differs(*arguments: Any) -> None:
            raise ParityError("the onnx engine differs from its reference")

        monkeypatch.setattr(engines, "check_engine", differs)
        result = CliRunner().invoke(app, ["compile", TINY, "-p", "evit", "-o", str(tmp_path / "deep" / "out")])
        assert result.exit_code == 6
        assert list(tmp_path.iterdir()) == []


class TestDisk:
    def test_full_while_the_engine_is_written(self, refuses: Refuses, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(model: Any, path: Path, **options: Any) -> None:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        monkeypatch.setattr(engines, "save_onnx", full)
        refuses(5, "OutputError", "No space left", "free some space")

    @pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
    def test_a_disk_that_is_full(self, tmp_path: Path) -> None:
        disk = tmp_path / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
        if subprocess.run(mount, check=False, capture_output=True).returncode:
            pytest.skip("mounting is not allowed here")
        try:
            result = CliRunner().invoke(app, ["compile", TINY, "-p", "evit", "-o", str(disk / "out")])
            assert result.exit_code == 5, result.stderr
            assert "No space left" in result.stderr
            assert list(disk.iterdir()) == []
        finally:
            subprocess.run(["umount", str(disk)], check=True)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_a_folder_that_may_not_be_written(self, tmp_path: Path) -> None:
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o555)
        result = CliRunner().invoke(app, ["compile", TINY, "-p", "evit", "-o", str(closed / "out")])
        assert result.exit_code == 5
        assert "Permission denied" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(out: Path, refuses: Refuses, number: signal.Signals) -> None:
    """Half-way through, in a process of its own."""
    command = [sys.executable, "-m", "tokcc", "compile", TINY, "-p", "evit", "-o", str(out), "--force"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=heed_signals
    ) as process:
        assert process.stderr is not None
        seen = ""
        for line in process.stderr:
            seen += line
            if line.startswith("insert and propagate"):
                assert len(os.listdir(out.parent)) == 2  # the temporary folder is there
                process.send_signal(number)
                break
        rest = process.stderr.read()
        code = process.wait(timeout=60)
    assert code == (130 if number is signal.SIGINT else 143), seen + rest
    assert "Traceback" not in rest
    if number is signal.SIGINT:
        assert re.search("interrupted; nothing half-written", rest)
    refuses.untouched()
