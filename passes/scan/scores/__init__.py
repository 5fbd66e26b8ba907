"""Pieces that rate the tokens of a scan, channel by channel."""
