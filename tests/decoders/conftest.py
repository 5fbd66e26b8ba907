"""What of the decoders' tests is in the fast run: every method on one family, long tests with one case."""

from __future__ import annotations

import pytest

FAST = ("llama",)
"""Grouped heads, rotation, no bias: what the others differ from is tested for itself in test_families.py."""
LONG = ("test_slots.py",)
"""Files beside those of the methods whose cases each compile a decoder: the first case of every test is enough."""
REPEATED = (
    "test_a_capacity_that_does_not_bind",
    "test_a_lookahead_leaves_no_trace_where_nothing_is_evicted",
    "test_a_prompt_of_one_token",
    "test_many_bits_lose_little",
    "test_many_probes_and_little_but_padding",
    "test_one_document_without_links_is_an_ordinary_prompt",
    "test_one_row",
    "test_one_row_and_a_budget_that_does_not_bind",
    "test_one_row_without_padding",
    "test_the_published_share_of_the_tokens",
    "test_windows",
    "test_without_spreading",
)
"""Tests of methods that compile one more decoder for what the test of the formula, of padded rows, nearly says."""
COMPLETE = ("test_h2o.py",)
"""The method whose tests all run: what does not bind changes nothing there."""


def _is_long(item: pytest.Function) -> bool:
    """Whether a test of a method compiles a decoder once more for another case of the same thing."""
    call = getattr(item, "callspec", None)
    family = FAST[0] if call is None else call.params.get("family", FAST[0])
    if family not in FAST:
        return True
    if item.path.name in COMPLETE:
        return False
    compiles = "tmp_path" in item.fixturenames and "refused" not in item.originalname
    return item.originalname in REPEATED or (compiles and call is not None and any(call.indices.values()))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the other families and cases as slow."""
    for item in items:
        if "tests/decoders" not in item.path.as_posix() or not isinstance(item, pytest.Function):
            continue
        call = getattr(item, "callspec", None)
        another_case = item.path.name in LONG and call is not None and any(call.indices.values())
        if another_case or (item.path.parent.name == "methods" and _is_long(item)):
            item.add_marker(pytest.mark.slow)
