"""Scores of sparse attention: one class per file."""
