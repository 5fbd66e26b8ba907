"""One score per file, discovered by folder."""
