"""The pages that tools write are current, and what pages link to is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tokcc.passes.methods import library
from tools import presets_page, tables

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "presets.md"
FILES = sorted(path.stem for path in (ROOT / "passes" / "methods").glob("*.yaml"))


def rows() -> dict[str, list[str]]:
    """The cells of docs/presets.md by preset."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| [`")]
    cells = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in lines]
    return {re.findall(r"`(.+?)`", row[0])[0]: row for row in cells}


def test_presets_md_is_what_the_tool_writes() -> None:
    assert PAGE.read_text(encoding="utf-8") == tables.pages()["docs/presets.md"], "run `python tools/tables.py`"


def test_presets_md_has_every_method_as_its_file_says() -> None:
    found = rows()
    assert sorted(found) == FILES
    for name, (_, title, paper, nodes, needs, fidelity, _, fits, _) in found.items():
        given = yaml.safe_load((ROOT / "passes" / "methods" / f"{name}.yaml").read_text(encoding="utf-8"))
        assert title == given["title"]
        assert given["paper"].removeprefix("arXiv:") in paper
        assert set(nodes.split(", ")) == {step["node"] for step in given["steps"]}
        assert needs == (", ".join(given.get("needs") or []) or "-")
        assert fidelity == given["fidelity"]
        runs = re.fullmatch(r"\[[1-9]\d* of \d+\]\(.*contract_matrix.json\)", fits)
        assert runs, f"run `python -m tests.zoo.contract --presets {name}`, then `python tools/tables.py`"


@pytest.mark.parametrize("name", FILES)
def test_every_preset_has_a_test_that_names_it(name: str) -> None:
    test = presets_page.oracle_test(name, library())
    assert test is not None, f"no test in {', '.join(presets_page.ORACLES)} names `{name}`"
    text = test.read_text(encoding="utf-8")
    assert re.search(rf"[\"'`]{re.escape(name)}[\"'`]", text)
    assert "def test_" in text


def test_a_preset_without_a_test_is_found_out() -> None:
    one = library()["tome"].model_copy(update={"name": "nobody-tests-this"})
    assert presets_page.oracle_test("nobody-tests-this", {**library(), "nobody-tests-this": one}) is None


def test_measured_files_name_the_method() -> None:
    for name, row in rows().items():
        for stem in re.findall(r"\[(\w+)\]", row[-1]):
            assert name in (presets_page.RESULTS / f"{stem}.json").read_text(encoding="utf-8")
    assert "accuracy_image" in rows()["tome"][-1]


@pytest.mark.parametrize("page", ["README.md", "docs/presets.md"])
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    links = re.findall(r"\]\(([^)#]+?)\)", path.read_text(encoding="utf-8"))
    local = [link for link in links if not link.startswith("http")]
    assert local
    assert [link for link in local if not (path.parent / link).exists()] == []


def test_the_picture_of_the_gallery_is_small() -> None:
    assert (ROOT / "docs" / "gallery.png").stat().st_size < 400_000
