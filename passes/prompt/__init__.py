"""Dropping tokens of a prompt inside a decoder: in the first call, between two layers, in one graph with decoding."""
