"""Which key heads a step is for."""
