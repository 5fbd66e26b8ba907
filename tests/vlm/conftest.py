"""What of these tests is in the fast run: two families that differ in tower, projector and decoder."""

from __future__ import annotations

import pytest

FAST = ("llava", "internvl")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the other families as slow."""
    for item in items:
        call = getattr(item, "callspec", None)
        if call is None or "tests/vlm" not in item.path.as_posix():
            continue
        if call.params.get("family", FAST[0]) not in FAST:
            item.add_marker(pytest.mark.slow)
