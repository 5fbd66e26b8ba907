"""Writing engines and bundles."""
