"""Bundles are written all or nothing, and damage is found."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tokcc.backends import atomic, leftovers
from tokcc.backends.bundle import BackendEntry, Bundle, BundleWriter, Manifest, TensorContract
from tokcc.errors import OutputError, UsageError


def manifest(**changes: Any) -> Manifest:
    base = Manifest(tokcc="0.1.0", created="2026-01-01T00:00:00Z", model="toy", policy="tome")
    return base.model_copy(update=changes)


def write_bundle(output: Path, text: str = "engine", **options: Any) -> Bundle:
    with BundleWriter(output, **options) as writer:
        (writer.path / "model.onnx").write_text(text)
        (writer.path / "figures").mkdir(exist_ok=True)
        (writer.path / "figures" / "one.svg").write_text("<svg/>")
        return writer.commit(manifest(backends={"onnx": BackendEntry(engine="model.onnx", details={"opset": 18})}))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=["swap", "two renames"])
def rename_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "two renames":
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    return str(request.param)


class TestWrite:
    def test_new_bundle(self, tmp_path: Path) -> None:
        bundle = write_bundle(tmp_path / "deep" / "out")
        assert bundle.engine("onnx").read_text() == "engine"
        assert set(bundle.manifest.files) == {"model.onnx", "figures/one.svg"}
        assert bundle.manifest.files["model.onnx"].bytes == 6
        assert os.listdir(tmp_path / "deep") == ["out"]
        assert Bundle.open(tmp_path / "deep" / "out").manifest == bundle.manifest
        umask = os.umask(0)
        os.umask(umask)
        assert bundle.path.stat().st_mode & 0o777 == 0o777 & ~umask

    @pytest.mark.usefixtures("rename_way")
    def test_force_replaces_all_of_it(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        write_bundle(out, "first")
        (out / "stray.txt").write_text("x")
        write_bundle(out, "second", force=True)
        assert (out / "model.onnx").read_text() == "second"
        assert not (out / "stray.txt").exists()
        assert os.listdir(tmp_path) == ["out"]

    def test_an_empty_folder_needs_no_force(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        write_bundle(tmp_path / "out").verify()

    def test_a_link_stays_a_link(self, tmp_path: Path) -> None:
        write_bundle(tmp_path / "real", "first")
        (tmp_path / "out").symlink_to("real")
        write_bundle(tmp_path / "out", "second", force=True)
        assert (tmp_path / "out").is_symlink()
        assert (tmp_path / "real" / "model.onnx").read_text() == "second"

    def test_base_keeps_the_other_files(self, tmp_path: Path) -> None:
        old = write_bundle(tmp_path / "out")
        with BundleWriter(old.path, force=True, base=old) as writer:
            (writer.path / "report.html").write_text("new")
            new = writer.commit(old.manifest)
        new.verify()
        assert new.engine("onnx").read_text() == "engine"
        assert set(new.manifest.files) == {"model.onnx", "figures/one.svg", "report.html"}

    def test_without_commit_nothing_stays(self, tmp_path: Path) -> None:
        with BundleWriter(tmp_path / "deep" / "er" / "out") as writer:
            (writer.path / "model.onnx").write_text("x")
        assert os.listdir(tmp_path) == []
        with pytest.raises(RuntimeError, match="not open"):
            writer.path  # noqa: B018


class TestRefuse:
    def test_existing_bundle_without_force(self, tmp_path: Path) -> None:
        write_bundle(tmp_path / "out")
        before = tree(tmp_path)
        with pytest.raises(UsageError, match="--force"), BundleWriter(tmp_path / "out"):
            pytest.fail("entered")
        assert tree(tmp_path) == before

    @pytest.mark.parametrize("force", [False, True])
    def test_a_folder_that_is_no_bundle(self, tmp_path: Path, force: bool) -> None:
        (tmp_path / "thesis.tex").write_text("years of work")
        with pytest.raises(UsageError, match="other things in it"), BundleWriter(tmp_path, force=force):
            pytest.fail("entered")
        assert (tmp_path / "thesis.tex").exists()

    @pytest.mark.parametrize("force", [False, True])
    def test_a_file(self, tmp_path: Path, force: bool) -> None:
        (tmp_path / "out").write_text("x")
        with pytest.raises(UsageError, match="is a file"), BundleWriter(tmp_path / "out", force=force):
            pytest.fail("entered")

    def test_a_parent_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        with pytest.raises(OutputError) as caught, BundleWriter(tmp_path / "file" / "out"):
            pytest.fail("entered")
        assert caught.value.found == os.strerror(errno.ENOTDIR)

    def test_no_permission(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # Root may write everywhere, so the system call itself is made to refuse.
        def refuse(**_: Any) -> str:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr(tempfile, "mkdtemp", refuse)
        with pytest.raises(OutputError, match="may write to") as caught, BundleWriter(tmp_path / "deep" / "out"):
            pytest.fail("entered")
        assert caught.value.found == os.strerror(errno.EACCES)
        assert os.listdir(tmp_path) == []


def killed_while_writing(output: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from tokcc.backends.bundle import BundleWriter\n"
        "with BundleWriter(sys.argv[1], force=True) as writer:\n"
        "    (writer.path / 'model.onnx').write_text('second')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(output)], check=False)
    assert done.returncode == -signal.SIGKILL


class TestInterrupted:
    @pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
    def test_the_previous_bundle_stays(self, tmp_path: Path, error: type[BaseException]) -> None:
        write_bundle(tmp_path / "out", "first")
        before = tree(tmp_path)

        def interrupted() -> None:
            with BundleWriter(tmp_path / "out", force=True) as writer:
                (writer.path / "model.onnx").write_text("second")
                raise error

        with pytest.raises(error):
            interrupted()
        assert tree(tmp_path) == before
        assert os.listdir(tmp_path) == ["out"]

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    def test_a_full_disk(self, tmp_path: Path) -> None:
        write_bundle(tmp_path / "out", "first")
        before = tree(tmp_path)

        def fill() -> None:
            with BundleWriter(tmp_path / "out", force=True) as writer:
                (writer.path / "model.onnx").write_text("second")
                with open("/dev/full", "w") as disk:
                    disk.write("x")

        with pytest.raises(OutputError) as caught:
            fill()
        assert caught.value.found == os.strerror(errno.ENOSPC)
        assert "free some space" in (caught.value.help or "")
        assert tree(tmp_path) == before
        assert os.listdir(tmp_path) == ["out"]

    @pytest.mark.parametrize(
        "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), RuntimeError("x: No space left on device")]
    )
    def test_a_disk_that_fills_up_in_a_writer_of_its_own(self, tmp_path: Path, error: Exception) -> None:
        with pytest.raises(OutputError, match="free some space"), BundleWriter(tmp_path / "out"):
            raise error
        assert os.listdir(tmp_path) == []

    def test_other_errors_pass(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError), BundleWriter(tmp_path / "out"):
            (tmp_path / "elsewhere").read_text()

    def test_a_disk_that_fills_up_in_commit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_bundle(tmp_path / "out", "first")
        before = tree(tmp_path)

        def full(self: Manifest, folder: Path) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

        monkeypatch.setattr(Manifest, "save", full)
        with pytest.raises(OutputError, match="free some space"):
            write_bundle(tmp_path / "out", "second", force=True)
        assert tree(tmp_path) == before

    def test_a_failure_between_the_two_renames(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_bundle(tmp_path / "out", "first")
        before = tree(tmp_path)
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
        rename = Path.rename

        def fail_second(self: Path, target: Path) -> Path:
            if ".tmp-" in self.name and ".tmp-old-" not in self.name:
                raise KeyboardInterrupt
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", fail_second)
        with pytest.raises(KeyboardInterrupt):
            write_bundle(tmp_path / "out", "second", force=True)
        assert tree(tmp_path) == before

    @pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
    def test_a_killed_process(self, tmp_path: Path) -> None:
        write_bundle(tmp_path / "out", "first")
        before = tree(tmp_path / "out")
        killed_while_writing(tmp_path / "out")
        assert tree(tmp_path / "out") == before
        write_bundle(tmp_path / "out", "third", force=True).verify()


class TestLeftovers:
    """What was left by a process that was killed goes; everything else stays."""

    pytestmark = pytest.mark.skipif(leftovers._world() is None, reason="processes cannot be told apart here")

    @pytest.fixture
    def dead(self) -> int:
        process = subprocess.Popen([sys.executable, "-c", ""])
        process.wait()
        return process.pid

    def name(self, process: int | str, *, world: str | None = None) -> str:
        return f".out.tmp-{world or leftovers._world()}-{process}-abc12_z9"

    def test_of_a_killed_process(self, tmp_path: Path) -> None:
        killed_while_writing(tmp_path / "out")
        (left,) = os.listdir(tmp_path)
        write_bundle(tmp_path / "other")
        assert sorted(os.listdir(tmp_path)) == [left, "other"], "another bundle's writer leaves it alone"
        write_bundle(tmp_path / "out")
        assert sorted(os.listdir(tmp_path)) == ["other", "out"]

    def test_of_a_dead_process(self, tmp_path: Path, dead: int) -> None:
        (tmp_path / self.name(dead) / "figures").mkdir(parents=True)
        write_bundle(tmp_path / "out")
        assert os.listdir(tmp_path) == ["out"]

    def test_of_a_live_process(self, tmp_path: Path) -> None:
        with BundleWriter(tmp_path / "out") as first:
            write_bundle(tmp_path / "out", "second")
            assert first.path.is_dir()

    def test_of_others(self, tmp_path: Path, dead: int) -> None:
        folders = [
            self.name(1),
            self.name(dead, world="0123456789ab"),
            self.name(dead).replace(".tmp-", ".tmp-old-"),
            self.name(dead).replace(".out", ".out2"),
            self.name(f"{dead}x"),
            ".out.tmp-abc12_z9",
        ]
        for folder in folders:
            (tmp_path / folder).mkdir()
        (tmp_path / self.name(dead)).symlink_to(tmp_path / folders[0])
        (tmp_path / self.name(dead).replace("z9", "z8")).write_text("a file")
        before = set(os.listdir(tmp_path))
        write_bundle(tmp_path / "out")
        assert set(os.listdir(tmp_path)) == before | {"out"}

    def test_where_processes_cannot_be_told_apart(
        self, tmp_path: Path, dead: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / self.name(dead)).mkdir()
        (tmp_path / self.name(dead, world="x")).mkdir()
        monkeypatch.setattr(leftovers, "_world", lambda: None)
        write_bundle(tmp_path / "out")
        assert len(os.listdir(tmp_path)) == 3


class TestRead:
    def test_damage(self, tmp_path: Path) -> None:
        bundle = write_bundle(tmp_path / "out")
        bundle.verify()
        (bundle.path / "model.onnx").write_text("enginE")
        (bundle.path / "figures" / "one.svg").unlink()
        (bundle.path / "new.txt").write_text("x")
        assert bundle.damage() == {
            "figures/one.svg": "missing",
            "model.onnx": "changed",
            "new.txt": "not in the manifest",
        }
        with pytest.raises(OutputError, match="damaged"):
            bundle.verify()

    def test_no_bundle(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="no such folder"):
            Bundle.open(tmp_path / "nothing")
        with pytest.raises(UsageError, match=r"no `manifest\.json` in it"):
            Bundle.open(tmp_path)

    @pytest.mark.parametrize("text", ["", "{}", "[]", '{"manifest_version": 2}', "\u0000"])
    def test_unreadable_manifest(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(UsageError, match="cannot read"):
            Bundle.open(tmp_path)

    @pytest.mark.parametrize("name", ["/etc/passwd", "../model.onnx", "a/../../b", ""])
    def test_engines_outside_the_bundle_are_refused(self, tmp_path: Path, name: str) -> None:
        bundle = write_bundle(tmp_path / "out")
        path = bundle.path / "manifest.json"
        path.write_text(path.read_text().replace('"engine": "model.onnx"', f'"engine": "{name}"'))
        with pytest.raises(UsageError, match="not a path inside the bundle"):
            Bundle.open(bundle.path)

    def test_unknown_engine(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="--backend aoti"):
            write_bundle(tmp_path / "out").engine("aoti")

    def test_run(self, tmp_path: Path) -> None:
        shape: list[str | int | None] = ["batch", 3]
        graph = helper.make_graph(
            [helper.make_node("Add", ["x", "x"], ["y"])],
            "double",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        contract = TensorContract(name="x", dtype="float32", shape=("batch", 3))
        with BundleWriter(tmp_path / "out") as writer:
            onnx.save(model, writer.path / "model.onnx")
            bundle = writer.commit(manifest(inputs=(contract,), backends={"onnx": BackendEntry(engine="model.onnx")}))
        x = np.arange(6, dtype=np.float32).reshape(2, 3)
        np.testing.assert_array_equal(bundle.run({"x": x})["y"], 2 * x)
        with pytest.raises(UsageError, match="another dtype"):
            bundle.run({"x": x.astype(np.float64)})
        with pytest.raises(UsageError, match="not those of the engine"):
            bundle.run({"input": x})
        with pytest.raises(UsageError, match="another shape"):
            bundle.run({"x": x[:, :2]})

    def test_a_bundle_can_be_moved(self, tmp_path: Path) -> None:
        bundle = write_bundle(tmp_path / "out")
        shutil.move(bundle.path, tmp_path / "moved")
        moved = Bundle.open(tmp_path / "moved")
        moved.verify()
        assert moved.engine("onnx") == tmp_path / "moved" / "model.onnx"
