"""Every preset on every architecture: the engine equals its eager oracle, or it is refused with something to do."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.zoo.arguments import ARGUMENTS
from tests.zoo.contract import cases, policy_for, program_of, run_case
from tests.zoo.contract_table import COMMAND, LIMIT, Case, Row, read_rows, write_rows
from tokcc.errors import TokccError
from tokcc.passes.methods import library
from tokcc.pipeline.reducing import reduce_program
from tokcc.pipeline.stages import Stages
from tools.presets_page import kind_of

# torch's own pytree copies a deprecated class in run_decompositions.
pytestmark = pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning")

ROOT = Path(__file__).resolve().parents[2]
SOME = [
    Case("hired", "clip_vision"),
    Case("token-corr", "dinov2_registers"),
    Case("pyra", "dinov2_registers"),
    Case("cacovid", "videomae"),
    Case("focusui", "videomae"),
    Case("mmtok", "distilbert"),
    Case("as-vit", "distilbert"),
    Case("corematching", "gpt2"),
    Case("snapkv", "gpt2"),
    Case("cacheblend", "gpt2"),
    Case("longmamba", "mamba"),
]
"""Methods with weights, texts, crops and frames, on models that their own tests do not run."""
OF_EACH_KIND = ("as-vit", "divprune", "evit", "fastv", "h2o", "kvlink", "longmamba", "tome")


def written() -> dict[Case, Row]:
    return {row.case: row for row in read_rows()}


def judge(row: Row, expected: Row) -> None:
    if row.status == "skipped":
        pytest.skip(row.reason or "not available")
    assert row.status == expected.status, row.reason
    if row.status == "ok":
        assert row.max_rel_diff is not None
        assert row.max_rel_diff <= LIMIT
    else:
        assert row.reason == expected.reason


@pytest.mark.parametrize("case", SOME, ids=str)
def test_some_cells(case: Case) -> None:
    judge(run_case(case), written()[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(), ids=str)
def test_every_cell(case: Case) -> None:
    judge(run_case(case), written()[case])


def test_the_table_has_a_row_for_every_cell() -> None:
    missing = set(cases()) - set(written())
    models, presets = ({getattr(case, part) for case in missing} for part in ("model", "preset"))
    # One new model lacks a row of every method, one new method a row of every model.
    part, names = ("models", models) if len(models) < len(presets) else ("presets", presets)
    assert not missing, f"the contract matrix lacks rows: run `{COMMAND} --{part} {' '.join(sorted(names))}`"
    left = sorted({case.preset for case in set(written()) - set(cases())})
    assert not left, f"the contract matrix has rows of cells that are gone ({left}): run `{COMMAND} --presets tome`"


def test_no_row_is_bad() -> None:
    rows = written()
    assert rows
    for case, row in rows.items():
        assert row.status in ("ok", "refused"), f"{case}: {row.reason}"
        if row.status == "ok":
            assert row.max_rel_diff is not None
            assert 0 <= row.max_rel_diff <= LIMIT, case
            continue
        what, _, help = (row.reason or "").partition("; help: ")
        assert what.split(": ", 1)[1].strip(), case
        assert len(help.split()) > 1, case


def test_every_preset_runs_somewhere() -> None:
    runs = {case.preset for case, row in written().items() if row.status == "ok"}
    assert {case.preset for case in written()} == runs


def test_arguments_are_of_presets() -> None:
    """A table of its own would outlive the presets that it is for."""
    assert set(ARGUMENTS) <= set(library())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in OF_EACH_KIND)) for name in sorted(library())]
)
def test_the_other_kind_of_model_is_refused(name: str, tmp_path: Path) -> None:
    """A method for encoders on a decoder and the other way round: said in the words of the policy, with help."""
    kinds = {"encoder": "vit", "scan": "mamba"}
    own = kinds.get(kind_of(library()[name]), "llama")
    policy = policy_for(Case(name, own), tmp_path)
    for other in {"vit", "llama", "mamba"} - {own}:
        with pytest.raises(TokccError) as caught:
            reduce_program(program_of(other), policy, Stages())
        assert caught.value.what
        assert (caught.value.help or "").strip()
        assert name in (caught.value.policy or "")


def test_every_refusal_of_a_piece_says_what_to_do() -> None:
    """What a method refuses it has to help with: a hint for all refusals together would be wrong for most."""
    silent = []
    for path in sorted((ROOT / "passes").rglob("*.py")):
        if path.parent == ROOT / "passes" and path.name != "ordering.py":
            continue  # not pieces: what the graph does not allow
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = _called(node)
            if name not in ("fail", "PlanError", "PolicyError", "AxisError"):
                continue
            assert isinstance(node, ast.Call)
            # `PlanError(str(error), ...)` passes on what a validator said, which names the values that it takes.
            passed_on = node.args and isinstance(node.args[0], ast.Call) and _called(node.args[0]) == "str"
            if not passed_on and "help" not in {keyword.arg for keyword in node.keywords}:
                silent.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not silent, "refusals without `help`"


def _called(node: ast.AST) -> str | None:
    if not isinstance(node, ast.Call):
        return None
    return node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", None)


def test_written_rows_are_read_again(tmp_path: Path) -> None:
    path = tmp_path / "matrix.json"
    ok, refused = Case("tome", "vit"), Case("tome", "bert", dynamic=True)
    rows = [Row(ok, "ok", max_rel_diff=1.234e-6), Row(refused, "refused", reason="PlanError: no; help: do this")]
    write_rows(rows, [ok, refused], path)
    assert read_rows(path) == [Row(ok, "ok", max_rel_diff=1.2e-6), rows[1]]
    failed = Row(ok, "failed", reason="the engine differs")
    write_rows([failed], [ok, refused], path)
    assert set(read_rows(path)) == {failed, rows[1]}
    write_rows([], [ok], path)
    assert read_rows(path) == [failed]
