from pathlib import Path

import pytest

from benchmarks import vits
from examples import transformer_classifier
from tests.decoders.tiny import program_of
from tokcc.analysis.cache_sites import cache_sites
from tokcc.config import load_policy
from tokcc.ir.program import Program
from tokcc.passes.cache.planning import make_cache_plan
from tokcc.passes.methods import library
from tokcc.testing import plan_for, trace

POLICIES = sorted((Path(__file__).parents[2] / "examples" / "policies").glob("*.yaml"))
TEXT = ("bert-power",)
DECODER = ("decoder-bits", "decoder-genai", "decoder-h2o", "decoder-stream")


@pytest.mark.parametrize("path", POLICIES, ids=lambda path: path.stem)
def test_example_policy_is_valid(path: Path) -> None:
    policy = load_policy(path, presets=library()).policy
    assert policy.name == path.stem
    assert path.read_text(encoding="utf-8").startswith("#"), "an example explains itself"


def test_there_are_policies() -> None:
    assert len(POLICIES) >= 8


@pytest.fixture(scope="module")
def programs() -> dict[str, Program]:
    vit = vits.model("vit-s", 2)
    classifier, args = transformer_classifier.classifier()
    return {"image": trace(vit.module, vit.named_args()), "text": trace(classifier, {"ids": args[0]})}


@pytest.mark.slow
@pytest.mark.parametrize("path", POLICIES, ids=lambda path: path.stem)
def test_example_policy_fits_a_model(path: Path, programs: dict[str, Program]) -> None:
    if path.stem in DECODER:
        program = program_of("llama")
        plan = make_cache_plan(load_policy(path, presets=library()), program, cache_sites(program))
        assert [eviction.layer for eviction in plan.evictions] == [0, 1, 2]
    else:
        plan_for(programs["text" if path.stem in TEXT else "image"], path)
