"""Lowering to ONNX: standard-domain operations only, in the forms that are fast and portable."""
