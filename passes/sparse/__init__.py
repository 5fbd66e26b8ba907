"""Sparse attention of decoders: what each block of queries reads."""
