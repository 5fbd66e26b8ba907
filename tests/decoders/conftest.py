"""What of the decoders' tests is in the fast run: every method on one family, long tests with one case."""

from __future__ import annotations

import pytest

FAST = ("llama",)
"""Grouped heads, rotation, no bias: what the others differ from is tested for itself in test_families.py."""
LONG = ("test_dont_waste_bits.py", "test_oscar.py", "test_slots.py", "test_think.py", "test_zipcache.py")
"""Files whose cases each compile a decoder and run it for long: the first case of every test is enough."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the other families and cases as slow."""
    for item in items:
        call = getattr(item, "callspec", None)
        if call is None or "tests/decoders" not in item.path.as_posix():
            continue
        other_family = item.path.parent.name == "methods" and call.params.get("family", FAST[0]) not in FAST
        if other_family or (item.path.name in LONG and any(call.indices.values())):
            item.add_marker(pytest.mark.slow)
