from pathlib import Path

import pytest

from tokcc.config import load_policy
from tokcc.passes.methods import library

POLICIES = sorted((Path(__file__).parents[2] / "examples" / "policies").glob("*.yaml"))


@pytest.mark.parametrize("path", POLICIES, ids=lambda path: path.stem)
def test_example_policy_is_valid(path: Path) -> None:
    policy = load_policy(path, presets=library()).policy
    assert policy.name == path.stem
    assert path.read_text(encoding="utf-8").startswith("#"), "an example explains itself"


def test_there_are_policies() -> None:
    assert len(POLICIES) >= 8
