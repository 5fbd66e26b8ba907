"""Pieces of biased attention: what is added to its logits."""
