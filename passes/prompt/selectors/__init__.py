"""Pieces of prompt steps: selectors."""
