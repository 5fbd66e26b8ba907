"""One selector per file, discovered by folder."""
