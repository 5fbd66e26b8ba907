"""Selectors of regions of a grid, one class per file."""
