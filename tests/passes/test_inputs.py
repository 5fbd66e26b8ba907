"""Inputs that pieces add: declared once, read by name, fed with valid values."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.passes.oracle import policy, program_of
from tests.passes.reference_models import WIDTH, frames, patches, vision
from tests.passes.reference_models import audio as audio_model
from tokcc.errors import PlanError, UsageError
from tokcc.ir.builder import EagerBuilder
from tokcc.passes.inputs import added_inputs, declared_inputs, random_values
from tokcc.passes.scores.text_relevance import TextRelevance
from tokcc.passes.selectors.coverage import Coverage
from tokcc.testing import reduce_program, run_eager


def test_one_input_for_all_pieces_that_read_it() -> None:
    both = declared_inputs([TextRelevance(), Coverage(), None])
    assert [spec.name for spec in both] == ["text", "text_count"]
    with pytest.raises(PlanError, match="`text` of different kinds") as caught:
        declared_inputs([TextRelevance(), Coverage(rows=4)])
    assert "another name" in (caught.value.help or "")
    assert [s.name for s in declared_inputs([TextRelevance(), Coverage(text="words", rows=4)])] == [
        "text", "text_count", "words", "words_count",
    ]  # fmt: skip


def two_steps(**second: Any) -> dict[str, Any]:
    steps = [
        {"node": "prune", "at": {"layers": [1]}, "score": {"kind": "text_relevance"}, "budget": {"tokens": 12}},
        {"preset": "mmtok", "tokens": 5, **second},
    ]
    return {**policy(steps[0]), "steps": steps}


def test_two_steps_share_an_input_and_its_size() -> None:
    feeds = {"frames": frames(2, 24)}
    reduced, plan = reduce_program(program_of(audio_model(), feeds), two_steps())
    assert [reduced.public_name(node) for node in reduced.user_inputs] == ["frames", "text", "text_count"]
    generator = torch.Generator().manual_seed(0)
    lengths = set()
    for _ in range(20):
        values = random_values(reduced, plan.inputs, feeds, generator)
        batch, rows, width = values["text"].shape
        assert (batch, width) == (2, WIDTH)
        assert values["text_count"].dtype == torch.int64
        assert 1 <= int(values["text_count"].min()) <= int(values["text_count"].max()) <= rows
        lengths.add(rows)
    assert len(lengths) > 1


def test_a_reduction_that_removes_nothing_reads_nothing() -> None:
    feeds = {"patches": patches(2, 9)}
    reduced, plan = reduce_program(program_of(vision(), feeds), policy({"preset": "cdpruner", "tokens": 64}))
    assert plan.inputs
    assert added_inputs(reduced, plan.inputs) == {}


def test_values_that_do_not_fit() -> None:
    b = EagerBuilder({"text": torch.zeros(2, 3, 8)})
    assert b.input("text", [2, "T", 8], torch.float32, torch.device("cpu")).shape == (2, 3, 8)
    for shape, dtype in (([2, "T", 9], torch.float32), ([2, 8], torch.float32), ([2, "T", 8], torch.int64)):
        with pytest.raises(UsageError, match="`text` does not fit"):
            b.input("text", shape, dtype, torch.device("cpu"))
    with pytest.raises(UsageError, match="`mood` is missing"):
        b.input("mood", [2], torch.float32, torch.device("cpu"))


def test_the_eager_walk_names_what_is_missing() -> None:
    feeds = {"frames": frames(2, 24)}
    with pytest.raises(UsageError, match="`text` is missing"):
        run_eager(program_of(audio_model(), feeds), policy({"preset": "mmtok", "tokens": 5}), feeds)
