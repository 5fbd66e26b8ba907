"""Ratings of tokens as they come."""
