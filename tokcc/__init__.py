"""tokcc: an ahead-of-time compiler that bakes token reduction into exported transformer models."""

__version__ = "0.1.0"
