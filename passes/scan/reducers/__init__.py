"""Pieces that say what a scan does with the other tokens."""
