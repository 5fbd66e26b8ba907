"""The TensorRT backend: a folder that builds with the user's own tools."""
