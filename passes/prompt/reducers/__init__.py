"""Pieces of prompt steps: reducers."""
