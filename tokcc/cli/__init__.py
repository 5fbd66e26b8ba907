"""The command line."""

from tokcc.cli.app import app, main

__all__ = ["app", "main"]
