"""Sparse attention of encoders whose tokens are a grid."""
