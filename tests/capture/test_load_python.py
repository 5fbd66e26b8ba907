"""Models from Python: factories, modules, example inputs, the --input and --dynamic notations, dtype."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tokcc.capture.inputs import describe, parse_dynamic, parse_inputs
from tokcc.capture.load import Loaded, load
from tokcc.errors import CaptureError, LoadError, UsageError

FACTORY = """
import torch
from torch import nn
import neighbour

def make():
    print("building")
    return nn.Linear(4, 3)

def pair():
    return nn.Linear(4, 3), torch.zeros(2, 4)

def named():
    return nn.Linear(4, 3), {"input": torch.zeros(2, 4)}

def broken():
    size = neighbour.SIZE
    return nn.Linear(size, 1 // 0)

def needs(width):
    return nn.Linear(width, 3)

def number():
    return 3

def leaves():
    raise SystemExit(1)

ready = nn.Linear(4, 3)

class Model(nn.Linear):
    def __init__(self):
        super().__init__(4, 3)
"""


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, ids: Tensor, scale: Tensor | None = None) -> Tensor:
        out: Tensor = self.dropout(self.layer(x)) + ids.sum()
        return out if scale is None else out * scale


def _axes(loaded: Loaded, name: str) -> dict[int, Any]:
    assert loaded.dynamic_shapes is not None
    axes: dict[int, Any] = loaded.dynamic_shapes[name]
    return axes


def _inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 4), torch.zeros(2, 5, dtype=torch.int64)


@pytest.fixture
def factory(tmp_path: Path) -> str:
    (tmp_path / "neighbour.py").write_text("SIZE = 4\n")
    path = tmp_path / "my_model.py"
    path.write_text(FACTORY)
    return str(path)


# --- factories


def test_factory_forms(factory: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = list(sys.path)
    assert load(f"{factory}:make", inputs=["input=fp32[2,4]"]).example_kwargs["input"].shape == (2, 4)
    assert capsys.readouterr().out == ""  # the user's prints go to stderr
    assert load(f"{factory}:pair").example_args[0].shape == (2, 4)
    assert list(load(f"{factory}:named").example_kwargs) == ["input"]
    assert isinstance(load(f"{factory}:ready", example_inputs=torch.zeros(2, 4)).module, nn.Linear)
    assert isinstance(load(f"{factory}:Model", example_inputs=torch.zeros(2, 4)).module, nn.Linear)
    assert sys.path == before


def test_factory_in_a_module(factory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(factory).parent)
    try:
        assert load("my_model:pair").source == "my_model:pair"
    finally:
        for name in ("my_model", "neighbour"):
            sys.modules.pop(name, None)
    with pytest.raises(LoadError, match="no Python module named no_such_place"):
        load("no_such_place:make")


def test_options_override_the_factorys_inputs(factory: str) -> None:
    loaded = load(f"{factory}:pair", inputs=["input=fp32[7,4]"], dynamic=["input:0=1..9"])
    assert loaded.example_kwargs["input"].shape == (7, 4)
    assert _axes(loaded, "input")[0].max == 9


def test_failing_factory_shows_the_users_line(factory: str) -> None:
    with pytest.raises(LoadError) as caught:
        load(f"{factory}:broken")
    assert "my_model.py:18" in (caught.value.node or "")
    assert "1 // 0" in (caught.value.node or "")
    assert (caught.value.found or "").startswith("ZeroDivisionError")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("needs", "without arguments"),
        ("number", "does not return a model"),
        ("leaves", "SystemExit"),
        ("mak", "did you mean"),
        ("FACTORY_SIZE", "functions: make, pair"),
    ],
)
def test_bad_factories(factory: str, name: str, words: str) -> None:
    with pytest.raises(LoadError, match=words):
        load(f"{factory}:{name}")


def test_factory_file_problems(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def make(:\n")
    with pytest.raises(LoadError, match=r"bad\.py:1"):
        load(f"{bad}:make")
    bad.write_text("import no_such_thing\n")
    with pytest.raises(LoadError, match="no_such_thing"):
        load(f"{bad}:make")
    with pytest.raises(LoadError, match="no such file"):
        load(f"{tmp_path / 'none.py'}:make")


# --- modules


def test_module_forms_of_example_inputs() -> None:
    x, ids = _inputs()
    model = Tiny().eval()
    assert load(model, example_inputs=(x, ids)).example_args[1] is ids
    assert load(model, example_inputs={"x": x, "ids": ids}).example_kwargs["x"] is x
    mixed = load(model, example_inputs=((x,), {"ids": ids}))
    assert (len(mixed.example_args), list(mixed.example_kwargs)) == (1, ["ids"])
    assert load(model, example_inputs=(x, ids)).module is model
    with pytest.raises(UsageError, match="cannot use these example inputs"):
        load(model, example_inputs=3)


def test_callers_module_is_not_changed() -> None:
    model = Tiny().train()
    loaded = load(model, example_inputs=_inputs(), dtype="fp16")
    assert loaded.module is not None
    assert model.training
    assert model.layer.weight.dtype == torch.float32
    assert not loaded.module.training
    assert loaded.module.get_parameter("layer.weight").dtype == torch.float16
    assert loaded.example_args[0].dtype == torch.float16
    assert loaded.example_args[1].dtype == torch.int64


def test_modules_that_cannot_be_used() -> None:
    with torch.device("meta"):
        empty = Tiny()
    with pytest.raises(LoadError, match="without values"):
        load(empty, example_inputs=_inputs())
    with pytest.raises(UsageError, match="example inputs") as caught:
        load(Tiny())
    assert "x, ids" in (caught.value.needed or "")
    with pytest.raises(UsageError, match="unknown model dtype"):
        load(Tiny(), example_inputs=_inputs(), dtype="int64")


def test_inputs_that_do_not_fit_name_the_shapes() -> None:
    with pytest.raises(CaptureError) as caught:
        load(Tiny(), inputs=["x=fp32[2,5]", "ids=int64[2,5]"])
    assert "x: fp32[2,5], ids: int64[2,5]" in (caught.value.found or "")
    assert caught.value.exit_code == 3


# --- notations


def test_inputs_are_made_in_the_order_of_the_signature() -> None:
    loaded = load(Tiny(), inputs=["ids=int64[2,5]", "x=fp32[2,4]"])
    assert list(loaded.example_kwargs) == ["x", "ids"]
    ids = loaded.example_kwargs["ids"]
    assert ids.dtype == torch.int64
    assert 0 <= int(ids.min()) <= int(ids.max()) < 10
    again = load(Tiny(), inputs=["ids=int64[2,5]", "x=fp32[2,4]"])
    torch.testing.assert_close(loaded.example_kwargs, again.example_kwargs)


@pytest.mark.parametrize(
    ("text", "dtype", "dims"),
    [
        ("x=fp32[2,3]", torch.float32, (2, 3)),
        ("x = fp16 [ 2, 3 ]", torch.float16, (2, 3)),
        ("x=bf16[2x3x4]", torch.bfloat16, (2, 3, 4)),
        ("a.b=int32[1]", torch.int32, (1,)),
        ("x=bool[]", torch.bool, ()),
    ],
)
def test_parse_inputs(text: str, dtype: torch.dtype, dims: tuple[int, ...]) -> None:
    (spec,) = parse_inputs([text])
    assert parse_inputs(text) == (spec,)
    assert (spec.dtype, spec.dims) == (dtype, dims)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["x"], "cannot read --input"),
        (["x=fp32"], "cannot read --input"),
        (["=fp32[2]"], "cannot read --input"),
        (["x=fp31[2]"], "unknown dtype"),
        (["x=fp32[0,2]"], "bad dimensions"),
        (["x=fp32[-1,2]"], "bad dimensions"),
        (["x=fp32[2,]"], "bad dimensions"),
        (["x=fp32[B,3]"], "bad dimensions"),
        (["x=fp32[2]", "x=fp32[3]"], "twice"),
        (["y=fp32[2]"], "does not have"),
        (["x=fp32[2,4]"], "no --input for ids"),
    ],
)
def test_bad_inputs(texts: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        load(Tiny(), inputs=texts)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["x:0"], "cannot read --dynamic"),
        (["x=1..4"], "cannot read --dynamic"),
        (["x:0=4"], "cannot read --dynamic"),
        (["x:a=1..4"], "cannot read --dynamic"),
        (["x:0=0..4"], "at least one"),
        (["x:0=4..2"], "empty range"),
        (["x:0=4..4"], "empty range"),
        (["x:0=1..4", "x:0=1..5"], "twice"),
        (["x:0=1..4", "x:-2=1..5"], "twice"),
        (["y:0=1..4"], "does not have"),
        (["x:2=1..4"], "axis that the input does not have"),
        (["x:0=3..4"], "outside"),
        (["one:0=1..4"], "size 1"),
    ],
)
def test_bad_dynamic(texts: list[str], words: str) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, one: Tensor) -> Tensor:
            return x.sum() + one.sum()

    with pytest.raises(UsageError, match=words):
        load(Two(), inputs=["x=fp32[2,4]", "one=fp32[1,4]"], dynamic=texts)


def test_dynamic_axes_export_down_to_one() -> None:
    class Masked(nn.Module):
        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return (ids * mask).float() + 1

    texts = ["ids:0=1..8", "mask:0=1..8", "ids:-1=1..", "mask:1=1.."]
    loaded = load(Masked(), inputs=["ids=int64[2,5]", "mask=int64[2,5]"], dynamic=texts)
    assert loaded.module is not None
    program = torch.export.export(loaded.module, (), loaded.example_kwargs, dynamic_shapes=loaded.dynamic_shapes)
    out = program.module()(ids=torch.ones(1, 9, dtype=torch.int64), mask=torch.ones(1, 9, dtype=torch.int64))
    assert out.shape == (1, 9)


def test_parse_dynamic_keeps_open_ends() -> None:
    (item,) = parse_dynamic(["x:1=2.."])
    assert (item.axis, item.low, item.high, str(item)) == (1, 2, None, "x:1=2..")


def test_given_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot be combined"):
        load(Tiny(), example_inputs=_inputs(), inputs=["x=fp32[2,4]"])
    with pytest.raises(UsageError, match="cannot be combined"):
        load(Tiny(), example_inputs=_inputs(), dynamic_shapes={"x": None}, dynamic=["x:0=1..4"])


def test_masks_mask_nothing() -> None:
    class Masked(nn.Module):
        def forward(self, attention_mask: Tensor, src_key_padding_mask: Tensor) -> Tensor:
            return attention_mask.sum() + src_key_padding_mask.sum()

    made = load(Masked(), inputs=["attention_mask=int64[2,5]", "src_key_padding_mask=bool[2,5]"]).example_kwargs
    assert made["attention_mask"].all()
    assert not made["src_key_padding_mask"].any()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.zeros(2, 3), "fp32[2,3]"),
        ({"a": torch.zeros(1, dtype=torch.bool), "b": 3}, "a: bool[1], b: 3"),
        ((torch.zeros(1, dtype=torch.uint8), None), "(uint8[1], None)"),
    ],
)
def test_describe(value: Any, text: str) -> None:
    assert describe(value) == text
