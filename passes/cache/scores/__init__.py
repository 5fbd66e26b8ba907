"""Cache pieces: one class per file."""
