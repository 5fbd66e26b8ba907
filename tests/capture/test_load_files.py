"""Model files: what each is told to be by its content, and what a user is told to do."""

from __future__ import annotations

import io
import json
import os
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from tests.zoo import ZOO
from tokcc.capture.load import Loaded, load
from tokcc.errors import CaptureError, LoadError, UsageError
from tokcc.errors import TokccError as AnyError

pytestmark = pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning")


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        out: Tensor = self.layer(x)
        return out if scale is None else out * scale


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def _axes(loaded: Loaded, name: str) -> dict[int, Any]:
    assert loaded.dynamic_shapes is not None
    axes: dict[int, Any] = loaded.dynamic_shapes[name]
    return axes


def _exported(**kwargs: Any) -> torch.export.ExportedProgram:
    return torch.export.export(Tiny().eval(), (torch.randn(2, 4),), **kwargs)


def _save(program: torch.export.ExportedProgram, path: Path) -> Path:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    path.write_bytes(buffer.getvalue())
    return path


def _rewritten(source: Path, target: Path, edit: Any) -> Path:
    """Copy a zip archive, passing every entry through ``edit(name, data)``."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, edit(name, old.read(name)))
    return target


def _refused(model: Any, **kwargs: Any) -> AnyError:
    with pytest.raises(LoadError) as caught:
        load(model, **kwargs)
    assert caught.value.exit_code == 3
    return caught.value


# --- torch.export archives


@pytest.mark.parametrize("name", ["model.pt2", "model.pt", "model.bin"])
def test_archive_is_found_by_content(tmp_path: Path, name: str) -> None:
    program = _exported(dynamic_shapes={"x": {0: Dim("batch", min=1, max=9)}})
    loaded = load(_save(program, tmp_path / name))
    assert loaded.module is None
    assert loaded.exported is not None
    (x,) = loaded.example_args
    torch.testing.assert_close(x, program.example_inputs[0][0])
    dim = _axes(loaded, "x")[0]
    assert (dim.min, dim.max) == (1, 9)
    torch.testing.assert_close(loaded.exported.module()(x), program.module()(x))


def test_archive_shapes_serve_a_new_export(tmp_path: Path) -> None:
    program = _exported(dynamic_shapes={"x": {0: Dim("batch", min=1)}})
    loaded = load(_save(program, tmp_path / "m.pt2"))
    assert loaded.exported is not None
    again = torch.export.export(
        loaded.exported.module(), loaded.example_args, loaded.example_kwargs, dynamic_shapes=loaded.dynamic_shapes
    )
    assert again.module()(torch.ones(7, 4)).shape == (7, 3)


def test_static_archive_has_no_dynamic_shapes(tmp_path: Path) -> None:
    assert load(_save(_exported(), tmp_path / "m.pt2")).dynamic_shapes is None


def test_archive_without_example_inputs_gets_some() -> None:
    shapes = {"x": {0: Dim("batch", min=3, max=9)}}
    program = torch.export.export(Tiny().eval(), (torch.randn(5, 4),), dynamic_shapes=shapes)
    program._example_inputs = None
    loaded = load(program)
    assert [tuple(x.shape) for x in loaded.example_args] == [(3, 4)]


def test_archive_takes_other_inputs_that_fit(tmp_path: Path) -> None:
    path = _save(_exported(dynamic_shapes={"x": {0: Dim("batch", min=1, max=9)}}), tmp_path / "m.pt2")
    assert load(path, inputs=["x=fp32[5,4]"]).example_args[0].shape == (5, 4)
    with pytest.raises(CaptureError, match=r"fp32\[5,7\]"):
        load(path, inputs=["x=fp32[5,7]"])
    with pytest.raises(UsageError, match="does not have"):
        load(path, inputs=["y=fp32[5,4]"])


def test_archive_keeps_axes_and_dtype(tmp_path: Path) -> None:
    path = _save(_exported(), tmp_path / "m.pt2")
    with pytest.raises(UsageError, match="axes are fixed"):
        load(path, dynamic=["x:0=1..9"])
    with pytest.raises(UsageError, match="dtype of an exported program"):
        load(path, dtype="fp16")
    assert load(path, dtype="fp32").exported is not None


def test_program_with_named_inputs_keeps_the_names() -> None:
    program = torch.export.export(
        Tiny().eval(),
        (torch.randn(2, 4),),
        {"scale": torch.ones(3)},
        dynamic_shapes={"x": {0: Dim("b", min=1, max=8)}, "scale": None},
    )
    loaded = load(program)
    assert list(loaded.example_kwargs) == ["scale"]
    assert set(loaded.dynamic_shapes or ()) == {"x", "scale"}


def test_archive_that_unpickles_code_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "ran"
    trap = io.BytesIO()
    torch.save((Trap(target),), trap)

    def edit(name: str, data: bytes) -> bytes:
        return trap.getvalue() if "/sample_inputs/" in name else data

    path = _rewritten(_save(_exported(), tmp_path / "m.pt2"), tmp_path / "bad.pt2", edit)
    error = _refused(path)
    assert "would run code" in error.what
    assert ".mkdir" in (error.found or "")
    assert not target.exists()


def test_archive_with_an_old_style_pickle_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "ran"

    def edit(name: str, data: bytes) -> bytes:
        return pickle.dumps(Trap(target), protocol=0) if "/sample_inputs/" in name else data

    path = _rewritten(_save(_exported(), tmp_path / "m.pt2"), tmp_path / "bad.pt2", edit)
    assert "mkdir" in (_refused(path).found or "")
    assert not target.exists()


@pytest.mark.parametrize("key", ["expr_str", "guards_code", "forward_arg_names", "target"])
def test_archive_with_code_in_its_strings_is_refused(tmp_path: Path, key: str) -> None:
    target = tmp_path / "ran"
    code = f"__import__('os').mkdir({str(target)!r})"
    planted = "torch.os.mkdir" if key == "target" else code

    def poison(tree: Any) -> Any:
        if isinstance(tree, dict):
            if key == "guards_code" and key in tree:
                return {**tree, key: [planted]}
            return {name: _planted(item) if name == key else poison(item) for name, item in tree.items()}
        return [poison(item) for item in tree] if isinstance(tree, list) else tree

    def _planted(item: Any) -> Any:
        return [planted] * len(item) if isinstance(item, list) else planted if isinstance(item, str) else item

    def edit(name: str, data: bytes) -> bytes:
        return json.dumps(poison(json.loads(data))).encode() if "/models/" in name else data

    program = _exported(dynamic_shapes={"x": {0: Dim("batch", min=1, max=9)}})
    path = _rewritten(_save(program, tmp_path / "m.pt2"), tmp_path / "bad.pt2", edit)
    assert path.read_bytes() != (tmp_path / "m.pt2").read_bytes()
    assert "would run code" in _refused(path).what
    assert not target.exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ZOO))
def test_archives_of_real_models_load(tmp_path: Path, name: str) -> None:
    """The check for code in archives lets every honest one pass."""
    entry = ZOO[name]
    if reason := entry.available():
        pytest.skip(reason)
    model, inputs = entry.build(), entry.inputs()
    program = torch.export.export(model, (), inputs, dynamic_shapes=entry.dynamic_shapes(), strict=False)
    loaded = load(_save(program, tmp_path / "m.pt2"))
    assert loaded.exported is not None
    torch.testing.assert_close(loaded.example_kwargs, inputs)
    assert set(loaded.dynamic_shapes or ()) == set(inputs)
    for key, axes in entry.dynamic_shapes().items():
        found = _axes(loaded, key)
        assert {axis: (dim.min, dim.max) for axis, dim in found.items()} == {
            axis: (dim.min, dim.max) for axis, dim in axes.items()
        }
    other = entry.inputs(3, 17 if entry.has_length else None, seed=1)
    with torch.no_grad():
        found, expected = loaded.exported.module()(**other), program.module()(**other)
    torch.testing.assert_close(found, expected)


def test_truncated_archive(tmp_path: Path) -> None:
    data = _save(_exported(), tmp_path / "m.pt2").read_bytes()
    for length in (10, len(data) // 2, len(data) - 10):
        path = tmp_path / "cut.pt2"
        path.write_bytes(data[:length])
        error = _refused(path)
        assert "truncated or damaged" in error.what
        assert error.help


def test_archive_with_a_damaged_program(tmp_path: Path) -> None:
    def edit(name: str, data: bytes) -> bytes:
        return b'{"graph_module": {}}' if "/models/" in name else data

    path = _rewritten(_save(_exported(), tmp_path / "m.pt2"), tmp_path / "bad.pt2", edit)
    assert "torch.export cannot load" in _refused(path).what


# --- pickles


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_module_needs_consent(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "m.pt"
    torch.save(Tiny().train(), path, _use_new_zipfile_serialization=zipped)
    error = _refused(path)
    assert "can run any code" in error.what
    assert "Tiny" in (error.found or "")
    assert "--allow-pickle" in (error.help or "")
    loaded = load(path, allow_pickle=True, inputs=["x=fp32[2,4]"])
    assert isinstance(loaded.module, Tiny)
    assert not loaded.module.training


@pytest.mark.parametrize("form", ["zip", "legacy", "plain", "protocol0"])
def test_malicious_pickle_does_not_run(tmp_path: Path, form: str) -> None:
    target, path = tmp_path / "ran", tmp_path / "m.pt"
    if form in {"zip", "legacy"}:
        torch.save({"model": Trap(target)}, path, _use_new_zipfile_serialization=form == "zip")
    else:
        path.write_bytes(pickle.dumps(Trap(target), protocol=0 if form == "protocol0" else 4))
    error = _refused(path)
    assert ".mkdir" in (error.found or "")
    assert not target.exists()


def test_trap_works(tmp_path: Path) -> None:
    """The malicious pickle above does what it says; otherwise the tests above prove nothing."""
    pickle.loads(pickle.dumps(Trap(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def test_pickle_cannot_hide_an_import_from_the_scan(tmp_path: Path) -> None:
    from tokcc.capture.pickle_guard import scan_bytes

    honest = pickle.dumps(Trap(tmp_path / "ran"), protocol=4)
    assert any(opcode.name == "STACK_GLOBAL" for opcode, _, _ in pickletools.genops(honest))
    # The names are pushed, then decoys are pushed and popped before STACK_GLOBAL.
    hidden = b"\x80\x04\x8c\x05posix\x8c\x05mkdir\x8c\x0btorch._util\x8c\x01x00\x93\x8c\x01a\x85R."
    for data in (honest, hidden):
        content = scan_bytes(data)
        assert content is not None
        assert not content.is_plain


def test_unpickling_that_fails_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(b"\x80\x02cno_such_module\nThing\n)\x81.")
    error = _refused(path, allow_pickle=True)
    assert "no_such_module" in (error.found or "")
    assert "factory" in (error.help or "")


def test_pickle_without_a_module(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save({"model": Tiny(), "epoch": 3}, path)
    assert "under model" in (_refused(path, allow_pickle=True).found or "")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s, "epoch": 3}], ids=["bare", "checkpoint"])
def test_state_dict_is_refused_with_what_to_do(tmp_path: Path, zipped: bool, wrap: Any) -> None:
    path = tmp_path / "m.pth"
    torch.save(wrap(Tiny().state_dict()), path, _use_new_zipfile_serialization=zipped)
    for allow in (False, True):
        error = _refused(path, allow_pickle=allow)
        assert "weights only" in error.what
        assert "factory" in (error.help or "")


# --- other files


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_torchscript_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    scripted = torch.jit.trace(Tiny().eval(), torch.randn(2, 4))  # type: ignore[no-untyped-call]
    torch.jit.save(scripted, path)
    assert "TorchScript" in _refused(path).what
    assert "TorchScript" in _refused(scripted, inputs=["x=fp32[2,4]"]).what


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("empty.pt", b"", "is empty"),
        ("m.onnx", b"\x08\x08\x12\x07pytorch", "already exported"),
        ("renamed.pt", b"\x08\x0a\x3a\x10abcdefgh", "already exported"),
        ("m.gguf", b"GGUF\x03\x00\x00\x00", "GGUF"),
        ("m.h5", b"\x89HDF\r\n\x1a\n0000", "Keras"),
        ("m.tflite", b"\x1c\x00\x00\x00TFL3", "already exported"),
        ("m.pte", b"\x1c\x00\x00\x00ET12", "already compiled"),
        ("m.safetensors", (2).to_bytes(8, "little") + b"{}", "weights only"),
        ("cut.pt", pickle.dumps(list(range(100)))[:50], "truncated"),
        ("notes.txt", b"hello, this is no model", "not a model file"),
        ("model.py", b"def make():\n    pass\n", "Python source"),
    ],
)
def test_other_files_are_named(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    error = _refused(path)
    assert words in error.what
    assert error.help or error.needed


def test_aotinductor_package_and_foreign_zip(tmp_path: Path) -> None:
    for entry, words in (("a/data/aotinductor/model/x.so", "AOTInductor"), ("word/document.xml", "not one of torch's")):
        path = tmp_path / "m.pt2"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(entry, "x")
        assert words in _refused(path).what


def test_missing_paths() -> None:
    assert _refused("/no/such/file.pt2").help is None
    assert "hf download google/vit" in (_refused("google/vit-base-patch16-224").help or "")


def test_not_a_model() -> None:
    assert _refused(42).found == "int"
