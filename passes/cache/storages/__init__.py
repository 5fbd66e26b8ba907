"""How entries of a cache are held between calls."""
