"""Pieces of prompt steps: scores."""
