"""Pieces that choose the tokens that a state takes in, channel by channel."""
