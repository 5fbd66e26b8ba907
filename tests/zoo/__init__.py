"""Tiny random-weight models of real architectures, shared by the tests of every layer."""

from __future__ import annotations

from tests.zoo.models import ZOO, ZooModel, zoo_names

__all__ = ["ZOO", "ZooModel", "zoo_names"]
