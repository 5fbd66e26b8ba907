from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest

from tests.report import samples
from tokcc.errors import OutputError, UsageError
from tokcc.report import extras, figures
from tokcc.report.html import render_html, write_html
from tokcc.report.kept import KeptTokens
from tokcc.report.schema import Figure, KeptText, Report
from tokcc.report.style import DARK, LIGHT
from tokcc.report.write import write_report

VOID = {"meta", "img", "source", "br", "link"}


class Page(HTMLParser):
    """Checks that elements are closed in order, and collects addresses and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in {"src", "href", "srcset", "action", "data"}]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words)).replace("\u00a0", " ")


def stages() -> list[KeptTokens]:
    rng = np.random.default_rng(0)
    return [KeptTokens(layer, "evit", rng.random((2, 10)) < 0.6, prefix=1, grid=(3, 3)) for layer in (2, 5)]


def images() -> list[np.ndarray]:
    return [np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8) for seed in range(2)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    folder = tmp_path_factory.mktemp("bundle")
    report = write_report(
        samples.report(texts=()), folder, images=images(), texts=[["[CLS]", "a", "<b>x</b>"]] * 2, stages=stages()
    )
    return folder, report


def test_everything_is_written_and_can_be_read_back(bundle: tuple[Path, Report]) -> None:
    folder, report = bundle
    assert Report.load(folder / "report.json") == report
    assert [figure.name for figure in report.figures] == ["tokens", "latency", "break_even", "kept_images", "kept_text"]
    files = {path for figure in report.figures for path in (figure.path, figure.dark_path) if path}
    assert {f"figures/{path.name}" for path in (folder / "figures").iterdir()} == files
    assert all(figure.alt for figure in report.figures)
    assert report.texts[0].tokens == ("[CLS]", "a", "<b>x</b>")


def test_the_page_loads_nothing(bundle: tuple[Path, Report]) -> None:
    page = (bundle[0] / "report.html").read_text(encoding="utf-8")
    found = Page(page)
    assert found.addresses
    assert all(address.startswith("data:image/") for address in found.addresses)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(found.tags)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"data:image/[^\"]*", "", page))
    assert "default-src 'none'" in page


def test_charts_name_no_address(bundle: tuple[Path, Report]) -> None:
    for path in (bundle[0] / "figures").glob("*.svg"):
        addresses = set(re.findall(r"https?://[^\"'<> ]+", path.read_text(encoding="utf-8")))
        namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
        assert addresses <= namespaces | {
            "http://purl.org/dc/elements/1.1/",
            "http://creativecommons.org/ns#",
            "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
        }


def test_the_page_says_what_matters(bundle: tuple[Path, Report]) -> None:
    text = Page((bundle[0] / "report.html").read_text(encoding="utf-8")).text
    for part in (
        "vit-small with tome",
        "1.61x as fast",
        "85.9 % → 85.5 %",
        "Parity passed",
        "at 96x96 the engine is slower",
        "197 → 184",
        "top1_agreement>=0.98",
        "41 runs of each engine",
        "Example CPU",
        "2026-01-01 12:00 UTC",
        "steps: - node: merge",
    ):
        assert part in text, part


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'"
    report = samples.report(
        warnings=(evil,),
        notes=(evil,),
        texts=(KeptText(tokens=(evil, "<img src=x>"), gone_after=(None, 3)),),
        stages={evil: 1.0},
    )
    report = report.model_copy(update={"model": report.model.model_copy(update={"source": evil})})
    found = Page(render_html(report, tmp_path))
    assert "script" not in found.tags
    assert found.addresses == []
    assert evil in found.text


def test_a_bare_report_has_a_page_too() -> None:
    report = samples.report(
        fidelity=None, latency=None, memory=None, nodes=None, layers=(), gates=(), texts=(), warnings=(), break_even=()
    )
    text = Page(render_html(report)).text
    assert "was not measured" in text
    assert "Layer by layer" not in text
    assert "Look at this first" not in text


def test_a_slow_engine_and_missed_gates_are_in_plain_sight() -> None:
    gates = [gate.model_copy(update={"passed": False}) for gate in samples.report().gates]
    text = Page(render_html(samples.report(latency=samples.latency(0.8), gates=gates))).text
    assert "slower than the original" in text
    assert "Gate missed:" in text


def test_random_weights_are_said_to_mean_nothing() -> None:
    fidelity = samples.fidelity().model_copy(update={"weights": "random"})
    assert "says nothing about a trained model" in Page(render_html(samples.report(fidelity=fidelity))).text


def test_pictures_outside_the_bundle_are_not_embedded(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("secret")
    paths = ("../secret.png", str(tmp_path / "secret.png"), "notes.txt", "missing.png")
    drawn = tuple(Figure(name=path, path=path, title="t") for path in paths)
    assert Page(render_html(samples.report(figures=drawn), tmp_path / "out")).addresses == []


def test_the_page_is_rebuilt_from_the_files(bundle: tuple[Path, Report], tmp_path: Path) -> None:
    folder, report = bundle
    before = (folder / "report.html").read_text(encoding="utf-8")
    assert write_html(Report.load(folder / "report.json"), folder).read_text(encoding="utf-8") == before
    with pytest.raises(OutputError, match=r"cannot write report\.html"):
        write_html(report, tmp_path / "none")


def test_figures_are_the_same_every_time() -> None:
    report = samples.report()
    assert report.latency is not None
    for theme in (LIGHT, DARK):
        assert figures.draw_tokens(report.layers, theme) == figures.draw_tokens(report.layers, theme)
        assert figures.draw_latency(report.latency, theme) == figures.draw_latency(report.latency, theme)
    assert figures.draw_tokens(report.layers, LIGHT) != figures.draw_tokens(report.layers, DARK)


def test_drawing_leaves_matplotlib_as_it_was() -> None:
    with mpl.rc_context():
        mpl.rcParams["font.size"] = 33
        names = [name for name in mpl.rcParams if name != "backend"]  # reading that one chooses a backend
        before = [mpl.rcParams[name] for name in names]
        figures.draw_tokens(samples.rows(), DARK)
        figures.draw_kept_images(images(), stages())
        figures.draw_kept_text([KeptText(tokens=("日", "本"), gone_after=(None, 1))], LIGHT)
        assert [mpl.rcParams[name] for name in names] == before


def test_several_steps_in_one_block_and_one_reduction() -> None:
    rows = samples.rows(blocks=2)
    twice = (rows[0], rows[0].model_copy(update={"tokens_in": 184, "tokens_out": 100}), rows[1])
    xs, ys = figures._token_steps(twice)
    assert ys == [197, 197, 184, 184, 184, 100, 100, 184, 184, 171, 171]
    assert xs == sorted(xs)
    assert figures.draw_kept_images(images(), stages()[:1], rows=1).startswith(b"\x89PNG")


def test_long_texts_are_wrapped() -> None:
    short = KeptText(tokens=("word",) * 5, gone_after=(None,) * 5)
    long = KeptText(tokens=("word",) * 300, gone_after=(None, 2) * 150)
    heights = []
    for text in (short, long):
        png = figures.draw_kept_text([text], LIGHT)
        heights.append(int.from_bytes(png[20:24]))
    assert heights[1] > 5 * heights[0]


def test_symbolic_token_counts_have_no_chart(tmp_path: Path) -> None:
    row = samples.rows()[0].model_copy(update={"tokens_in": "s0", "tokens_out": "s0 - 13"})
    report = write_report(samples.report(layers=(row,), texts=()), tmp_path)
    assert "tokens" not in {figure.name for figure in report.figures}
    assert "s0 → s0 - 13" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(("missing", "note"), [("matplotlib", "no figures"), ("jinja2", "no report.html")])
def test_without_the_extra_the_numbers_are_still_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, note: str
) -> None:
    find = extras.importlib.util.find_spec
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    report = write_report(samples.report(), tmp_path)
    assert any(note in found and "tokcc[report]" in found for found in report.notes)
    assert Report.load(tmp_path / "report.json") == report
    assert (tmp_path / "report.html").exists() == (missing != "jinja2")
    if missing == "jinja2":
        with pytest.raises(UsageError, match=r"needs jinja2.*\n.*\n?.*tokcc\[report\]"):
            render_html(report)


def test_a_folder_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "figures").write_text("a file where the folder should be")
    with pytest.raises(OutputError, match="cannot write the figures"):
        write_report(samples.report(), tmp_path)
