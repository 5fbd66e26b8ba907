"""Runnable examples: real models, data and policies that a user copies."""
