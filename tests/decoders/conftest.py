"""One family for every method in the fast run; the others run with the slow tests."""

from __future__ import annotations

import pytest

FAST = ("llama",)
"""Grouped heads, rotation, no bias: what the others differ from is tested for itself in test_families.py."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the methods' tests on other families as slow."""
    for item in items:
        if "decoders/methods" not in item.path.as_posix():
            continue
        family = getattr(item, "callspec", None) and item.callspec.params.get("family")  # type: ignore[attr-defined]
        if family is not None and family not in FAST:
            item.add_marker(pytest.mark.slow)
