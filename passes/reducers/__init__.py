"""One reducer per file, discovered by folder."""
