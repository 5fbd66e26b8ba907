"""Benchmarks: accuracy and speed of tokcc engines against plain exports and against eager research code."""
