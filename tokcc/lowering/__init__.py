"""Turning tokcc nodes into what a backend runs."""
