"""The key-value cache of decoders: what is kept of it after every call."""
