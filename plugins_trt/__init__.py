"""TensorRT plugins for the operators that need one."""
