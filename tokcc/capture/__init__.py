"""Model forms to programs: loading, tracing and cleaning."""
