"""What a compiled engine saves and what it costs."""
